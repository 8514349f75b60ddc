"""Dialogues of one's own: LLaVA, ShareGPT and OpenAI messages. One example for each answer."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from instructblip.core.batch import Example
from instructblip.data.own.files import (
    OWN_REMEDY,
    Own,
    files_of,
    images_of,
    records_of,
)
from instructblip.data.reading.records import Record

SPEAKERS = {
    "human": "question",
    "user": "question",
    "gpt": "answer",
    "assistant": "answer",
    "system": "context",
}


def conversations(own: Own, root: Path, split: str) -> Iterator[Example]:
    """One example for each answer of a dialogue: LLaVA, ShareGPT and OpenAI messages."""
    for path in files_of(own, root, split, (".json", ".jsonl")):
        for key, record in records_of(path):
            yield from _dialogue(own, root, split, key, replace(record, remedy=OWN_REMEDY))


def _dialogue(own: Own, root: Path, split: str, key: str, record: Record) -> Iterator[Example]:
    field = "conversations" if "conversations" in record else "messages"
    identifier = record.identifier("id") if "id" in record else key
    images = [record.data[name] for name in ("image", "images") if name in record]
    found = [name for value in images for name in images_of(own, root, value, record.where)]
    context, asked = "", ""
    history: list[tuple[str, str]] = []
    for i, turn in enumerate(record.records(field)):
        speaker, text, more = _turn(own, root, turn)
        found.extend(more)
        if speaker == "context":
            context = text
        elif speaker == "question":
            if asked:
                turn.fail("role" if "role" in turn else "from", "an answer to the turn before")
            asked = text or " "
        else:
            if not asked:
                turn.fail("role" if "role" in turn else "from", "a question before the answer")
            yield Example(
                dataset=own.name,
                split=split,
                id=f"{identifier}_{i}",
                images=tuple(found),
                task=own.task or "instruct",
                question=asked.strip(),
                answers=(text,) if text else (),
                context=context,
                history=tuple(history),
                where=turn.where,
            )
            history.append((asked.strip(), text))
            asked = ""
    if asked or not history:
        record.fail(field, "turns that end with an answer")


def _turn(own: Own, root: Path, turn: Record) -> tuple[str, str, list[str]]:
    """(question, answer or context; its text; its pictures)."""
    role = "role" if "role" in turn else "from"
    speaker = SPEAKERS.get(turn.text(role))
    if speaker is None:
        turn.fail(role, f"one of {', '.join(SPEAKERS)}")
    field = "content" if "content" in turn else "value"
    if not isinstance(turn.data.get(field), list):
        return speaker, turn.text(field).replace("<image>", "").strip(), []
    texts, images = [], []
    for part in turn.records(field):
        kind = part.text("type")
        if kind == "text":
            texts.append(part.text("text"))
        elif kind in ("image_url", "image"):
            value = part.data.get(kind)
            value = value.get("url") if isinstance(value, dict) else value
            images.extend(images_of(own, root, value, part.where))
        else:
            part.fail("type", "'text', 'image_url' or 'image'")
    return speaker, " ".join(texts), images
