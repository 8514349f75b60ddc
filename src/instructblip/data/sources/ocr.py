"""Words in images: OCR-VQA (book covers), TextVQA and TextCaps (scenes)."""

import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from instructblip.core.batch import Example
from instructblip.data.reading.records import (
    Record,
    find_file,
    find_optional,
    place_image,
    read_records,
)

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
        image = place_image(root, key + extension, record.where)
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
    ocr = _read_ocr(root, split)
    for _, record in read_records(path, "data"):
        image_id = record.text("image_id")
        yield Example(
            dataset="textvqa",
            split=split,
            id=record.identifier("question_id"),
            images=(place_image(root, f"{image_id}.jpg", record.where, *_folders(split)),),
            task="vqa",
            question=record.text("question"),
            answers=record.texts("answers") if "answers" in record else (),
            ocr_tokens=ocr.get(image_id, ()),
            where=record.where,
        )


def textcaps(root: Path, split: str) -> Iterator[Example]:
    """``TextCaps_0.1_{split}.json``, and ``TextVQA_Rosetta_OCR_v0.2_{split}.json`` if it is there.

    ``{"data": [{"image_id": "a1b2", "image_path": "train/a1b2.jpg", "caption_str": "A bottle
    that says milk.", "reference_strs": ["A bottle that says milk.", "..."]}]}``
    """
    path = find_file(root, f"TextCaps_0.1_{split}.json")
    ocr = _read_ocr(root, split)
    pictures: dict[str, tuple[Record, dict[str, None]]] = {}
    for _, record in read_records(path, "data"):
        _, captions = pictures.setdefault(record.text("image_id"), (record, {}))
        if "caption_str" in record:
            captions[record.text("caption_str")] = None
        if "reference_strs" in record:
            captions.update(dict.fromkeys(record.texts("reference_strs")))
    for image_id, (record, captions) in pictures.items():
        name = record.text("image_path", f"{image_id}.jpg")
        yield Example(
            dataset="textcaps",
            split=split,
            id=image_id,
            images=(place_image(root, name, record.where, *_folders(split)),),
            task="caption_ocr",
            answers=tuple(captions),
            ocr_tokens=ocr.get(image_id, ()),
            where=record.where,
        )


def _folders(split: str) -> tuple[str, ...]:
    """Folders that the archives of TextVQA and TextCaps unpack to (val shares train's)."""
    return ("test_images", "test") if split == "test" else ("train_images", "train", "train_val")


def _read_ocr(root: Path, split: str) -> dict[str, tuple[str, ...]]:
    """Words that an OCR system read, by picture; empty when the file is not there.

    ``{"data": [{"image_id": "a1b2", "ocr_tokens": ["MILK", "1L"]}]}``
    """
    path = find_optional(root, f"TextVQA_Rosetta_OCR_v0.2_{split}.json")
    if path is None:
        return {}
    return {r.text("image_id"): r.texts("ocr_tokens") for _, r in read_records(path, "data")}
