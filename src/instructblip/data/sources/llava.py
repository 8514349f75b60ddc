"""LLaVA-Instruct-150K in its three parts: one example per answer turn, with the turns before it.

``conversation_58k.json``, ``detail_23k.json``, ``complex_reasoning_77k.json``::

    [{"id": "000000215677", "image": "000000215677.jpg",
      "conversations": [{"from": "human", "value": "<image>\\nWhat is shown?"},
                        {"from": "gpt", "value": "A street with two cars."}]}]

The owners publish a train split only; other splits are read from ``<part>_{split}.json``.
Answers are kept whole and as written.
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

SPEAKERS = {"human": "question", "user": "question", "gpt": "answer", "assistant": "answer"}


def llava_conversation(root: Path, split: str) -> Iterator[Example]:
    """``conversation_58k.json``."""
    yield from _turns(root, split, "llava_conversation", "conversation_58k.json", "conversation")


def llava_detail(root: Path, split: str) -> Iterator[Example]:
    """``detail_23k.json``."""
    yield from _turns(root, split, "llava_detail", "detail_23k.json", "detail")


def llava_reasoning(root: Path, split: str) -> Iterator[Example]:
    """``complex_reasoning_77k.json``."""
    name = "complex_reasoning_77k.json"
    yield from _turns(root, split, "llava_reasoning", name, "complex_reasoning")


def _turns(root: Path, split: str, dataset: str, train: str, part: str) -> Iterator[Example]:
    path = find_file(root, train if split == "train" else f"{part}_{split}.json")
    for _, record in read_records(path):
        image = place(root, record.text("image"), record.where, "train2017", *COCO_FOLDERS)
        history: list[tuple[str, str]] = []
        for i, (question, answer) in enumerate(_pairs(record)):
            yield Example(
                dataset=dataset,
                split=split,
                id=f"{record.identifier('id')}_{i}",
                images=(image,),
                task="instruct",
                question=question,
                answers=(answer,) if answer else (),
                history=tuple(history),
                where=f"{record.where}, turn {i}",
            )
            history.append((question, answer))


def _pairs(record: Record) -> Iterator[tuple[str, str]]:
    """(question, answer) of a conversation that starts with the human and alternates."""
    turns = record.records("conversations")
    for i in range(0, len(turns) - 1, 2):
        asked, told = turns[i], turns[i + 1]
        if SPEAKERS.get(asked.text("from")) != "question":
            asked.fail("from", "'human' (turns alternate, the human begins)")
        if SPEAKERS.get(told.text("from")) != "answer":
            told.fail("from", "'gpt' (turns alternate, the human begins)")
        yield asked.text("value").replace("<image>", "").strip(), told.text("value")
    if len(turns) % 2:
        turns[-1].fail("from", "an answer after the last question")
