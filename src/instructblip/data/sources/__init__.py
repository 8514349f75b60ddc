"""The published data sets: readers of the owners' files, and the table of all sets."""

from dataclasses import replace
from functools import partial

from instructblip.data.reading.records import Source
from instructblip.data.sources.captions import (
    coco_caption,
    coco_objects,
    flickr30k,
    nocaps,
    web_capfilt,
)
from instructblip.data.sources.choices import hatefulmemes, iconqa, scienceqa, vsr
from instructblip.data.sources.dialogue import llava, visual_dialog
from instructblip.data.sources.ocr import ocrvqa, textcaps, textvqa
from instructblip.data.sources.split import Reader, read_split
from instructblip.data.sources.video import ivqa, msrvttqa, msvdqa
from instructblip.data.sources.vqa import (
    aokvqa,
    aokvqa_direct,
    asked_for,
    gqa,
    okvqa,
    pope,
    vizwiz,
    vqav2,
)

__all__ = ["SOURCES", "Source", "source_of"]

COCO = "annotations CC BY 4.0; images under the terms of Flickr"
OF_COCO = "Apache-2.0; images of COCO"
OPEN_IMAGES = "annotations CC BY 4.0; images CC BY 2.0"
LLAVA = "CC BY-NC 4.0, and the terms of use of the model that wrote it"
OWNER = "see the owner's terms"
OCR_FILE = "; for OCR tokens TextVQA_Rosetta_OCR_v0.2_{split}.json"

TABLE: dict[str, tuple[Reader, str, str, str]] = {
    # name: reader, task, licence, files in annotations/
    "coco_caption": (
        coco_caption,
        "caption",
        COCO,
        "coco_karpathy_{split}.json, captions_{split}2014.json, or image_info_test2014.json",
    ),
    "coco_objects": (
        coco_objects,
        "caption",
        COCO,
        "the files of coco_caption, instances_val2014.json, for train instances_train2014.json too",
    ),
    "web_capfilt": (
        web_capfilt,
        "caption",
        OWNER,
        "web_capfilt.json: a list of {image, caption}; or .tar shards in the folder itself",
    ),
    "textcaps": (textcaps, "caption_ocr", OPEN_IMAGES, "TextCaps_0.1_{split}.json" + OCR_FILE),
    "vqav2": (
        vqav2,
        "vqa",
        COCO,
        "v2_OpenEnded_mscoco_{split}2014_questions.json and v2_mscoco_{split}2014_annotations.json,"
        " or vqa_train.json / vqa_val_eval.json",
    ),
    "okvqa": (
        okvqa,
        "vqa",
        COCO,
        "OpenEnded_mscoco_{split}2014_questions.json and mscoco_{split}2014_annotations.json,"
        " or okvqa_train.json",
    ),
    "aokvqa": (aokvqa, "multiple_choice", OF_COCO, "aokvqa_v1p0_{split}.json"),
    "aokvqa_direct": (aokvqa_direct, "vqa", OF_COCO, "aokvqa_v1p0_{split}.json"),
    "ocrvqa": (ocrvqa, "read", OWNER, "dataset.json"),
    "vqav2_question": (partial(asked_for, vqav2), "ask", COCO, "the files of vqav2"),
    "okvqa_question": (partial(asked_for, okvqa), "ask", COCO, "the files of okvqa"),
    "aokvqa_question": (partial(asked_for, aokvqa), "ask", OF_COCO, "the files of aokvqa"),
    **{
        name: (partial(llava, file), "instruct", LLAVA, file)
        for name, file in {
            "llava_conversation": "conversation_58k.json",
            "llava_detail": "detail_23k.json",
            "llava_reasoning": "complex_reasoning_77k.json",
        }.items()
    },
    "nocaps": (nocaps, "caption", OPEN_IMAGES, "nocaps_val_4500_captions.json"),
    "flickr30k": (
        flickr30k,
        "caption",
        OWNER,
        "dataset_flickr30k.json, flickr30k_{split}.json, or results_20130124.token and {split}.txt",
    ),
    "gqa": (gqa, "vqa", "CC BY 4.0", "testdev_balanced_questions.json"),
    "vsr": (vsr, "statement", OF_COCO, "{split}.jsonl or zeroshot/{split}.jsonl"),
    "iconqa": (
        iconqa,
        "multiple_choice",
        "CC BY-NC-SA 4.0",
        "iconqa_data/ unpacked in images/, or iconqa_{split}.json",
    ),
    "scienceqa": (
        scienceqa,
        "multiple_choice",
        "CC BY-NC-SA 4.0",
        "problems.json or scienceqa_{split}.json",
    ),
    "textvqa": (textvqa, "vqa", OPEN_IMAGES, "TextVQA_0.5.1_{split}.json" + OCR_FILE),
    "vizwiz": (vizwiz, "vqa", "CC BY 4.0", "{split}.json"),
    "pope": (pope, "vqa", OF_COCO, "coco_pope_{split}.json"),
    "visual_dialog": (
        visual_dialog,
        "dialogue",
        "CC BY 4.0; images of COCO",
        "visdial_1.0_{split}.json; visdial_1.0_{split}_dense_annotations.json",
    ),
    "hatefulmemes": (hatefulmemes, "classify", OWNER, "{split}.jsonl"),
    "msvdqa": (
        msvdqa,
        "vqa",
        OWNER,
        "{split}_qa.json, youtube_mapping.txt; frames in images/<video>/",
    ),
    "msrvttqa": (msrvttqa, "vqa", OWNER, "{split}_qa.json; frames in images/<video>/"),
    "ivqa": (ivqa, "vqa", "Apache-2.0", "{split}.csv; frames in images/<video_id>/"),
}

SOURCES = {
    name: Source(partial(read_split, read, name, task), task, licence, files)
    for name, (read, task, licence, files) in TABLE.items()
}
# Data prepared before its examples were marked has to be prepared again.
SOURCES["web_capfilt"] = replace(SOURCES["web_capfilt"], images=".")  # where shards are
SOURCES["aokvqa_direct"] = replace(SOURCES["aokvqa_direct"], settings="difficult_direct_answer")
SOURCES["pope"] = replace(SOURCES["pope"], splits=("random", "popular", "adversarial"))

VIDEO_SETS = {"msvdqa", "msrvttqa", "ivqa"}
"""Those whose examples show frames."""


def source_of(name: str) -> Source:
    """The source called ``name``; ValueError lists the names when there is none."""
    if name not in SOURCES:
        raise ValueError(f"no data source '{name}'; expected one of {', '.join(sorted(SOURCES))}")
    return SOURCES[name]
