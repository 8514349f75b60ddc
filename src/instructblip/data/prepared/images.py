"""What is known of each picture file: size, date, hash, and whether it opens.

``pictures.arrow`` beside the prepared data keeps it, so that looking again reads only files that
are new or changed.
"""

import hashlib
import os
import time
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa

from instructblip.core.files import replacing
from instructblip.core.progress import progress_bar
from instructblip.data.images import MAX_FILE_BYTES, image_fault

FACTS_FILE = "pictures.arrow"
MISSING = "does not exist"
_SCHEMA = pa.schema(
    [
        ("name", pa.string()),
        ("size", pa.int64()),
        ("modified_ns", pa.int64()),
        ("sha256", pa.binary()),
        ("fault", pa.string()),
    ]
)
SAVE_SECONDS = 300
"""Seconds between two writings of what is known, for a reading that is interrupted."""
_NAMES_PER_TASK = 64
_PARTS_AHEAD = 64


class ImageFact(NamedTuple):
    """One picture file. ``fault`` is empty when it opens; ``sha256`` is of the file's bytes, empty
    where they could not be read."""

    size: int
    modified_ns: int
    sha256: bytes
    fault: str


def update_facts(
    file: Path,
    names: Mapping[str, None],
    root: Path,
    title: str,
    *,
    known: Mapping[str, ImageFact] | None = None,
    decode: bool = False,
    progress: bool = True,
) -> dict[str, ImageFact]:
    """Facts about the pictures ``names``, from ``file`` (and ``known``) where they are still right.

    ``file`` then holds them; when the reading is interrupted, it holds what was read until then.
    """
    written = read_facts(file)
    known = {**(known or {}), **written}
    facts: dict[str, ImageFact] = {}
    saved = time.monotonic()
    with progress_bar(title, "pictures", shown=progress) as advance:
        try:
            for name, fact in gather_facts(names, root, known, decode=decode):
                facts[name] = fact
                if len(facts) % 1024 == 0:
                    advance(len(facts), len(names))
                    if time.monotonic() - saved > SAVE_SECONDS:
                        write_facts(file, known | facts)
                        saved = time.monotonic()
        except BaseException:
            # Hours of reading are worth keeping.
            write_facts(file, known | facts)
            raise
    if facts != written:
        write_facts(file, facts)
    return facts


def summary(facts: Mapping[str, ImageFact]) -> dict[str, Any]:
    """Number, bytes and one sha256 of all pictures, as the manifest has them."""
    size = sum(fact.size for fact in facts.values())
    return {"count": len(facts), "bytes": size, "sha256": digest(facts)}


def gather_facts(
    names: Iterable[str],
    root: Path,
    known: Mapping[str, ImageFact],
    *,
    decode: bool = False,
    workers: int | None = None,
) -> Iterator[tuple[str, ImageFact]]:
    """Reads each picture below ``root`` once, unless ``known`` has it with this size and date.

    ``decode`` decodes every picture whole; otherwise the header and the end of the file are read.
    """

    def look(part: tuple[str, ...]) -> list[tuple[str, ImageFact]]:
        return [(name, _look_at(root / name, known.get(name), decode)) for name in part]

    # Threads are enough: reading and hashing release the interpreter's lock.
    with ThreadPoolExecutor(workers or os.cpu_count()) as pool:
        parts = _batched(names)
        while some := list(islice(parts, _PARTS_AHEAD)):
            for facts in pool.map(look, some):
                yield from facts


def first_changed(root: Path, facts: Mapping[str, ImageFact]) -> str | None:
    """The first picture that has changed since ``facts`` were gathered, or None."""
    for name, fact in facts.items():
        try:
            stat = (root / name).stat()
        except OSError:
            return name
        if (stat.st_size, stat.st_mtime_ns) != (fact.size, fact.modified_ns):
            return name
    return None


def digest(facts: Mapping[str, ImageFact]) -> str:
    """One sha256 over the names and hashes of all pictures."""
    total = hashlib.sha256()
    for name in sorted(facts):
        total.update(name.encode() + b"\0" + facts[name].sha256)
    return total.hexdigest()


def write_facts(path: Path, facts: Mapping[str, ImageFact]) -> None:
    columns = [list(facts), *([f[i] for f in facts.values()] for i in range(len(_SCHEMA) - 1))]
    with (
        replacing(path) as temporary,
        pa.OSFile(str(temporary), "wb") as sink,
        pa.ipc.new_stream(sink, _SCHEMA) as writer,
    ):
        writer.write_table(pa.table(columns, schema=_SCHEMA))


def read_facts(path: Path) -> dict[str, ImageFact]:
    """What ``write_facts`` wrote; empty when there is nothing."""
    if not path.is_file():
        return {}
    with pa.ipc.open_stream(pa.memory_map(str(path))) as reader:
        table = reader.read_all()
    names, *columns = (column.to_pylist() for column in table.columns)
    return {
        name: ImageFact(*values)
        for name, values in zip(names, zip(*columns, strict=True), strict=True)
    }


def _batched(names: Iterable[str]) -> Iterator[tuple[str, ...]]:
    rest = iter(names)
    while part := tuple(islice(rest, _NAMES_PER_TASK)):
        yield part


def _look_at(path: Path, known: ImageFact | None, decode: bool) -> ImageFact:
    try:
        stat = path.stat()
        size, modified = stat.st_size, stat.st_mtime_ns
        if known and not decode and (known.size, known.modified_ns) == (size, modified):
            return known
        if size > MAX_FILE_BYTES:
            return ImageFact(size, modified, b"", f"has more than {MAX_FILE_BYTES} bytes")
        data = path.read_bytes()
    except FileNotFoundError:
        return ImageFact(0, 0, b"", MISSING)
    except OSError as error:
        return ImageFact(0, 0, b"", f"cannot be read: {error.strerror or error}")
    fault = image_fault(data, decode) or ""
    return ImageFact(size, modified, hashlib.sha256(data).digest(), fault)
