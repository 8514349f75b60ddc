"""A text judged against a picture: VSR (true or false) and HatefulMemes (yes or no)."""

from collections.abc import Iterator
from pathlib import Path

from instructblip.core.batch import Example
from instructblip.data.reading.records import (
    Record,
    find_file,
    place,
    read_lines,
)


def vsr(root: Path, split: str) -> Iterator[Example]:
    """``{split}.jsonl``, or the owner's ``zeroshot/{split}.jsonl``, the paper's split; val is dev.

    ``{"image": "000000085637.jpg", "caption": "The cat is under the bed.", "label": 1,
    "relation": "under", "subj": "cat", "obj": "bed"}``
    """
    parts = ("val", "dev") if split == "val" else (split,)
    path = find_file(root, *(f"{f}{part}.jsonl" for f in ("", "zeroshot/") for part in parts))
    for i, record in enumerate(read_lines(path)):
        yield Example(
            dataset="vsr",
            split=split,
            id=str(i),
            images=(place(root, record.text("image"), record.where, "trainval2017", "images"),),
            task="statement",
            question=record.text("caption"),
            choices=("true", "false"),
            answers=(("false", "true")[_label(record)],),
            where=record.where,
            extra={"question_type": record.text("relation", "")},
        )


def hatefulmemes(root: Path, split: str) -> Iterator[Example]:
    """``{split}.jsonl``, val also as ``dev.jsonl`` or ``dev_seen.jsonl``, test ``test_seen.jsonl``.

    ``{"id": 42953, "img": "img/42953.png", "label": 0, "text": "it is a nice day"}``; the test
    file has no label.
    """
    others = {"val": ["dev.jsonl", "dev_seen.jsonl"], "test": ["test_seen.jsonl"]}
    path = find_file(root, f"{split}.jsonl", *others.get(split, []))
    for record in read_lines(path):
        label = _label(record) if "label" in record else None
        yield Example(
            dataset="hatefulmemes",
            split=split,
            id=record.identifier("id"),
            images=(place(root, record.text("img"), record.where, "img"),),
            task="classify",
            question=record.text("text"),
            choices=("yes", "no"),
            answers=() if label is None else (("no", "yes")[label],),
            where=record.where,
            extra={} if label is None else {"label": label},
        )


def _label(record: Record) -> int:
    label = record.integer("label")
    if label not in (0, 1):
        record.fail("label", "0 or 1")
    return label
