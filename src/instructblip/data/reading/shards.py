"""Reads the containers of other frameworks: Parquet, saved data sets, tar shards."""

import json
import tarfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from instructblip.core.files import unique_keys
from instructblip.data.reading.members import member_name
from instructblip.data.reading.opened import check_file, open_bytes
from instructblip.data.reading.records import IMAGE_SUFFIXES, Record, check_object
from instructblip.data.reading.splits import split_named
from instructblip.data.reading.streaming import refuse_constant

ROWS = 64
MAX_MEMBER = 1 << 28
"""Bytes of one file inside a tar."""


def read_parquet(path: Path) -> Iterator[tuple[str, Record]]:
    """(index, record) of the rows of a Parquet file."""
    number = 0
    try:
        check_file(path)
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=ROWS):
                for row in batch.to_pylist():
                    yield str(number), Record(row, f"{path.name}:row {number}")
                    number += 1
    except (pa.ArrowException, OSError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"{path.name}:row {number}: not readable as Parquet: {reason}") from None


def read_saved(folder: Path, split: str) -> Iterator[tuple[str, Record]]:
    """(index, record) of the rows of a data set that ``save_to_disk`` wrote, images encoded."""
    import datasets

    try:
        saved: Any = datasets.load_from_disk(str(folder))
    except (FileNotFoundError, ValueError, pa.ArrowException) as error:
        raise ValueError(f"{folder} is not a saved data set: {error}") from None
    if isinstance(saved, datasets.DatasetDict):
        name = next((name for name in saved if split_named(str(name)) == split), None)
        if name is None:
            raise FileNotFoundError(
                f"{folder} has no split '{split}'; it has {', '.join(map(str, saved))}"
            )
        saved = saved[name]
    for name, feature in saved.features.items():
        if isinstance(feature, datasets.Image):
            saved = saved.cast_column(name, datasets.Image(decode=False))
    for i, row in enumerate(saved):
        yield str(i), Record(dict(row), f"{folder.name}:row {i}")


def read_shard(path: Path, name: str) -> Iterator[tuple[str, dict[str, Any], str]]:
    """(key, parts by suffix, place) of each sample: neighbours that share a key.

    ``.json`` is an object, ``.txt`` a text, and an image the name of its bytes in the shard, which
    is called ``name`` (``reading.members``); other parts are skipped with a warning. Nothing is
    written. Raises ValueError for a shard that is not complete, and for a member that is a link, is
    sparse, leaves the archive, or is larger than ``MAX_MEMBER`` or the shard.
    """
    key, parts = "", {}
    count, skipped = 0, []
    if not _is_complete(path):
        raise ValueError(
            f"{path.name}: not readable as a tar archive: its end is missing; download the shard "
            "again"
        )
    try:
        with open_bytes(path) as file, tarfile.open(fileobj=file, mode="r:") as archive:
            size = path.stat().st_size
            while (member := archive.next()) is not None:
                archive.members.clear()  # type: ignore  # it would keep every header
                if member.isdir():
                    continue
                where = f"{path.name}:{member.name}"
                if fault := _fault(member, size):
                    raise ValueError(f"{where} {fault}; make the shard anew")
                folder, _, base = member.name.rpartition("/")
                stem, _, suffix = base.partition(".")
                if not stem:
                    continue
                if (other := f"{folder}/{stem}" if folder else stem) != key:
                    if parts:
                        yield key, parts, f"{path.name}:{key}"
                    key, parts = other, {}
                count += 1
                suffix = "." + suffix.lower()
                if suffix in IMAGE_SUFFIXES:
                    parts[suffix] = member_name(name, member.offset_data, member.size)
                elif suffix in (".json", ".txt"):
                    opened = archive.extractfile(member)
                    assert opened is not None
                    parts[suffix] = _text_or_object(suffix, opened.read(), where)
                else:
                    skipped.append(member.name)
        if parts:
            yield key, parts, f"{path.name}:{key}"
    except (tarfile.TarError, EOFError, OSError) as error:
        raise ValueError(
            f"{path.name}:{key or 'start'}: not readable as a tar archive: {error}; "
            "download the shard again"
        ) from None
    if skipped:
        warnings.warn(
            f"{path.name}: {len(skipped)} of {count} files are skipped: "
            f"{', '.join(skipped[:5])}; a key ends at the first dot of a name, and after that dot "
            f"only json, txt and {', '.join(suffix[1:] for suffix in IMAGE_SUFFIXES)} are read",
            stacklevel=2,
        )


def _is_complete(path: Path) -> bool:
    """A tar ends with two empty blocks; without them tarfile stops early and raises nothing."""
    check_file(path)
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - 1024))
        end = file.read()
    return len(end) == 1024 and not any(end)


def _fault(member: tarfile.TarInfo, size: int) -> str:
    """Why a member of a shard of ``size`` bytes cannot be read in place; empty if it can."""
    if member.islnk() or member.issym():
        return f"is a link to {member.linkname[:80]!r}; expected a file"
    if not member.isfile() or member.issparse():
        return "is sparse or no file; expected a file"
    if member.name.startswith("/") or ".." in member.name.split("/"):
        return "leaves the archive; expected a relative name"
    if member.size > MAX_MEMBER:
        return f"has more than {MAX_MEMBER} bytes"
    if member.size < 0 or member.offset_data + member.size > size:
        return f"claims {member.size} bytes, more than the shard has"
    return ""


def _text_or_object(suffix: str, data: bytes, where: str) -> str | dict[str, Any]:
    try:
        text = data.decode("utf-8-sig")
        if suffix == ".txt":
            return text
        value = json.loads(text, parse_constant=refuse_constant, object_pairs_hook=unique_keys)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: not readable: {error}") from None
    return check_object(value, where)
