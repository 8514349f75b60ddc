"""Hand-made miniatures of the owners' files, with the examples that the readers make of them."""

import json
from pathlib import Path
from typing import Any

from tests.testing import write_json

QUESTIONS = {
    "questions": [
        {"question_id": 420, "image_id": 42, "question": "What is on the tray?"},
        {"question_id": 421, "image_id": 42, "question": "Is it day?"},
    ]
}
ANNOTATIONS = {
    "annotations": [
        {
            "question_id": 421,
            "image_id": 42,
            "question_type": "is it",
            "answer_type": "yes/no",
            "answers": [{"answer": "yes", "answer_id": i} for i in range(10)],
        },
        {
            "question_id": 420,
            "image_id": 42,
            "question_type": "what is",
            "answer_type": "other",
            "answers": [{"answer": a} for a in ["bread"] * 6 + ["roll"] * 4],
        },
    ]
}
COCO = {
    "info": {"year": 2014},
    "images": [{"id": 9, "file_name": "COCO_val2014_000000000009.jpg", "domain": "near-domain"}],
    "annotations": [
        {"image_id": 9, "id": i, "caption": f"A tray with {thing}. "}
        for i, thing in enumerate(["bread", "fruit", "two apples", "food", "a cup"])
    ],
}
KARPATHY = [
    {"image": "val2014/COCO_val2014_000000000009.jpg", "caption": "A tray.", "image_id": "coco_9"},
    {"image": "val2014/COCO_val2014_000000000010.jpg", "caption": "A dog.", "image_id": "coco_10"},
    {"image": "val2014/COCO_val2014_000000000009.jpg", "caption": "Bread.", "image_id": "coco_9"},
]
AOKVQA = [
    {
        "question_id": "22Mex",
        "image_id": 299207,
        "question": "What does the man wait for?",
        "choices": ["skateboarder", "train", "delivery", "cab"],
        "correct_choice_idx": 3,
        "direct_answers": ["ride", "bus", "ride"],
        "rationales": ["He stands at the road."],
    }
]
LLAVA = [
    {
        "id": "000000215677",
        "image": "000000215677.jpg",
        "conversations": [
            {"from": "human", "value": "<image>\nWhat is shown?"},
            {"from": "gpt", "value": "A street, with Two Cars! " * 30},
            {"from": "human", "value": "Which colours?"},
            {"from": "gpt", "value": "Red and blue."},
        ],
    }
]
OCR = {"data": [{"image_id": "a1b2", "ocr_tokens": ["MILK", "1L"]}]}
ICON = {"question": "How many dots?", "choices": ["3", "4"], "answer": 1, "ques_type": "choose_txt"}
VIDEO_QA = [{"id": 5, "video_id": 1301, "question": "what is a man doing?", "answer": "cook"}]
FRAMES = {f"images/vid1301/frame_{i}.jpg": "" for i in (10, 2, 1)}
VISDIAL = {
    "version": "1.0",
    "split": "val",
    "data": {
        "dialogs": [
            {
                "image_id": 185,
                "caption": "a horse on a beach",
                "dialog": [
                    {"question": 0, "answer": 1, "answer_options": [1, 0, 2], "gt_index": 0},
                    {"question": 1, "answer": 0, "answer_options": [2, 0, 1], "gt_index": 1},
                ],
            }
        ],
        "questions": ["is it sunny", "is there a rider"],
        "answers": ["no", "yes", "maybe"],
    },
}
VIZWIZ = [
    {
        "image": "VizWiz_val_00000003.jpg",
        "question": "What is this?",
        "answers": [{"answer": a} for a in ("unanswerable", "cup", "cup")],
        "answer_type": "other",
        "answerable": 1,
    }
]


