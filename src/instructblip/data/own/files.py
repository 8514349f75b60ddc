"""What the readers of one's own data share: the entry of the recipe, its files, its pictures."""

import base64
import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from instructblip.data.reading.opened import note_file
from instructblip.data.reading.records import (
    Record,
    image_name,
    matching_files,
    read_lines,
    read_records,
    read_table,
)
from instructblip.data.reading.shards import read_parquet

ROLES: dict[str, tuple[str, ...]] = {
    "id": (),
    "image": ("file_name",),
    "question": ("instruction",),
    "answer": ("caption", "text"),
    "choices": (),
    "context": (),
    "ocr_tokens": (),
}
"""What a column can hold, and under which other names it is looked for."""
OWN_REMEDY = "Repair the row, or the entry of the recipe that says how it is read"
"""For records of one's own files."""
TABLES = (".jsonl", ".json", ".csv", ".tsv", ".parquet")


@dataclass(frozen=True, slots=True)
class Own:
    """One entry of the recipe: its name, its files, where their pictures are, what columns mean."""

    name: str
    format: str
    path: str | None = None
    images: str = "."
    columns: tuple[tuple[str, str], ...] = ()
    task: str | None = None

    def column(self, role: str, record: Record) -> str:
        """The column of a role: the recipe's, else the first usual one that holds something.

        An answer to a question is never taken from a caption beside an empty ``answer``. Case and
        the white space around a heading do not count.
        """
        named = dict(self.columns).get(role)
        usual = (named,) if named else (role, *ROLES[role])
        found = [column for name in usual if (column := spelt(name, record)) is not None]
        if (
            role == "answer"
            and spelt(role, record)
            and holds(record, self.column("question", record))
        ):
            found = found[:1]
        return next((column for column in found if holds(record, column)), usual[0])


def spelt(name: str, record: Record) -> str | None:
    """How a row spells the column ``name``; None without it, ValueError for two such columns."""
    if name in record.data:
        return name
    found = [column for column in record.data if _plain(column) == _plain(name)]
    if len(found) > 1:
        raise ValueError(f"{record.where}: columns {found} have one name; rename all but one")
    return found[0] if found else None


def holds(record: Record, column: str) -> bool:
    """Whether a column is there and not empty. 0 and False are values."""
    value = record.data.get(column)
    return not (value is None or value == [] or (isinstance(value, str) and not value.strip()))


def _plain(name: str) -> str:
    return name.strip().casefold()


def files_of(own: Own, root: Path, split: str, suffixes: tuple[str, ...]) -> list[Path]:
    """The files that ``path`` of the entry names, by default all with one of the suffixes."""
    pattern = below_root(own.path or "*").replace("{split}", split)
    found = [path for path in matching_files(root, pattern) if path.suffix.lower() in suffixes]
    if not found:
        raise FileNotFoundError(
            f"{own.name}: no {' or '.join(suffixes)} file matches {pattern} in {root}; set `path` "
            "of the recipe's entry to the file, or to a pattern with * or {split}"
        )
    return found


def below_root(pattern: str) -> str:
    """``pattern``, or ValueError if it leaves the data root."""
    if PurePosixPath(pattern).is_absolute() or ".." in PurePosixPath(pattern).parts:
        raise ValueError(f"path {pattern!r} leaves the data root; expected a path below it")
    return pattern


def records_of(path: Path) -> Iterator[tuple[str, Record]]:
    """(key, record) of a table, or of JSON."""
    note_file(path)
    suffix = path.suffix.lower()
    if suffix == ".json":
        yield from read_records(path)
        return
    if suffix == ".parquet":
        rows = read_parquet(path)
    elif suffix == ".jsonl":
        rows = read_lines(path)
    else:
        rows = read_table(path, "\t" if suffix == ".tsv" else ",")
    for i, record in enumerate(rows):
        yield str(i), record


def images_of(own: Own, root: Path, value: Any, where: str, inside: str = "") -> tuple[str, ...]:
    """Paths below the image root, of one picture or of the frames of a video; what is a path is
    relative to the folder ``inside`` it."""
    values = value if isinstance(value, list | tuple) else [value]
    return tuple(_image(root / own.images, one, where, inside) for one in values)


def _image(image_root: Path, value: Any, where: str, inside: str) -> str:
    if isinstance(value, dict) and isinstance(value.get("bytes"), bytes):
        return keep_picture(image_root, value["bytes"])
    if isinstance(value, dict):
        value = value.get("path")
    if not isinstance(value, str):
        raise ValueError(f"{where}: a picture is {repr(value)[:80]}; expected a path")
    if value.startswith("data:"):
        try:
            data = base64.b64decode(value.partition(",")[2], validate=True)
        except ValueError:  # binascii.Error is one; so is what a letter beyond ASCII raises
            raise ValueError(f"{where}: the picture is not base64; repair the line") from None
        return keep_picture(image_root, data)
    if "://" in value:
        raise ValueError(
            f"{where}: picture {value[:80]!r} is on the network; nothing is downloaded here: "
            "save it below the image root and write its path"
        )
    name = image_name(value, where)
    return image_name(f"{inside}/{name}", where) if inside else name


def keep_picture(image_root: Path, data: bytes) -> str:
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
