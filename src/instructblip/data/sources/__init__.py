"""The data sets: one function each from the owner's files to examples. Adding one is a line."""

from instructblip.data.reading.records import Source
from instructblip.data.sources.captions import coco_caption, flickr30k, nocaps, web_capfilt
from instructblip.data.sources.choices import hatefulmemes, iconqa, scienceqa, vsr
from instructblip.data.sources.dialogue import (
    llava_conversation,
    llava_detail,
    llava_reasoning,
    visual_dialog,
)
from instructblip.data.sources.ocr import ocrvqa, textcaps, textvqa
from instructblip.data.sources.video import ivqa, msrvttqa, msvdqa
from instructblip.data.sources.vqa import (
    aokvqa,
    aokvqa_direct,
    aokvqa_question,
    gqa,
    okvqa,
    okvqa_question,
    vizwiz,
    vqav2,
    vqav2_question,
)

__all__ = ["SOURCES", "Source", "source_of"]

COCO = "annotations CC BY 4.0; pictures under the terms of Flickr"
OPEN_IMAGES = "annotations CC BY 4.0; pictures CC BY 2.0"
LLAVA = "CC BY-NC 4.0, and the terms of use of the model that wrote it"
OWN_TERMS = "see the owner's terms"


def source_of(name: str) -> Source:
    """The source called ``name``; ValueError lists the names when there is none."""
    if name not in SOURCES:
        raise ValueError(f"no data source '{name}'; expected one of {', '.join(sorted(SOURCES))}")
    return SOURCES[name]


SOURCES: dict[str, Source] = {
    "coco_caption": Source(
        coco_caption,
        "caption",
        COCO,
        "coco_karpathy_{split}.json, captions_{split}2014.json, or image_info_test2014.json",
    ),
    "web_capfilt": Source(
        web_capfilt,
        "caption",
        OWN_TERMS,
        "web_capfilt.json: a list of {image, caption}; or .tar shards in the folder itself",
    ),
    "textcaps": Source(
        textcaps,
        "caption_ocr",
        OPEN_IMAGES,
        "TextCaps_0.1_{split}.json; for OCR tokens TextVQA_Rosetta_OCR_v0.2_{split}.json",
    ),
    "vqav2": Source(
        vqav2,
        "vqa",
        COCO,
        "v2_OpenEnded_mscoco_{split}2014_questions.json and v2_mscoco_{split}2014_annotations.json,"
        " or vqa_train.json / vqa_val_eval.json",
    ),
    "okvqa": Source(
        okvqa,
        "vqa",
        COCO,
        "OpenEnded_mscoco_{split}2014_questions.json and mscoco_{split}2014_annotations.json,"
        " or okvqa_train.json",
    ),
    "aokvqa": Source(
        aokvqa, "multiple_choice", "Apache-2.0; pictures of COCO", "aokvqa_v1p0_{split}.json"
    ),
    "aokvqa_direct": Source(
        aokvqa_direct, "vqa", "Apache-2.0; pictures of COCO", "aokvqa_v1p0_{split}.json"
    ),
    "ocrvqa": Source(ocrvqa, "read", OWN_TERMS, "dataset.json"),
    "vqav2_question": Source(vqav2_question, "ask", COCO, "the files of vqav2"),
    "okvqa_question": Source(okvqa_question, "ask", COCO, "the files of okvqa"),
    "aokvqa_question": Source(
        aokvqa_question, "ask", "Apache-2.0; pictures of COCO", "the files of aokvqa"
    ),
    "llava_conversation": Source(llava_conversation, "instruct", LLAVA, "conversation_58k.json"),
    "llava_detail": Source(llava_detail, "instruct", LLAVA, "detail_23k.json"),
    "llava_reasoning": Source(llava_reasoning, "instruct", LLAVA, "complex_reasoning_77k.json"),
    "nocaps": Source(nocaps, "caption", OPEN_IMAGES, "nocaps_val_4500_captions.json"),
    "flickr30k": Source(
        flickr30k,
        "caption",
        OWN_TERMS,
        "dataset_flickr30k.json, flickr30k_{split}.json, or results_20130124.token and {split}.txt",
    ),
    "gqa": Source(gqa, "vqa", "CC BY 4.0", "testdev_balanced_questions.json"),
    "vsr": Source(
        vsr, "statement", "Apache-2.0; pictures of COCO", "{split}.jsonl or zeroshot/{split}.jsonl"
    ),
    "iconqa": Source(
        iconqa,
        "multiple_choice",
        "CC BY-NC-SA 4.0",
        "iconqa_data/ unpacked in images/, or iconqa_{split}.json",
    ),
    "scienceqa": Source(
        scienceqa, "multiple_choice", "CC BY-NC-SA 4.0", "problems.json or scienceqa_{split}.json"
    ),
    "textvqa": Source(
        textvqa,
        "vqa",
        OPEN_IMAGES,
        "TextVQA_0.5.1_{split}.json; for OCR tokens TextVQA_Rosetta_OCR_v0.2_{split}.json",
    ),
    "vizwiz": Source(vizwiz, "vqa", "CC BY 4.0", "{split}.json"),
    "visual_dialog": Source(
        visual_dialog,
        "dialogue",
        "CC BY 4.0; pictures of COCO",
        "visdial_1.0_{split}.json; visdial_1.0_{split}_dense_annotations.json",
    ),
    "hatefulmemes": Source(hatefulmemes, "classify", OWN_TERMS, "{split}.jsonl"),
    "msvdqa": Source(
        msvdqa, "vqa", OWN_TERMS, "{split}_qa.json, youtube_mapping.txt; frames in images/<video>/"
    ),
    "msrvttqa": Source(msrvttqa, "vqa", OWN_TERMS, "{split}_qa.json; frames in images/<video>/"),
    "ivqa": Source(ivqa, "vqa", "Apache-2.0", "{split}.csv; frames in images/<video_id>/"),
}

VIDEO_SETS = {"msvdqa", "msrvttqa", "ivqa"}
"""Those whose examples show frames."""
