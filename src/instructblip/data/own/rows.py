"""A row of one's own table -> an example: which columns mean what, and when that is unclear."""

import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from instructblip.core.batch import Example
from instructblip.data.own.files import (
    OWN_REMEDY,
    ROLES,
    Own,
    images_of,
    spelt,
)
from instructblip.data.reading.records import Record

_ASKING = ("?", "？", "=", "＝", ":", "：")
_BASE64 = re.compile(r"[\w+/-]{12,}={1,2}", re.ASCII)
"""An identifier or a digest: its last signs ask for nothing."""

Row = tuple[str, Record, str]
"""Its key, its columns, and the folder that its pictures are relative to, below their root."""


def examples_of(
    own: Own, root: Path, split: str, rows: Iterable[Row]
) -> Iterator[Example | ValueError]:
    """The example of each row, or what is wrong with the row or, at the end, with all of them."""
    absent, present, digits = dict(own.columns), {}, _Digits()
    for key, row, inside in rows:
        record = replace(row, remedy=OWN_REMEDY)
        if absent:
            present |= dict.fromkeys(record.data)
            absent = {r: name for r, name in absent.items() if spelt(name, record) is None}
        try:
            yield _example(own, root, split, key, record, inside, digits)
        except ValueError as error:
            yield error
    if absent and present:
        yield ValueError(
            f"{own.name}: no row of {own.path or split} has the columns "
            f"{', '.join(map(repr, absent.values()))} that `columns` names; it has "
            f"{', '.join(map(repr, list(present)[:20]))}"
        )


def _example(
    own: Own, root: Path, split: str, key: str, record: Record, inside: str, digits: "_Digits"
) -> Example:
    """An example of a row; which columns mean what is the recipe's to say."""
    asked, image = own.column("question", record), own.column("image", record)
    if image not in record:
        named = "beside this file" if inside else "(see `columns` of the recipe)"
        record.fail("file_name" if inside else image, f"the path of a picture {named}")
    question = _one(record, asked)
    offered = own.column("choices", record)
    choices = _many(record, offered, split_at="|")
    answers = _answers(record, own.column("answer", record), offered, choices, digits)
    of_question = "instruct" if asked.strip().casefold() == "instruction" else "vqa"
    guess = "multiple_choice" if choices else of_question if question else "caption"
    if guess == "caption" and not own.task and answers:
        _refuse_unread(own, record)
    return Example(
        dataset=own.name,
        split=split,
        id=_one(record, own.column("id", record)) or key,
        images=images_of(own, root, record.data[image], record.where, inside),
        task=own.task or guess,
        question=question,
        answers=answers,
        choices=choices,
        context=_one(record, own.column("context", record)),
        ocr_tokens=_many(record, own.column("ocr_tokens", record), split_at="|"),
        where=record.where,
    )


def _refuse_unread(own: Own, record: Record) -> None:
    """ValueError for an answer that would be learnt as a caption while a text beside it, perhaps
    its question, is read by nobody."""
    roles = {role: own.column(role, record) for role in ROLES}
    told = roles["answer"]
    asked = any(spelt(name, record) for name in (roles["question"], *ROLES["question"]))
    if asked or told.strip().casefold() in ROLES["answer"]:
        return
    for column, value in record.data.items():
        if column in roles.values() or column in ROLES["image"]:
            continue
        if isinstance(value, str) and _may_ask(value):
            raise ValueError(
                f"{record.where}: {told!r} would be learnt as a caption, and nothing reads column "
                f"{column[:80]!r}. If that is the question, call it `question`, or say so in the "
                f"recipe (`columns: {{question: {column[:80]}}}`); if it is none, call {told!r} "
                "`caption`, or set `task: caption`"
            )


def _may_ask(text: str) -> bool:
    """Whether a text could be a question, rather than an address, numbers or one word."""
    if "://" in text or _BASE64.fullmatch(text):
        return False
    if text.rstrip().endswith(_ASKING):
        return True
    words = not text.isascii() or len(text.split()) > 1
    return words and any(map(str.isalpha, text))


@dataclass(slots=True)
class _Digits:
    """What answers in digits mean: the row of the first that is an index, and of the first that
    could be one but is taken for the choice itself. Data with both is ambiguous."""

    rows: dict[str, str] = field(default_factory=dict)

    def note(self, meaning: str, other: str, record: Record, column: str) -> None:
        self.rows.setdefault(meaning, record.where)
        if other in self.rows:
            got = repr(record.data[column])[:80]
            raise ValueError(
                f"{record.where}: field '{column}' is {got}, {meaning}, but "
                f"digits are {other} in {self.rows[other]}; write the choice itself in every row"
            )


def _answers(
    record: Record, told: str, offered: str, choices: tuple[str, ...], digits: _Digits
) -> tuple[str, ...]:
    """The answers; where there are choices each is one of them, or its index counted from 0.

    A number beside choices that are texts is an index. Other digits are the choice that reads like
    them, else an index; ValueError for data that has both.
    """
    answers = _many(record, told)
    if not choices:
        return answers
    as_written = record.data.get(told)
    as_written = as_written if isinstance(as_written, list) else [as_written]
    of_texts = record.data[offered]
    of_texts = not isinstance(of_texts, list) or all(isinstance(one, str) for one in of_texts)
    found = []
    for answer, written in zip(answers, as_written, strict=False):
        index = int(answer) if answer.isdecimal() and len(answer) < 9 else len(choices)
        named = choices[index] if index < len(choices) else None
        counted = of_texts and isinstance(written, int)
        if answer in choices and not counted:
            if named not in (None, answer):
                digits.note("the choice itself", "an index", record, told)
            named = answer
        elif named is not None and not counted:
            digits.note("an index", "the choice itself", record, told)
        if named is None:
            record.fail(told, f"one of the choices, or an index from 0 to {len(choices) - 1}")
        found.append(named)
    return tuple(found)


def _one(record: Record, column: str) -> str:
    if column not in record:
        return ""
    return record.text(column) if isinstance(record.data[column], str) else _number(record, column)


def _many(record: Record, column: str, split_at: str = "") -> tuple[str, ...]:
    """A list; one text or number; or, in a table of plain text, parts between bars."""
    if column not in record:
        return ()
    value = record.data[column]
    if isinstance(value, list):
        return record.texts(column)
    text = _one(record, column)
    parts = text.split(split_at) if split_at else [text]
    return tuple(part.strip() for part in parts if part.strip())


def _number(record: Record, column: str) -> str:
    value = record.data[column]
    if isinstance(value, float) and math.isfinite(value):
        return str(value)
    return record.identifier(column)
