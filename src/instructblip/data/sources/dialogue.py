"""Dialogues: Visual Dialog and LLaVA-Instruct-150K. One example per answer, with the turns before
it as history.

LLaVA-Instruct has three parts (conversation_58k, detail_23k, complex_reasoning_77k)::

    [{"id": "000000215677", "image": "000000215677.jpg",
      "conversations": [{"from": "human", "value": "<image>\\nWhat is shown?"},
                        {"from": "gpt", "value": "A street with two cars."}]}]

The owners publish a train split only; other splits are read from ``<part>_{split}.json``.
Answers are kept whole and as written.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from instructblip.core.batch import Example
from instructblip.data.custom.formats import SPEAKERS
from instructblip.data.reading.records import (
    Record,
    find_file,
    find_optional,
    image_name,
    place_image,
    read_records,
    read_texts,
)
from instructblip.data.sources.captions import COCO_FOLDERS


def visual_dialog(root: Path, split: str) -> Iterator[Example]:
    """``visdial_1.0_{split}.json``, and ``visdial_1.0_{split}_dense_annotations.json`` if there.

    ``{"data": {"questions": ["is it sunny", ...], "answers": ["yes", ...], "dialogs":
    [{"image_id": 185565, "caption": "a horse on a beach", "dialog": [{"question": 0,
    "answer": 0, "answer_options": [3, 0, ...], "gt_index": 1}]}]}}``, where numbers point into
    ``questions`` and ``answers``. Dense: ``[{"image_id", "round_id": 1, "gt_relevance": [...]}]``.

    The caption is the context, the options are the choices; training examples carry no choices
    (100 texts a round). A round without an answer (the last of a test dialogue) has no answers.
    """
    path = find_file(root, f"visdial_1.0_{split}.json")
    questions = read_texts(path, "data", "questions")
    answers = read_texts(path, "data", "answers")
    relevance = _read_relevance(root, split)
    for _, dialogue in read_records(path, "data", "dialogs"):
        image_id = dialogue.integer("image_id")
        image = _picture(root, image_id, split, dialogue.where)
        history: list[tuple[str, str]] = []
        for i, turn in enumerate(dialogue.records("dialog")):
            if "question" not in turn:
                break  # the test file pads its dialogues with empty rounds
            question = _entry(turn, "question", questions)
            answer = _entry(turn, "answer", answers) if "answer" in turn else ""
            if split != "test" or "answer_options" in turn:
                yield Example(
                    dataset="visual_dialog",
                    split=split,
                    id=f"{image_id}_{i + 1}",
                    images=(image,),
                    task="dialogue",
                    question=question,
                    answers=(answer,) if answer else (),
                    choices=() if split == "train" else _options(turn, answers),
                    context=dialogue.text("caption", ""),
                    history=tuple(history),
                    where=turn.where,
                    extra=_extra(turn, relevance.get((image_id, i + 1))),
                )
            history.append((question, answer))


def _picture(root: Path, image_id: int, split: str, where: str) -> str:
    if split != "train":
        folder = f"VisualDialog_{split}2018"
        return place_image(root, f"{folder}_{image_id:012d}.jpg", where, folder)
    # Train pictures come from both halves of COCO 2014, and the file does not say which.
    for part in ("train2014", "val2014"):
        name = f"COCO_{part}_{image_id:012d}.jpg"
        for candidate in (f"{part}/{name}", name):
            if (root / "images" / candidate).exists():
                return image_name(candidate, where)
    return place_image(root, f"COCO_train2014_{image_id:012d}.jpg", where, "train2014")


def _entry(turn: Record, name: str, texts: list[str]) -> str:
    index = turn.integer(name)
    if not 0 <= index < len(texts):
        turn.fail(name, f"an index below {len(texts)}")
    return texts[index]


def _options(turn: Record, answers: list[str]) -> tuple[str, ...]:
    if "answer_options" not in turn:
        return ()
    indices = turn.data["answer_options"]
    if not isinstance(indices, list):
        turn.fail("answer_options", "a list of indices into 'answers'")
    for index in indices:
        if not isinstance(index, int) or not 0 <= index < len(answers):
            turn.fail("answer_options", f"indices below {len(answers)}")
    return tuple(answers[index] for index in indices)


def _extra(turn: Record, relevance: list[float] | None) -> dict[str, Any]:
    extra: dict[str, Any] = {}
    if "gt_index" in turn:
        extra["gt_index"] = turn.integer("gt_index")
    if relevance is not None:
        extra["gt_relevance"] = relevance
    return extra


def _read_relevance(root: Path, split: str) -> dict[tuple[int, int], list[float]]:
    path = find_optional(root, f"visdial_1.0_{split}_dense_annotations.json")
    if path is None:
        return {}
    found = {}
    for _, record in read_records(path):
        place_in_file = (record.integer("image_id"), record.integer("round_id"))
        found[place_in_file] = record.numbers("gt_relevance")
    return found


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
        image = place_image(root, record.text("image"), record.where, "train2017", *COCO_FOLDERS)
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
