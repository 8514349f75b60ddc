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
from typing import Any

from instructblip.core.example import Example
from instructblip.data.custom.dialogues import SPEAKERS
from instructblip.data.reading.records import Record, image_name, read_records, read_texts
from instructblip.data.sources.split import COCO_FOLDERS, Split


def visual_dialog(split: Split) -> Iterator[Example]:
    """``visdial_1.0_{split}.json``, and ``visdial_1.0_{split}_dense_annotations.json`` if there.

    ``{"data": {"questions": ["is it sunny", ...], "answers": ["yes", ...], "dialogs":
    [{"image_id": 185565, "caption": "a horse on a beach", "dialog": [{"question": 0,
    "answer": 0, "answer_options": [3, 0, ...], "gt_index": 1}]}]}}``, where numbers are indices
    into ``questions`` and ``answers``. Dense: ``[{"image_id", "round_id": 1, "gt_relevance":
    [...]}]``.

    The caption is the context, the options are the choices; training examples carry no choices
    (100 texts a round). A round without an answer (the last of a test dialogue) has no answers.
    """
    path = split.find(f"visdial_1.0_{split.name}.json")
    questions = read_texts(path, "data", "questions")
    answers = read_texts(path, "data", "answers")
    relevance = _read_relevance(split)
    for _, dialogue in read_records(path, "data", "dialogs"):
        image_id = dialogue.integer("image_id")
        image = _image(split, image_id, dialogue.where)
        history: list[tuple[str, str]] = []
        for i, turn in enumerate(dialogue.records("dialog"), start=1):
            if "question" not in turn:
                break  # the test file pads its dialogues with empty rounds
            question = turn.pick("question", questions)
            answer = turn.pick("answer", answers) if "answer" in turn else ""
            if split.name != "test" or "answer_options" in turn:
                yield split.example(
                    turn.where,
                    f"{image_id}_{i}",
                    image,
                    question=question,
                    answers=(answer,) if answer else (),
                    choices=() if split.name == "train" else _options(turn, answers),
                    context=dialogue.text("caption", ""),
                    history=tuple(history),
                    extra=_extra(turn, relevance.get((image_id, i))),
                )
            history.append((question, answer))


def _image(split: Split, image_id: int, where: str) -> str:
    if split.name != "train":
        folder = f"VisualDialog_{split.name}2018"
        return split.image(f"{folder}_{image_id:012d}.jpg", where, folder)
    # Train images come from both halves of COCO 2014, and the file does not say which.
    for part in ("train2014", "val2014"):
        name = f"COCO_{part}_{image_id:012d}.jpg"
        for candidate in (f"{part}/{name}", name):
            if (split.root / "images" / candidate).exists():
                return image_name(candidate, where)
    return split.image(f"COCO_train2014_{image_id:012d}.jpg", where, "train2014")


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


def _read_relevance(split: Split) -> dict[tuple[int, int], list[float]]:
    """Relevance of the options by image and round; empty without the file."""
    path = split.find_optional(f"visdial_1.0_{split.name}_dense_annotations.json")
    return {
        (record.integer("image_id"), record.integer("round_id")): record.numbers("gt_relevance")
        for _, record in (read_records(path) if path else ())
    }


def llava(train: str, split: Split) -> Iterator[Example]:
    """One part of LLaVA-Instruct: ``<train>``, and ``<part>_{split}.json`` for other splits."""
    part = train.rpartition("_")[0]
    path = split.find(train if split.name == "train" else f"{part}_{split.name}.json")
    for _, record in read_records(path):
        image = split.image(record.text("image"), record.where, "train2017", *COCO_FOLDERS)
        history: list[tuple[str, str]] = []
        for i, (question, answer) in enumerate(_pairs(record)):
            yield split.example(
                f"{record.where}, turn {i}",
                f"{record.identifier('id')}_{i}",
                image,
                question=question,
                answers=(answer,) if answer else (),
                history=tuple(history),
            )
            history.append((question, answer))


def _pairs(record: Record) -> Iterator[tuple[str, str]]:
    """(question, answer) of a conversation that starts with the human and alternates."""
    turns = record.records("conversations")
    for question, answer in zip(turns[::2], turns[1::2], strict=False):
        if SPEAKERS.get(question.text("from")) != "question":
            question.fail("from", "'human' (turns alternate, the human begins)")
        if SPEAKERS.get(answer.text("from")) != "answer":
            answer.fail("from", "'gpt' (turns alternate, the human begins)")
        yield question.text("value").replace("<image>", "").strip(), answer.text("value")
    if len(turns) % 2:
        turns[-1].fail("from", "an answer after the last question")
