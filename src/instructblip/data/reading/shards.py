"""Reads the containers of other frameworks: Parquet, saved data sets, tar shards."""

import json
import tarfile
import warnings
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

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


def read_shard(path: Path) -> Iterator[tuple[str, dict[str, Any], str]]:
    """(key, parts by suffix, place) of each sample: neighbours that share a key.

    ``.json`` is an object, ``.txt`` a text and images are bytes; other parts are skipped with a
    warning. Nothing is written under the name that the archive gives.
    """
    key, parts = "", {}
    count, skipped = 0, []
    if not _is_complete(path):
        raise ValueError(
            f"{path.name}: not readable as a tar archive: its end is missing; download the shard "
            "again"
        )
    try:
        with tarfile.open(path, "r|") as archive:
            for member in archive:
                stem, _, suffix = PurePosixPath(member.name).name.partition(".")
                if not member.isfile() or not stem:
                    continue
                name = str(PurePosixPath(member.name).with_name(stem))
                where = f"{path.name}:{member.name}"
                if name != key:
                    if parts:
                        yield key, parts, f"{path.name}:{key}"
                    key, parts = name, {}
                if member.size > MAX_MEMBER:
                    raise ValueError(f"{where} has more than {MAX_MEMBER} bytes")
                file = archive.extractfile(member)
                assert file is not None
                part = _part("." + suffix.lower(), file.read(), where)
                parts |= part
                count += 1
                if not part:
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
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - 1024))
        end = file.read()
    return len(end) == 1024 and not any(end)


def _part(suffix: str, data: bytes, where: str) -> dict[str, Any]:
    if suffix in IMAGE_SUFFIXES:
        return {suffix: data}
    if suffix not in (".json", ".txt"):
        return {}
    try:
        text = data.decode("utf-8-sig")
        if suffix == ".txt":
            return {suffix: text}
        value = json.loads(text, parse_constant=refuse_constant)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: not readable: {error}") from None
    return {suffix: check_object(value, where)}
