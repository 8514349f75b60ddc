"""What the formats of custom data share: the recipe's entry, its files and their images."""

import base64
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from instructblip.core.files import replacing
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

REMEDY = "Repair the row, or the entry of the recipe that says how it is read"
"""Ends the error messages about a record of custom data."""
TABLES = (".jsonl", ".json", ".csv", ".tsv", ".parquet")


@dataclass(frozen=True, slots=True)
class CustomSet:
    """One custom data set of the recipe: its files, their images, the meaning of their columns."""

    name: str
    format: str
    path: str | None = None
    images: str = "."
    columns: tuple[tuple[str, str], ...] = ()
    task: str | None = None


def files_of(custom: CustomSet, root: Path, split: str, suffixes: tuple[str, ...]) -> list[Path]:
    """The files that match ``custom.path``, or without it all that have one of the suffixes."""
    pattern = below_root(custom.path or "*").replace("{split}", split)
    files = [path for path in matching_files(root, pattern) if path.suffix.lower() in suffixes]
    if not files:
        raise FileNotFoundError(
            f"{custom.name}: no {' or '.join(suffixes)} file matches {pattern} in {root}; set "
            "`path` of the recipe's entry to the file, or to a pattern with * or {split}"
        )
    return files


def below_root(pattern: str) -> str:
    """``pattern``; ValueError if it leaves the data root."""
    if PurePosixPath(pattern).is_absolute() or ".." in PurePosixPath(pattern).parts:
        raise ValueError(f"path {pattern!r} leaves the data root; expected a path below it")
    return pattern


def records_of(path: Path) -> Iterator[tuple[str, Record]]:
    """(key, record) of each row of a table or each value of a JSON file."""
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


def images_of(image_root: Path, value: Any, where: str, folder: str = "") -> tuple[str, ...]:
    """Paths below ``image_root`` of one image, or of a list of images or frames.

    Paths in ``value`` are relative to ``folder`` below the image root. Images that come as bytes
    or as ``data:`` URLs are written below the image root. Raises ValueError for anything else.
    """
    values = value if isinstance(value, list | tuple) else [value]
    return tuple(_image(image_root, one, where, folder) for one in values)


def _image(image_root: Path, value: Any, where: str, folder: str) -> str:
    if isinstance(value, dict):
        if isinstance(data := value.get("bytes"), bytes):
            return keep_image(image_root, data)
        value = value.get("path")
    if not isinstance(value, str):
        raise ValueError(f"{where}: an image is {repr(value)[:80]}; expected a path")
    if value.startswith("data:"):
        try:
            data = base64.b64decode(value.partition(",")[2], validate=True)
        except ValueError:  # binascii.Error is one; a letter beyond ASCII raises another
            raise ValueError(f"{where}: the image is not base64; repair the line") from None
        return keep_image(image_root, data)
    if "://" in value:
        raise ValueError(
            f"{where}: image {value[:80]!r} is on the network, and images are not downloaded; "
            "save it below the image root and write its path"
        )
    name = image_name(value, where)
    return image_name(f"{folder}/{name}", where) if folder else name


def keep_image(image_root: Path, data: bytes) -> str:
    """Writes an image that is stored inside another file, under its hash; returns its name."""
    digest = hashlib.sha256(data).hexdigest()
    name = f"extracted/{digest[:2]}/{digest}{_suffix(data)}"
    path = image_root / name
    if not path.is_file():
        with replacing(path, synced=False) as temporary:
            temporary.write_bytes(data)
    return name


def _suffix(data: bytes) -> str:
    if data.startswith(b"\x89PNG"):
        return ".png"
    return ".webp" if data[8:12] == b"WEBP" else ".gif" if data[:3] == b"GIF" else ".jpg"
