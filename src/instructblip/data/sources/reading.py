"""Words in pictures: OCR-VQA (book covers) and TextVQA (scenes)."""

import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from instructblip.core.batch import Example
from instructblip.data.reading.records import (
    find_file,
    place,
    read_records,
)
from instructblip.data.sources.captions import open_images_folders, read_ocr

OCRVQA_SPLITS = {"train": 1, "val": 2, "test": 3}


def ocrvqa(root: Path, split: str) -> Iterator[Example]:
    """``dataset.json``: all splits in one file, told apart by the field ``split``.

    ``{"0007": {"imageURL": "http://images.example/51.jpg", "split": 1, "title": "Milk",
    "questions": ["Who wrote this book?"], "answers": ["A. Person"]}}``; the picture is stored as
    the id with the extension of the URL.
    """
    path = find_file(root, "dataset.json")
    wanted = OCRVQA_SPLITS[split]
    for key, record in read_records(path):
        number = record.integer("split")
        if number not in OCRVQA_SPLITS.values():
            record.fail("split", "1 (train), 2 (val) or 3 (test)")
        if number != wanted:
            continue
        questions, answers = record.texts("questions"), record.texts("answers")
        if len(questions) != len(answers):
            record.fail("answers", f"as many answers as questions ({len(questions)})")
        # Everything up to a query or fragment; urlsplit refuses some texts without naming the file.
        url = re.split(r"[?#]", record.text("imageURL"))[0]
        extension = PurePosixPath(url).suffix or ".jpg"
        image = place(root, key + extension, record.where)
        for i, (question, answer) in enumerate(zip(questions, answers, strict=True)):
            yield Example(
                dataset="ocrvqa",
                split=split,
                id=f"{key}_{i}",
                images=(image,),
                task="read",
                question=question,
                answers=(answer,) if answer else (),
                where=f"{record.where}, question {i}",
            )


def textvqa(root: Path, split: str) -> Iterator[Example]:
    """``TextVQA_0.5.1_{split}.json``, with ``TextVQA_Rosetta_OCR_v0.2_{split}.json`` if there.

    ``{"data": [{"question_id": 0, "image_id": "a1b2", "question": "What does the sign say?",
    "answers": ["stop", "stop"]}]}``; OCR: ``{"data": [{"image_id": "a1b2",
    "ocr_tokens": ["STOP"]}]}``. Test has no answers.
    """
    path = find_file(root, f"TextVQA_0.5.1_{split}.json")
    ocr = read_ocr(root, split)
    for _, record in read_records(path, "data"):
        image_id = record.text("image_id")
        yield Example(
            dataset="textvqa",
            split=split,
            id=record.identifier("question_id"),
            images=(place(root, f"{image_id}.jpg", record.where, *open_images_folders(split)),),
            task="vqa",
            question=record.text("question"),
            answers=record.texts("answers") if "answers" in record else (),
            ocr_tokens=ocr.get(image_id, ()),
            where=record.where,
        )
