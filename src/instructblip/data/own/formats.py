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

import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from instructblip.core.batch import Example
from instructblip.data.own.dialogues import conversations
from instructblip.data.own.files import (
    ROLES,
    TABLES,
    Own,
    below_root,
    files_of,
    keep_picture,
    records_of,
)
from instructblip.data.own.rows import Row, examples_of
from instructblip.data.reading.opened import note_file
from instructblip.data.reading.records import (
    PICTURES,
    Record,
    Source,
    list_folder,
    not_utf8,
    walk_files,
)
from instructblip.data.reading.shards import read_saved, read_shard


def own_source(own: Own) -> Source:
    """The source of an entry; ValueError for an unknown format or role."""
    if own.format not in FORMATS:
        raise ValueError(f"format '{own.format}'; expected one of {', '.join(FORMATS)}")
    if unknown := [role for role, _ in own.columns if role not in ROLES]:
        raise ValueError(f"{own.name}: columns {unknown}; expected some of {', '.join(ROLES)}")
    files = own.path or f"the files of a {own.format}"
    read = FORMATS[own.format]
    if read is not conversations:
        read = partial(examples, read)
    return Source(partial(read, own), own.task or "", "your own", files, own.images, repr(own))


def table(own: Own, root: Path, split: str) -> Iterator[Row]:
    """The rows of the files."""
    for path in files_of(own, root, split, TABLES):
        for key, record in records_of(path):
            yield key, record, ""


def imagefolder(own: Own, root: Path, split: str) -> Iterator[Row]:
    """Below ``root/<split>`` or ``root/images/<split>`` if there is such a folder, else below
    ``root``: the rows of tables, and captions where no table is in the folder or in one above it.
    Where there are tables, a picture that none of them covers counts only with a caption."""
    base = root / own.images
    folder = _folder_of(base, split)
    note_file(folder)
    paths = walk_files(folder)
    listed = [path for path in paths if is_metadata(path)]
    tables = {path.parent: path for path in listed}
    if len(tables) < len(listed):
        raise ValueError(f"{', '.join(map(str, listed))}: expected one in a folder; remove others")
    for inside, path in tables.items():
        for key, record in records_of(path):
            yield key, record, inside.relative_to(base).as_posix()
    free = [path for path in paths if tables.keys().isdisjoint(path.parents)]
    texts = {path.with_suffix(""): path for path in free if path.suffix.lower() == ".txt"}
    pictures = [path for path in free if path.suffix.lower() in PICTURES]
    _tell_unread(folder, texts, {path.with_suffix("") for path in pictures})
    for path in pictures:
        inside, name = path.parent.relative_to(base).as_posix(), path.relative_to(base)
        beside = texts.get(path.with_suffix(""))
        if tables and beside is None:
            continue
        captions = _lines(_text_of(beside)) if beside else ()
        yield str(name), _captioned(own, (path.name,), captions, str(name)), inside


def is_metadata(path: Path) -> bool:
    """Whether a file is the table of an imagefolder."""
    return path.stem.lower() == "metadata" and path.suffix.lower() in TABLES


def _tell_unread(folder: Path, texts: dict[Path, Path], pictured: set[Path]) -> None:
    """Warn of texts without a picture of the same name, which may be there in another format."""
    alone = [str(path.relative_to(folder)) for name, path in texts.items() if name not in pictured]
    if alone:
        warnings.warn(
            f"{folder}: {len(alone)} .txt files have no picture of that name beside them that can "
            f"be read, and are passed over: {', '.join(alone[:5])}; if they are captions, save "
            "their pictures as .png or .jpg",
            stacklevel=2,
        )


def _folder_of(base: Path, split: str) -> Path:
    """Where the pictures of a split lie; a table in ``base`` itself speaks for all below it."""
    tabled = base.is_dir() and any(map(is_metadata, list_folder(base)))
    below = [base / split, *([] if tabled else [base / "images" / split])]
    return next((folder for folder in below if folder.is_dir()), base)


def hf_dataset(own: Own, root: Path, split: str) -> Iterator[Row]:
    """The split of that name in a saved ``DatasetDict``, or a saved ``Dataset``."""
    folder = root / below_root(own.path or ".")
    note_file(folder)
    for i, record in enumerate(read_saved(folder, split)):
        yield str(i), record, ""


def webdataset(own: Own, root: Path, split: str) -> Iterator[Row]:
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
            yield key, record, ""


def _captioned(own: Own, images: tuple[str, ...], captions: tuple[str, ...], where: str) -> Record:
    """A row of a picture with its captions, under the names that the entry gives the columns."""
    columns = dict(own.columns)
    image, answer = columns.get("image", "image"), columns.get("answer", "answer")
    return Record({image: list(images), answer: list(captions)}, where)


def examples(
    read: Callable[[Own, Path, str], Iterator[Row]], own: Own, root: Path, split: str
) -> Iterator[Example]:
    """The example of each row that ``read`` yields; ValueError at the first that is none."""
    for found in examples_of(own, root, split, read(own, root, split)):
        if isinstance(found, ValueError):
            raise found
        yield found


def folder_examples(own: Own, root: Path, split: str) -> Iterator[Example | ValueError]:
    """The example of each row of an imagefolder, or what is wrong with the row."""
    yield from examples_of(own, root, split, imagefolder(own, root, split))


def _text_of(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path.name} {not_utf8(path, error)}") from None


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
