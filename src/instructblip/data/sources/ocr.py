"""Words in images: OCR-VQA (book covers), TextVQA and TextCaps (scenes)."""

import re
from collections.abc import Iterator
from pathlib import PurePosixPath

from instructblip.core.example import Example
from instructblip.data.reading.records import Record, read_records
from instructblip.data.sources.split import Split

OCRVQA_SPLITS = {"train": 1, "val": 2, "test": 3}


def ocrvqa(split: Split) -> Iterator[Example]:
    """``dataset.json``: all splits in one file, distinguished by the field ``split``.

    ``{"0007": {"imageURL": "http://images.example/51.jpg", "split": 1, "title": "Milk",
    "questions": ["Who wrote this book?"], "answers": ["A. Person"]}}``; the image is stored as
    the id with the extension of the URL.
    """
    for key, record in read_records(split.find("dataset.json")):
        number = record.integer("split")
        if number not in OCRVQA_SPLITS.values():
            record.fail("split", "1 (train), 2 (val) or 3 (test)")
        if number != OCRVQA_SPLITS[split.name]:
            continue
        questions, answers = record.texts("questions"), record.texts("answers")
        if len(questions) != len(answers):
            record.fail("answers", f"as many answers as questions ({len(questions)})")
        # Everything up to a query or fragment; urlsplit refuses some texts without naming the file.
        url = re.split(r"[?#]", record.text("imageURL"))[0]
        image = split.image(key + (PurePosixPath(url).suffix or ".jpg"), record.where)
        for i, (question, answer) in enumerate(zip(questions, answers, strict=True)):
            yield split.example(
                f"{record.where}, question {i}",
                f"{key}_{i}",
                image,
                question=question,
                answers=(answer,) if answer else (),
            )


def textvqa(split: Split) -> Iterator[Example]:
    """``TextVQA_0.5.1_{split}.json``, with ``TextVQA_Rosetta_OCR_v0.2_{split}.json`` if there.

    ``{"data": [{"question_id": 0, "image_id": "a1b2", "question": "What does the sign say?",
    "answers": ["stop", "stop"]}]}``; OCR: ``{"data": [{"image_id": "a1b2",
    "ocr_tokens": ["STOP"]}]}``. Test has no answers.
    """
    ocr = _read_ocr(split)
    for _, record in read_records(split.find(f"TextVQA_0.5.1_{split.name}.json"), "data"):
        image_id = record.text("image_id")
        yield split.example(
            record.where,
            record.identifier("question_id"),
            split.image(f"{image_id}.jpg", record.where, *_folders(split)),
            question=record.text("question"),
            answers=record.texts("answers", ()),
            ocr_tokens=ocr.get(image_id, ()),
        )


def textcaps(split: Split) -> Iterator[Example]:
    """``TextCaps_0.1_{split}.json``, and ``TextVQA_Rosetta_OCR_v0.2_{split}.json`` if it is there.

    ``{"data": [{"image_id": "a1b2", "image_path": "train/a1b2.jpg", "caption_str": "A bottle
    that says milk.", "reference_strs": ["A bottle that says milk.", "..."]}]}``
    """
    ocr = _read_ocr(split)
    images: dict[str, tuple[Record, dict[str, None]]] = {}
    for _, record in read_records(split.find(f"TextCaps_0.1_{split.name}.json"), "data"):
        _, captions = images.setdefault(record.text("image_id"), (record, {}))
        if "caption_str" in record:
            captions[record.text("caption_str")] = None
        captions.update(dict.fromkeys(record.texts("reference_strs", ())))
    for image_id, (record, captions) in images.items():
        name = record.text("image_path", f"{image_id}.jpg")
        yield split.example(
            record.where,
            image_id,
            split.image(name, record.where, *_folders(split)),
            answers=tuple(captions),
            ocr_tokens=ocr.get(image_id, ()),
        )


def _folders(split: Split) -> tuple[str, ...]:
    """Folders that the archives of TextVQA and TextCaps unpack to."""
    if split.name == "test":
        return "test_images", "test"
    return "train_images", "train", "train_val"


def _read_ocr(split: Split) -> dict[str, tuple[str, ...]]:
    """OCR tokens by image; empty without the file."""
    path = split.find_optional(f"TextVQA_Rosetta_OCR_v0.2_{split.name}.json")
    records = read_records(path, "data") if path else ()
    return {record.text("image_id"): record.texts("ocr_tokens") for _, record in records}
