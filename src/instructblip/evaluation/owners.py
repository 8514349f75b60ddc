"""Where the data of each benchmark is to be had: nothing is downloaded for you."""

OWNERS: dict[str, str] = {
    "coco_caption": "https://cocodataset.org/#download",
    "textcaps": "https://textvqa.org/textcaps/dataset/",
    "vqav2": "https://visualqa.org/download.html",
    "okvqa": "https://okvqa.allenai.org/download.html",
    "aokvqa": "https://github.com/allenai/aokvqa",
    "aokvqa_direct": "https://github.com/allenai/aokvqa",
    "ocrvqa": "https://ocr-vqa.github.io",
    "nocaps": "https://nocaps.org/download",
    "flickr30k": "https://shannon.cs.illinois.edu/DenotationGraph/",
    "gqa": "https://cs.stanford.edu/people/dorarad/gqa/download.html",
    "vsr": "https://github.com/cambridgeltl/visual-spatial-reasoning",
    "iconqa": "https://iconqa.github.io",
    "textvqa": "https://textvqa.org/dataset/",
    "visual_dialog": "https://visualdialog.org/data",
    "hatefulmemes": "https://hatefulmemeschallenge.com",
    "vizwiz": "https://vizwiz.org/tasks-and-datasets/vqa/",
    "scienceqa": "https://scienceqa.github.io",
    "msvdqa": "https://github.com/xudejing/video-question-answering",
    "msrvttqa": "https://github.com/xudejing/video-question-answering",
    "ivqa": "https://antoyang.github.io/just-ask.html",
}
"""Source of a benchmark -> the page of its owner."""
