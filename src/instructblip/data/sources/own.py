"""Anybody's own data, described in the recipe: no code needed.

==============  ===========================================================================
llava_json      ``[{"id", "image", "conversations": [{"from": "human", "value": "..."}, ...]}]``
sharegpt        the same with ``"images": [...]``, or ``"messages": [{"role", "content"}]``
openai_messages lines of ``{"messages": [{"role", "content": text or parts}]}``; parts are
                ``{"type": "text", "text"}`` and ``{"type": "image_url", "image_url": {"url"}}``
table           .jsonl, .json, .csv, .tsv or .parquet with one example a row (``columns``)
imagefolder     pictures with ``metadata.csv`` / ``metadata.jsonl`` (column ``file_name``), or with
                a ``.txt`` of the same name: one caption a line
hf_dataset      a data set that Hugging Face ``datasets`` saved with ``save_to_disk`` (``columns``)
webdataset      .tar shards of ``key.jpg`` with ``key.txt`` (captions) or ``key.json`` (``columns``)
==============  ===========================================================================

Pictures that come inside a file are written to ``extracted/`` below the image root, under their
sha256. A dialogue gives one example for each answer, with the turns before it.
"""

import base64
import binascii
import hashlib
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

from instructblip.batch import Example
from instructblip.data.sources.opened import note_file
from instructblip.data.sources.records import (
    PICTURES,
    Record,
    Source,
    image_name,
    read_lines,
    read_records,
    read_table,
)
from instructblip.data.sources.shards import read_parquet, read_saved, read_shard

ROLES = ("id", "image", "question", "answer", "choices", "context", "ocr_tokens")
"""What a column can hold; ``columns`` of the recipe says which one does, where names differ."""
TABLES = (".jsonl", ".json", ".csv", ".tsv", ".parquet")
SPEAKERS = {
    "human": "question",
    "user": "question",
    "gpt": "answer",
    "assistant": "answer",
    "system": "context",
}


@dataclass(frozen=True, slots=True)
class Own:
    """One entry of the recipe: its name, its files, where their pictures are, what columns mean."""

    name: str
    format: str
    path: str | None = None
    images: str = "."
    columns: tuple[tuple[str, str], ...] = ()
    task: str | None = None

    def column(self, role: str) -> str:
        return dict(self.columns).get(role, role)


def own_source(own: Own) -> Source:
    """The source of an entry; ValueError for an unknown format or role."""
    if own.format not in FORMATS:
        raise ValueError(f"format '{own.format}'; expected one of {', '.join(FORMATS)}")
    if unknown := [role for role, _ in own.columns if role not in ROLES]:
        raise ValueError(f"{own.name}: columns {unknown}; expected some of {', '.join(ROLES)}")
    files = own.path or f"the files of a {own.format}"
    return Source(
        partial(FORMATS[own.format], own), own.task or "", "your own", files, own.images, repr(own)
    )


def conversations(own: Own, root: Path, split: str) -> Iterator[Example]:
    """One example for each answer of a dialogue: LLaVA, ShareGPT and OpenAI messages."""
    for path in _files(own, root, split, (".json", ".jsonl")):
        for key, record in _records(path):
            yield from _dialogue(own, root, split, key, record)


def table(own: Own, root: Path, split: str) -> Iterator[Example]:
    """One example a row."""
    for path in _files(own, root, split, TABLES):
        for key, record in _records(path):
            yield _row(own, root, split, key, record)


def imagefolder(own: Own, root: Path, split: str) -> Iterator[Example]:
    """Below ``root/<split>`` if there is such a folder, else below ``root``."""
    base = root / own.images
    folder = base / split if (base / split).is_dir() else base
    note_file(folder)
    listed = [f for f in sorted(folder.rglob("metadata.*")) if f.suffix in TABLES]
    for path in listed:
        for key, record in _records(path):
            name = (path.parent / record.text("file_name")).relative_to(base).as_posix()
            image_name(record.text("file_name"), record.where)
            caption = {} if "answer" in record else {own.column("answer"): record.data.get("text")}
            row = Record({**caption, **record.data, own.column("image"): name}, record.where)
            yield _row(own, root, split, key, row)
    if listed:
        return
    for path in sorted(folder.rglob("*")):
        if path.suffix.lower() in PICTURES:
            name = path.relative_to(base).as_posix()
            beside = path.with_suffix(".txt")
            yield _captioned(own, split, name, _captions(beside), name)


def hf_dataset(own: Own, root: Path, split: str) -> Iterator[Example]:
    """The split of that name in a saved ``DatasetDict``, or a saved ``Dataset``."""
    folder = root / _safe(own.path or ".")
    note_file(folder)
    for i, record in enumerate(read_saved(folder, split)):
        yield _row(own, root, split, str(i), record)


def webdataset(own: Own, root: Path, split: str) -> Iterator[Example]:
    """Every .tar that ``path`` names (``train-*.tar``)."""
    for path in _files(own, root, split, (".tar",)):
        note_file(path)
        for key, parts, where in read_shard(path):
            data = next((parts[e] for e in PICTURES if e in parts), None)
            image = (_keep(root / own.images, data),) if data is not None else ()
            if ".json" in parts:
                record = Record({**parts[".json"], own.column("image"): image}, where)
                yield _row(own, root, split, key, record)
            else:
                text = parts.get(".txt", "")
                captions = tuple(line.strip() for line in text.split("\n") if line.strip())
                yield _captioned(own, split, key, captions, where, image)


