"""A-OKVQA: one file, read as multiple choice and as direct answers.

``aokvqa_v1p0_{split}.json``::

    [{"question_id": "22MexNkBPpdZGX6sxbxVBH", "image_id": 299207, "split": "train",
      "question": "What is the man by the bags awaiting?",
      "choices": ["skateboarder", "train", "delivery", "cab"], "correct_choice_idx": 3,
      "direct_answers": ["ride", "bus", "taxi"], "rationales": ["He stands at the road."]}]

The test file has neither ``correct_choice_idx`` nor ``direct_answers``. LAVIS's file of the same
name adds ``image``.
"""

from collections.abc import Iterator
from pathlib import Path

from instructblip.core.batch import Example
from instructblip.data.reading.records import (
    Record,
    find_file,
    place,
    read_records,
)
from instructblip.data.sources.captions import COCO_FOLDERS


def aokvqa(root: Path, split: str) -> Iterator[Example]:
    """The question with its choices; the answer is the text of the right choice."""
    for record, image in _records(root, split):
        choices = record.texts("choices")
        right = "correct_choice_idx" in record
        yield Example(
            dataset="aokvqa",
            split=split,
            id=record.identifier("question_id"),
            images=(image,),
            task="multiple_choice",
            question=record.text("question"),
            choices=choices,
            answers=(record.pick("correct_choice_idx", choices),) if right else (),
            where=record.where,
        )


def aokvqa_direct(root: Path, split: str) -> Iterator[Example]:
    """The question alone, with the direct answers (ten, repeated as often as they were given)."""
    for record, image in _records(root, split):
        yield Example(
            dataset="aokvqa_direct",
            split=split,
            id=record.identifier("question_id"),
            images=(image,),
            task="vqa",
            question=record.text("question"),
            answers=record.texts("direct_answers") if "direct_answers" in record else (),
            where=record.where,
        )


def _records(root: Path, split: str) -> Iterator[tuple[Record, str]]:
    for _, record in read_records(find_file(root, f"aokvqa_v1p0_{split}.json")):
        if "image" in record:
            name = record.text("image")
        else:
            name = f"{record.integer('image_id'):012d}.jpg"
        yield record, place(root, name, record.where, f"{split}2017", *COCO_FOLDERS)
