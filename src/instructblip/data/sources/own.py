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

import math
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from instructblip.batch import Example
from instructblip.data.sources.opened import note_file
from instructblip.data.sources.own_dialogues import conversations
from instructblip.data.sources.own_files import (
    ROLES,
    TABLES,
    Own,
    below_root,
    files_of,
    images_of,
    keep_picture,
    records_of,
)
from instructblip.data.sources.records import PICTURES, Record, Source, image_name, walk_files
from instructblip.data.sources.shards import read_saved, read_shard


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


def table(own: Own, root: Path, split: str) -> Iterator[Example]:
    """One example a row."""
    for path in files_of(own, root, split, TABLES):
        for key, record in records_of(path):
            yield example_of(own, root, split, key, record)


def imagefolder(own: Own, root: Path, split: str) -> Iterator[Example]:
    """Below ``root/<split>`` if there is such a folder, else below ``root``."""
    for found in folder_examples(own, root, split):
        if isinstance(found, ValueError):
            raise found
        yield found


def folder_examples(own: Own, root: Path, split: str) -> Iterator[Example | ValueError]:
    """The example of each row of an imagefolder, or what is wrong with the row."""
    base = root / own.images
    folder = base / split if (base / split).is_dir() else base
    note_file(folder)
    for key, record, inside in _folder_rows(own, base, folder):
        try:
            yield example_of(own, root, split, key, _placed(own, record, inside))
        except ValueError as error:
            yield error


def _folder_rows(own: Own, base: Path, folder: Path) -> Iterator[tuple[str, Record, str]]:
    """(key, row, folder below ``base`` that its picture is in): of the tables, else of captions."""
    paths = walk_files(folder)
    listed = [path for path in paths if path.stem == "metadata" and path.suffix in TABLES]
    tables = {path.parent: path for path in listed}
    if len(tables) < len(listed):
        raise ValueError(f"{', '.join(map(str, listed))}: expected one in a folder; remove others")
    for inside, path in tables.items():
        for key, record in records_of(path):
            yield key, record, inside.relative_to(base).as_posix()
    for path in () if tables else paths:
        if path.suffix.lower() in PICTURES:
            inside, name = path.parent.relative_to(base).as_posix(), path.relative_to(base)
            captions = _captions(path.with_suffix(".txt"))
            yield str(name), _captioned(own, (path.name,), captions, str(name)), inside


def _placed(own: Own, record: Record, inside: str) -> Record:
    """The row with the paths of its pictures below the image root, not beside the table."""
    column = own.column("image", record)
    if column not in record:
        record.fail("file_name", "the path of a picture beside this file")
    value = record.data[column]
    names = [
        image_name(str(v), record.where) for v in (value if isinstance(value, list) else [value])
    ]
    return Record({**record.data, column: [f"{inside}/{name}" for name in names]}, record.where)


def hf_dataset(own: Own, root: Path, split: str) -> Iterator[Example]:
    """The split of that name in a saved ``DatasetDict``, or a saved ``Dataset``."""
    folder = root / below_root(own.path or ".")
    note_file(folder)
    for i, record in enumerate(read_saved(folder, split)):
        yield example_of(own, root, split, str(i), record)


def webdataset(own: Own, root: Path, split: str) -> Iterator[Example]:
    """Every .tar that ``path`` names (``train-*.tar``)."""
    for path in files_of(own, root, split, (".tar",)):
        note_file(path)
        for key, parts, where in read_shard(path):
            data = next((parts[e] for e in PICTURES if e in parts), None)
            images = (keep_picture(root / own.images, data),) if data is not None else ()
            if ".json" in parts and ".txt" not in parts:
                column = dict(own.columns).get("image", "image")
                record = Record({**parts[".json"], column: images}, where)
            else:
                record = _captioned(own, images, _lines(parts.get(".txt", "")), where)
            yield example_of(own, root, split, key, record)


def _captioned(own: Own, images: tuple[str, ...], captions: tuple[str, ...], where: str) -> Record:
    """A row of a picture with its captions, under the names that the entry gives the columns."""
    columns = dict(own.columns)
    image, answer = columns.get("image", "image"), columns.get("answer", "answer")
    return Record({image: list(images), answer: list(captions)}, where)


def example_of(own: Own, root: Path, split: str, key: str, record: Record) -> Example:
    """An example of a row; which columns mean what is the recipe's to say."""
    asked, told = own.column("question", record), own.column("answer", record)
    image = own.column("image", record)
    if image not in record:
        record.fail(image, "the path of a picture (see `columns` of the recipe)")
    question = _one(record, asked)
    choices = _many(record, own.column("choices", record), split_at="|")
    answers = _many(record, told)
    if choices and len(answers) == 1 and answers[0].isdecimal() and answers[0] not in choices:
        answers = (record.pick(told, choices),)
    if choices and any(answer not in choices for answer in answers):
        record.fail(told, "one of the choices, or its index")
    guess = "multiple_choice" if choices else "vqa" if question else "caption"
    return Example(
        dataset=own.name,
        split=split,
        id=_one(record, own.column("id", record)) or key,
        images=images_of(own, root, record.data[image], record.where),
        task=own.task or ("instruct" if question and asked == "instruction" else guess),
        question=question,
        answers=answers,
        choices=choices,
        context=_one(record, own.column("context", record)),
        ocr_tokens=_many(record, own.column("ocr_tokens", record), split_at="|"),
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


def _captions(path: Path) -> tuple[str, ...]:
    if not path.is_file():
        return ()
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path.name} is not UTF-8 ({error.reason})") from None
    return _lines(text)


def _lines(text: str) -> tuple[str, ...]:
    return tuple(line.strip() for line in text.split("\n") if line.strip())


FORMATS = {
    "llava_json": conversations,
    "sharegpt": conversations,
    "openai_messages": conversations,
    "table": table,
    "imagefolder": imagefolder,
    "hf_dataset": hf_dataset,
    "webdataset": webdataset,
}