def _captioned(
    own: Own,
    split: str,
    key: str,
    captions: tuple[str, ...],
    where: str,
    images: tuple[str, ...] | None = None,
) -> Example:
    return Example(
        dataset=own.name,
        split=split,
        id=key,
        images=(key,) if images is None else images,
        task=own.task or "caption",
        answers=captions,
        where=where,
    )


def _row(own: Own, root: Path, split: str, key: str, record: Record) -> Example:
    """An example of a row; which columns mean what is the recipe's to say."""
    question = _one(record, own.column("question"))
    choices = _many(record, own.column("choices"), split_at="|")
    answers = _many(record, own.column("answer"))
    if choices and len(answers) == 1 and answers[0].isdecimal() and answers[0] not in choices:
        answers = (record.pick(own.column("answer"), choices),)
    guess = "multiple_choice" if choices else "vqa" if question else "caption"
    if own.column("image") not in record:
        record.fail(own.column("image"), "the path of a picture (see `columns` of the recipe)")
    return Example(
        dataset=own.name,
        split=split,
        id=_one(record, own.column("id")) or key,
        images=_images(own, root, record.data[own.column("image")], record.where),
        task=own.task or guess,
        question=question,
        answers=answers,
        choices=choices,
        context=_one(record, own.column("context")),
        ocr_tokens=_many(record, own.column("ocr_tokens"), split_at="|"),
        where=record.where,
    )


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


def _dialogue(own: Own, root: Path, split: str, key: str, record: Record) -> Iterator[Example]:
    field = "conversations" if "conversations" in record else "messages"
    identifier = record.identifier("id") if "id" in record else key
    images = [record.data[name] for name in ("image", "images") if name in record]
    found = [name for value in images for name in _images(own, root, value, record.where)]
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
            images.extend(_images(own, root, value, part.where))
        else:
            part.fail("type", "'text', 'image_url' or 'image'")
    return speaker, " ".join(texts), images


def _images(own: Own, root: Path, value: Any, where: str) -> tuple[str, ...]:
    """Paths below the image root, of one picture or of the frames of a video."""
    values = value if isinstance(value, list | tuple) else [value]
    return tuple(_image(root / own.images, one, where) for one in values)


def _image(image_root: Path, value: Any, where: str) -> str:
    if isinstance(value, dict) and isinstance(value.get("bytes"), bytes):
        return _keep(image_root, value["bytes"])
    if isinstance(value, dict):
        value = value.get("path")
    if not isinstance(value, str):
        raise ValueError(f"{where}: a picture is {repr(value)[:80]}; expected a path")
    if value.startswith("data:"):
        try:
            return _keep(image_root, base64.b64decode(value.partition(",")[2], validate=True))
        except binascii.Error:
            raise ValueError(f"{where}: the picture is not base64; repair the line") from None
    if "://" in value:
        raise ValueError(
            f"{where}: picture {value[:80]!r} is on the network; nothing is downloaded here: "
            "save it below the image root and write its path"
        )
    return image_name(value, where)


def _keep(image_root: Path, data: bytes) -> str:
    """Writes a picture that came inside a file, under its hash; gives its name."""
    digest = hashlib.sha256(data).hexdigest()
    name = f"extracted/{digest[:2]}/{digest}{_suffix(data)}"
    path = image_root / name
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(f".{os.getpid()}.tmp")
        temporary.write_bytes(data)
        temporary.replace(path)
    return name


def _suffix(data: bytes) -> str:
    if data.startswith(b"\x89PNG"):
        return ".png"
    return ".webp" if data[8:12] == b"WEBP" else ".gif" if data[:3] == b"GIF" else ".jpg"


def _captions(path: Path) -> tuple[str, ...]:
    if not path.is_file():
        return ()
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path.name} is not UTF-8 ({error.reason})") from None
    return tuple(line.strip() for line in text.split("\n") if line.strip())


def _files(own: Own, root: Path, split: str, suffixes: tuple[str, ...]) -> list[Path]:
    pattern = _safe(own.path or "*").replace("{split}", split)
    found = [p for p in sorted(root.glob(pattern)) if p.is_file() and p.suffix in suffixes]
    if not found:
        raise FileNotFoundError(
            f"{own.name}: no {' or '.join(suffixes)} file matches {pattern} in {root}; set `path` "
            "of the recipe's entry to the file, or to a pattern with * or {split}"
        )
    return found


def _safe(pattern: str) -> str:
    if PurePosixPath(pattern).is_absolute() or ".." in PurePosixPath(pattern).parts:
        raise ValueError(f"path {pattern!r} leaves the data root; expected a path below it")
    return pattern


def _records(path: Path) -> Iterator[tuple[str, Record]]:
    note_file(path)
    if path.suffix == ".json":
        yield from read_records(path)
        return
    if path.suffix == ".parquet":
        rows = read_parquet(path)
    elif path.suffix == ".jsonl":
        rows = read_lines(path)
    else:
        rows = read_table(path, "\t" if path.suffix == ".tsv" else ",")
    for i, record in enumerate(rows):
        yield str(i), record


FORMATS = {
    "llava_json": conversations,
    "sharegpt": conversations,
    "openai_messages": conversations,
    "table": table,
    "imagefolder": imagefolder,
    "hf_dataset": hf_dataset,
    "webdataset": webdataset,
}
