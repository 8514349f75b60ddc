"""Dialogues of custom data -> one example for each answer, with the turns before it.

Other trainers write a dialogue in one of these forms::

    {"conversations": [{"from": "human", "value": "<image>What?"}, {"from": "gpt", "value": ...}]}
    {"messages": [{"role": "user", "content": text or parts}, {"role": "assistant", ...}]}
    {"conversation": [{"input": ..., "output": ...}]}      also {"human": ..., "assistant": ...}
    {"query": ..., "response": ..., "history": [[question, answer]]}      also Alpaca's names

with ``system`` or ``system_prompt``, and ``image``, ``images``, ``video`` or ``videos`` beside it.
An answer sees the images up to its own place: each ``<image>`` or ``<video>`` in a text stands for
the next one of the record, parts and ``<img>path</img>`` name theirs. Without a mark all images
stand in front. Texts keep an ``<image>`` for each image (frame of a video), except where all those
of the first question are at its beginning, or on lines at its end: these images are in front too.
An image in an answer or a system text belongs to the end of the question before, or to the next.

A dialogue of one answer has the task "vqa" where it is short, as a question in a table; longer
answers, answers to an instruction or a query, and all of longer dialogues or of those with a system
text have "instruct".
"""

import re
from collections.abc import Iterator
from pathlib import Path

from instructblip.core.example import IMAGE_MARK, Example
from instructblip.data.custom.rows import (
    REMEDY,
    ROLES,
    CustomSet,
    asked_task,
    extra_of,
    images_of,
    rejected_of,
)
from instructblip.data.reading.records import Record
from instructblip.data.templates import without_front_marks

SPEAKERS = {
    "human": "question",
    "user": "question",
    "gpt": "answer",
    "assistant": "answer",
    "system": "context",
}
QUESTIONS = ("instruction", "query", "human", "input")
"""Fields of a question and answer in one object; Alpaca's ``input`` follows its ``instruction``."""
ANSWERS = ("response", "output", "assistant")
CONTEXTS = ("system", "system_prompt")
UNREAD = ("<audio>", "<bbox>", "<ref-object>")
"""Marks of other trainers for what no image shows."""
_MARK = re.compile(
    r"(?:Picture \d+: *)?<img>(?P<path>.*?)</img>\n?"
    r"|<(?P<kind>image|video)>|(?P<unnumbered><(?:IMG|VIDEO)_CONTEXT>)",
    re.DOTALL,
)

_BEFORE_STOP = re.compile(rf"{IMAGE_MARK} (?=[,.;:?!)])")

Shown = list[str | tuple[str, ...]]
"""What a turn shows, in order: paths, or "image" or "video" for the next one of the record."""


def dialogue(
    custom: CustomSet, image_root: Path, split: str, key: str, record: Record
) -> Iterator[Example]:
    """One example for each answer; it has no image where none stands before the answer."""
    identifier = record.identifier("id", key)
    turns = _turns(record)
    contents = [_content(image_root, turn) for turn in turns]
    images, waiting = _images(image_root, record, [shown for _, shown in contents])
    context, question, marks = "", None, ""
    history: list[tuple[str, str]] = []
    for i, (turn, (content, shown)) in enumerate(zip(turns, contents, strict=True)):
        marked, *pieces = content.split(IMAGE_MARK)
        for item, piece in zip(shown, pieces, strict=True):
            if isinstance(item, str):
                item = waiting[item].pop(0) if waiting[item] else ()
            images += item
            marked += IMAGE_MARK * len(item) + piece
        text = marked
        if shown:
            marked, text = marked.strip(), marked.replace(IMAGE_MARK, "").strip()
        role = "role" if "role" in turn else "from"
        speaker = SPEAKERS.get(turn.text(role))
        if speaker is None:
            turn.fail(role, f"one of {', '.join(SPEAKERS)}")
        if speaker == "context":
            context, marks = text, marks + IMAGE_MARK * marked.count(IMAGE_MARK)
        elif speaker == "question":
            if question is not None:
                turn.fail(role, "an answer to the turn before")
            question, marks = marks + marked, ""
            if not history:
                question = without_front_marks(question)
        else:
            if question is None:
                turn.fail(role, "a question before the answer")
            question += IMAGE_MARK * marked.count(IMAGE_MARK)
            answers = (text,) if text else ()
            last = i == len(turns) - 1
            alone = not history and not context and last
            asks = alone and _field(record) not in ROLES["question"]
            if last or "rejected" not in record:  # of preference data only the last answer
                yield Example(
                    dataset=custom.name,
                    split=split,
                    id=f"{identifier}_{i}",
                    images=tuple(images),
                    task=custom.task or (asked_task(answers) if asks else "instruct"),
                    question=question,
                    answers=answers,
                    context=context,
                    history=tuple(history),
                    where=turn.where,
                    extra=(extra_of(custom, record, tuple(images)) if images else {})
                    | ({"system": True} if context else {})
                    | rejected_of(record),
                )
            history.append((question, text))
            question = None
    if question is not None or not history:
        record.fail(_field(record), "turns that end with an answer")