# source, split, files, index of the example, its expected fields, number of examples
CASES: list[tuple[str, str, dict[str, Any], int, dict[str, Any], int]] = [
    (
        "coco_caption",
        "val",
        {"annotations/captions_val2014.json": COCO, "images/val2014/": None},
        0,
        {
            "id": "9",
            "images": ("val2014/COCO_val2014_000000000009.jpg",),
            "answers": (
                "A tray with bread.",
                "A tray with fruit.",
                "A tray with two apples.",
                "A tray with food.",
                "A tray with a cup.",
            ),
        },
        1,
    ),
    (
        "coco_caption",
        "train",
        {
            "annotations/coco_karpathy_train.json": KARPATHY,
            "images/COCO_val2014_000000000009.jpg": "",
        },
        0,
        {
            "id": "9",
            "images": ("COCO_val2014_000000000009.jpg",),
            "answers": ("A tray.", "Bread."),
        },
        2,
    ),
    (
        "coco_caption",
        "test",
        {
            "annotations/coco_karpathy_test.json": [
                {"image": "val2014/COCO_val2014_000000000009.jpg", "caption": ["A.", "B.", "C."]}
            ]
        },
        0,
        {"answers": ("A.", "B.", "C.")},
        1,
    ),
    (
        "web_capfilt",
        "train",
        {
            "annotations/web_capfilt.json": [{"image": "0/1.jpg", "caption": "a cup"}],
            "images/0/1.jpg": "",
        },
        0,
        {"images": ("images/0/1.jpg",), "answers": ("a cup",)},
        1,
    ),
    (
        "nocaps",
        "val",
        {"annotations/nocaps_val_4500_captions.json": COCO},
        0,
        {"extra": {"domain": "near-domain"}},
        1,
    ),
    (
        "nocaps",
        "test",
        {"annotations/nocaps_test_image_info.json": {"images": COCO["images"]}},
        0,
        {"answers": ()},
        1,
    ),
    (
        "flickr30k",
        "test",
        {
            "annotations/dataset_flickr30k.json": {
                "images": [
                    {"filename": "1.jpg", "split": "train", "sentences": [{"raw": "No."}]},
                    {"filename": "2.jpg", "split": "test", "sentences": [{"raw": "A man."}] * 5},
                ]
            }
        },
        0,
        {"images": ("2.jpg",), "answers": ("A man.",) * 5},
        1,
    ),
    (
        "flickr30k",
        "test",
        {
            "annotations/flickr30k_test.json": [
                {"image": "flickr30k-images/1007.jpg", "caption": ["A man.", "A boy."]}
            ]
        },
        0,
        {"id": "1007", "answers": ("A man.", "A boy.")},
        1,
    ),
    (
        "textcaps",
        "val",
        {
            "annotations/TextCaps_0.1_val.json": {
                "dataset_type": "val",
                "data": [
                    {
                        "image_id": "a1b2",
                        "image_path": "train/a1b2.jpg",
                        "caption_str": "Milk.",
                        "reference_strs": ["Milk.", "A bottle of milk."],
                    }
                ],
            },
            "annotations/TextVQA_Rosetta_OCR_v0.2_val.json": OCR,
        },
        0,
        {
            "task": "caption_ocr",
            "answers": ("Milk.", "A bottle of milk."),
            "ocr_tokens": ("MILK", "1L"),
        },
        1,
    ),
    (
        "vqav2",
        "train",
        {
            "annotations/v2_OpenEnded_mscoco_train2014_questions.json": QUESTIONS,
            "annotations/v2_mscoco_train2014_annotations.json": ANNOTATIONS,
        },
        0,
        {
            "id": "420",
            "images": ("COCO_train2014_000000000042.jpg",),
            "question": "What is on the tray?",
            "answers": ("bread",) * 6 + ("roll",) * 4,
            "extra": {"question_type": "what is", "answer_type": "other"},
        },
        2,
    ),
    (
        "vqav2",
        "val",
        {
            "annotations/vqa_val_eval.json": [
                {"question_id": 1, "question": "What?", "image": "val2014/COCO_val2014_1.jpg"}
            ]
        },
        0,
        {"id": "1", "answers": ()},
        1,
    ),
    (
        "vqav2",
        "test",
        {"annotations/v2_OpenEnded_mscoco_test-dev2015_questions.json": QUESTIONS},
        1,
        {"images": ("COCO_test2015_000000000042.jpg",), "answers": ()},
        2,
    ),
    (
        "okvqa",
        "val",
        {
            "annotations/OpenEnded_mscoco_val2014_questions.json": QUESTIONS,
            "annotations/mscoco_val2014_annotations.json": ANNOTATIONS,
        },
        1,
        {"question": "Is it day?", "answers": ("yes",) * 10},
        2,
    ),
    (
        "okvqa",
        "train",
        {
            "annotations/okvqa_train.json": [
                {
                    "question_id": 7,
                    "question": "What?",
                    "answer": ["a", "a", "b"],
                    "image": "train2014/x.jpg",
                    "dataset": "okvqa",
                }
            ]
        },
        0,
        {"answers": ("a", "a", "b")},
        1,
    ),
    (
        "aokvqa",
        "train",
        {"annotations/aokvqa_v1p0_train.json": AOKVQA, "images/train2017/": None},
        0,
        {
            "images": ("train2017/000000299207.jpg",),
            "choices": ("skateboarder", "train", "delivery", "cab"),
            "answers": ("cab",),
        },
        1,
    ),
    (
        "aokvqa_direct",
        "val",
        {"annotations/aokvqa_v1p0_val.json": AOKVQA},
        0,
        {"task": "vqa", "answers": ("ride", "bus", "ride"), "choices": ()},
        1,
    ),
    (
        "vqav2_question",
        "train",
        {
            "annotations/v2_OpenEnded_mscoco_train2014_questions.json": QUESTIONS,
            "annotations/v2_mscoco_train2014_annotations.json": ANNOTATIONS,
        },
        0,
        {"question": "bread", "answers": ("What is on the tray?",)},
        2,
    ),
    (
        "okvqa_question",
        "train",
        {
            "annotations/OpenEnded_mscoco_train2014_questions.json": QUESTIONS,
            "annotations/mscoco_train2014_annotations.json": ANNOTATIONS,
        },
        1,
        {"question": "yes", "answers": ("Is it day?",)},
        2,
    ),
    (
        "aokvqa_question",
        "train",
        {"annotations/aokvqa_v1p0_train.json": AOKVQA},
        0,
        {"question": "cab", "answers": ("What does the man wait for?",), "choices": ()},
        1,
    ),
    (
        "ocrvqa",
        "test",
        {
            "annotations/dataset.json": {
                "0007": {
                    "imageURL": "http://images.example/I/51.png?x=1",
                    "split": 3,
                    "questions": ["Who wrote this?", "What is it called?"],
                    "answers": ["A. Person", "Milk"],
                },
                "0008": {
                    "imageURL": "http://images.example/52.jpg",
                    "split": 1,
                    "questions": ["Who?"],
                    "answers": ["B"],
                },
            }
        },
        1,
        {"id": "0007_1", "images": ("0007.png",), "answers": ("Milk",)},
        2,
    ),
    (
        "llava_conversation",
        "train",
        {"annotations/conversation_58k.json": LLAVA},
        1,
        {
            "question": "Which colours?",
            "answers": ("Red and blue.",),
            "history": (("What is shown?", ("A street, with Two Cars! " * 30).strip()),),
        },
        2,
    ),
    ("llava_detail", "train", {"annotations/detail_23k.json": LLAVA}, 0, {"history": ()}, 2),
    ("llava_reasoning", "train", {"annotations/complex_reasoning_77k.json": LLAVA}, 0, {}, 2),
    (
        "gqa",
        "test",
        {
            "annotations/testdev_balanced_questions.json": {
                "201": {
                    "question": "What is left of the cup?",
                    "imageId": "n161",
                    "answer": "spoon",
                    "types": {"structural": "query", "semantic": "rel"},
                }
            }
        },
        0,
        {
            "id": "201",
            "images": ("n161.jpg",),
            "answers": ("spoon",),
            "extra": {"question_type": "query", "semantic_type": "rel"},
        },
        1,
    ),
    (
        "gqa",
        "test",
        {
            "annotations/testdev_balanced_questions.json": [
                {"question_id": 201, "question": "What?", "image": "n161.jpg", "answer": "spoon"}
            ]
        },
        0,
        {"id": "201", "images": ("n161.jpg",)},
        1,
    ),
    (
        "vsr",
        "test",
        {
            "annotations/test.jsonl": [
                {"image": "85.jpg", "caption": "The cat is under the bed.", "label": 0},
                {"image": "86.jpg", "caption": "The\u2028cat.", "label": 1, "relation": "under"},
            ]
        },
        1,
        {
            "question": "The\u2028cat.",
            "answers": ("true",),
            "choices": ("true", "false"),
            "where": "test.jsonl:line 2",
        },
        2,
    ),
    (
        "iconqa",
        "test",
        {
            "images/iconqa_data/iconqa/test/choose_txt/12/data.json": ICON,
            "images/iconqa_data/iconqa/test/choose_txt/12/image.png": "",
        },
        0,
        {
            "id": "12",
            "images": ("iconqa_data/iconqa/test/choose_txt/12/image.png",),
            "answers": ("4",),
        },
        1,
    ),
    (
        "iconqa",
        "test",
        {"annotations/iconqa_test.json": [{"image": "12.png", **ICON}]},
        0,
        {"images": ("12.png",), "choices": ("3", "4"), "answers": ("4",)},
        1,
    ),
    (
        "scienceqa",
        "test",
        {
            "annotations/problems.json": {
                "1": {**ICON, "image": None, "hint": "", "split": "test"},
                "2": {**ICON, "image": "image.png", "hint": "Count.", "split": "test"},
                "3": {**ICON, "image": "image.png", "hint": "", "split": "train"},
            },
            "images/test/2/image.png": "",
        },
        0,
        {"id": "2", "images": ("test/2/image.png",), "context": "Count.", "answers": ("4",)},
        1,
    ),
    (
        "textvqa",
        "val",
        {
            "annotations/TextVQA_0.5.1_val.json": {
                "data": [
                    {
                        "question_id": 3,
                        "image_id": "a1b2",
                        "question": "What does it say?",
                        "answers": ["milk"] * 9 + ["MILK"],
                    }
                ]
            },
            "annotations/TextVQA_Rosetta_OCR_v0.2_val.json": OCR,
            "images/train_images/": None,
        },
        0,
        {
            "images": ("train_images/a1b2.jpg",),
            "ocr_tokens": ("MILK", "1L"),
            "answers": ("milk",) * 9 + ("MILK",),
        },
        1,
    ),
    (
        "visual_dialog",
        "val",
        {
            "annotations/visdial_1.0_val.json": VISDIAL,
            "annotations/visdial_1.0_val_dense_annotations.json": [
                {"image_id": 185, "round_id": 2, "gt_relevance": [0.0, 1.0, 0.5]}
            ],
        },
        1,
        {
            "id": "185_2",
            "images": ("VisualDialog_val2018_000000000185.jpg",),
            "question": "is there a rider",
            "answers": ("no",),
            "choices": ("maybe", "no", "yes"),
            "context": "a horse on a beach",
            "history": (("is it sunny", "yes"),),
            "extra": {"gt_index": 1, "gt_relevance": [0.0, 1.0, 0.5]},
        },
        2,
    ),
    (
        "hatefulmemes",
        "val",
        {"annotations/dev.jsonl": [{"id": 42, "img": "img/42.png", "label": 1, "text": "nice"}]},
        0,
        {"answers": ("yes",), "choices": ("yes", "no"), "extra": {"label": 1}},
        1,
    ),
    (
        "vizwiz",
        "val",
        {"annotations/val.json": VIZWIZ},
        0,
        {
            "answers": ("unanswerable", "cup", "cup"),
            "extra": {"answer_type": "other", "answerable": 1},
        },
        1,
    ),
    (
        "msvdqa",
        "test",
        {"annotations/test_qa.json": VIDEO_QA, **FRAMES},
        0,
        {
            "id": "5",
            "images": tuple(f"vid1301/frame_{i}.jpg" for i in (1, 2, 10)),
            "answers": ("cook",),
        },
        1,
    ),
    ("msrvttqa", "test", {"annotations/test_qa.json": VIDEO_QA}, 0, {"images": ()}, 1),
    (
        "ivqa",
        "test",
        {
            "annotations/test.csv": "video_id,question,answer1,answer2,answer3,answer4,answer5,"
            "start,end\na1B2,What is poured?,milk,milk,cream,,white milk,12,24\n",
            "images/a1B2/0.jpg": "",
        },
        0,
        {"images": ("a1B2/0.jpg",), "answers": ("milk", "milk", "cream", "white milk")},
        1,
    ),
    (
        "coco_caption",
        "test",
        {"annotations/image_info_test2014.json": {"images": COCO["images"]}},
        0,
        {"id": "9", "answers": ()},
        1,
    ),
    (
        "flickr30k",
        "val",
        {
            "annotations/results_20130124.token": "10.jpg#0\tA man rides .\n11.jpg#0\tNo.\n"
            "10.jpg#1\tA rider .\n",
            "annotations/val.txt": "10\n12\n",
            "images/flickr30k-images/": None,
        },
        0,
        {"images": ("flickr30k-images/10.jpg",), "answers": ("A man rides .", "A rider .")},
        1,
    ),
    (
        "vsr",
        "val",
        {
            "annotations/zeroshot/dev.jsonl": [
                {"image": "0085.jpg", "caption": "The cat is under the bed.", "label": 0}
            ]
        },
        0,
        {"question": "The cat is under the bed.", "answers": ("false",)},
        1,
    ),
    (
        "msvdqa",
        "test",
        {
            "annotations/test_qa.json": VIDEO_QA,
            "annotations/youtube_mapping.txt": "-4wsuPCjDBc_5_15 vid1\nabc_1_2 vid1301\n",
            "images/abc_1_2/frame_1.jpg": "",
        },
        0,
        {"images": ("abc_1_2/frame_1.jpg",), "answers": ("cook",)},
        1,
    ),
    (
        "coco_objects",
        "val",
        {
            "annotations/captions_val2014.json": COCO,
            "annotations/instances_val2014.json": {
                "annotations": [{"image_id": 9, "category_id": 51}],
                "categories": [{"id": 51, "name": "bowl"}],
            },
        },
        0,
        {"id": "9", "extra": {"objects": ["bowl"]}},
        1,
    ),
    (
        "pope",
        "random",
        {
            "annotations/coco_pope_random.json": "".join(
                f'{{"question_id": {i}, "image": "COCO_val2014_000000016631.jpg", '
                f'"text": "Is there a {name} in the image?", "label": "{label}"}}\n'
                for i, (name, label) in enumerate((("person", "yes"), ("dining table", "no")))
            )
        },
        1,
        {"question": "Is there a dining table in the image?", "answers": ("no",)},
        2,
    ),
]


def write_files(root: Path, files: dict[str, Any]) -> None:
    """JSON values, JSON lines for ``.jsonl``, text for other strings, folders for a final ``/``."""
    for name, value in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if name.endswith("/"):
            path.mkdir(exist_ok=True)
        elif name.endswith(".jsonl"):
            lines = [json.dumps(line, ensure_ascii=False) + "\n" for line in value]
            path.write_text("".join(lines), encoding="utf-8")
        elif isinstance(value, str):
            path.write_text(value, encoding="utf-8")
        else:
            write_json(path, value)