def _field(record: Record) -> str:
    names = ("conversations", "messages", "conversation", *QUESTIONS)
    return next((name for name in names if name in record), "messages")


def _turns(record: Record) -> list[Record]:
    """The turns of a record in the form of ``conversations`` or ``messages``."""
    field = _field(record)
    system = next((record.text(name) for name in CONTEXTS if name in record), "")
    turns = [Record({"role": "system", "content": system}, record.where)] if system else []
    if field in ("conversations", "messages"):
        return turns + record.records(field)
    pairs = [*_history(record), record] if field in QUESTIONS else record.records(field)
    for pair in pairs:
        answer = next((name for name in ANSWERS if name in pair), ANSWERS[0])
        asked = [pair.text(name) for name in QUESTIONS if name in pair]
        texts = {"user": "\n".join(filter(None, asked)), "assistant": pair.text(answer)}
        if pair is not record and "system" in pair:
            texts = {"system": pair.text("system")} | texts
        turns += [
            Record({"role": role, "content": text}, pair.where, REMEDY)
            for role, text in texts.items()
        ]
    return turns


def _history(record: Record) -> list[Record]:
    """The turns before a ``query``, as records of the same form."""
    pairs = record.data.get("history") or []
    if not isinstance(pairs, list) or not all(
        isinstance(pair, list | tuple) and len(pair) == 2 for pair in pairs
    ):
        record.fail("history", "a list of [question, answer]")
    return [
        Record({"query": question, "response": answer}, f"{record.where}, history {i}", REMEDY)
        for i, (question, answer) in enumerate(pairs)
    ]


def _images(
    image_root: Path, record: Record, shown: list[Shown]
) -> tuple[list[str], dict[str, list[tuple[str, ...]]]]:
    """The images that stand in front, and by kind those that wait for their marks."""
    front: list[str] = []
    waiting: dict[str, list[tuple[str, ...]]] = {}
    for name in ("audio", "audios"):
        if record.data.get(name):
            record.fail(name, "no audio, which is not read")
    inline = any(not isinstance(item, str) for items in shown for item in items)
    for kind in ("image", "video"):
        given = [
            images_of(image_root, value, record.where)
            for name in (kind, f"{kind}s")
            if name in record
            for value in _listed(record.data[name])
        ]
        marks = sum(items.count(kind) for items in shown)
        if marks and marks != len(given) and (given or not inline):
            raise ValueError(
                f"{record.where}: the texts have {marks} <{kind}> and the record has {len(given)} "
                f"{kind}s; expected one for each, or no <{kind}>. {REMEDY}"
            )
        waiting[kind] = given if marks else []
        front += [] if marks else [image for images in given for image in images]
    return front, waiting


def _listed(value: object) -> list[object]:
    return list(value) if isinstance(value, list | tuple) else [value]


def _content(image_root: Path, turn: Record) -> tuple[str, Shown]:
    """The text of a turn with an ``IMAGE_MARK`` for each item that it shows, and these."""
    field = "content" if "content" in turn else "value"
    if not isinstance(turn.data.get(field), list):
        return _text(image_root, turn, field)
    texts: list[str] = []
    shown: Shown = []
    for part in turn.records(field):
        kind = part.text("type")
        medium = kind.removesuffix("_url")
        if kind == "text":
            text, more = _text(image_root, part, "text" if "text" in part else "value")
            texts.append(text)
            shown += more
        elif medium in ("image", "video"):
            names = (kind, "value", "url", "path")
            value = next((part.data[name] for name in names if name in part), None)
            if isinstance(value, dict) and "url" in value:
                value = value["url"]
            shown.append(medium if value is None else images_of(image_root, value, part.where))
            texts.append(IMAGE_MARK)
        else:
            part.fail("type", "'text', 'image_url', 'image', 'video_url' or 'video'")
    return _join(texts), shown


def _join(texts: list[str]) -> str:
    """The texts and marks of a content in parts, with spaces between them. Marks at its end are on
    lines, so that those of a first question are in front."""
    last = len(texts)
    while last and texts[last - 1] == IMAGE_MARK:
        last -= 1
    joined = _BEFORE_STOP.sub(IMAGE_MARK, " ".join(texts[:last]))
    return "\n".join([joined, *texts[last:]]) if last else "".join(texts)


def _text(image_root: Path, record: Record, field: str) -> tuple[str, Shown]:
    """A text with an ``IMAGE_MARK`` for each item that it shows, and these."""
    text = record.text(field)
    if "<" not in text:
        return text, []
    if any(mark in text for mark in UNREAD):
        record.fail(field, f"a text without {', '.join(UNREAD)}, which are not read")
    shown: Shown = []
    for mark in _MARK.finditer(text):
        if mark["path"] is not None:
            shown.append(images_of(image_root, mark["path"], record.where))
        elif mark["kind"]:
            shown.append(mark["kind"])
    marked = _MARK.sub(lambda mark: "" if mark["unnumbered"] else IMAGE_MARK, text)
    return marked.strip(), shown
