"""Facts about each image: size, date of its file or shard, hash, and whether it opens.

They are stored in ``pictures.arrow`` beside the prepared data, so that only files that are new or
changed are read again.
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
from instructblip.data.prepared.near import Look, look_of
from instructblip.data.reading.decode import decode_image, examine_image
from instructblip.data.reading.images import MAX_FILE_BYTES
from instructblip.data.reading.members import read_image, size_and_date

FACTS_FILE = "pictures.arrow"
MISSING = "does not exist"
_SCHEMA = pa.schema(
    [
        ("name", pa.string()),
        ("size", pa.int64()),
        ("modified_ns", pa.int64()),
        ("sha256", pa.binary()),
        ("fault", pa.string()),
        ("perceptual", pa.uint64()),
        ("note", pa.string()),
        ("colours", pa.binary()),
    ]
)
SAVE_SECONDS = 300
"""Seconds after which the facts gathered so far are written, in case of an interruption."""
_NAMES_PER_TASK = 64
_PARTS_AHEAD = 64


class ImageFact(NamedTuple):
    """One image file. ``fault`` says why it does not open and is empty when it does; ``sha256`` of
    the file's bytes is empty when they cannot be read. ``perceptual`` and ``colours`` are its
    `near.Look`, None where nobody has asked for it and in files of earlier versions. ``note`` says
    what is unusual ("kind: reason"); None if an earlier version looked at a file that may be
    unusual."""

    size: int
    modified_ns: int
    sha256: bytes
    fault: str
    perceptual: int | None = None
    note: str | None = ""
    colours: bytes | None = None

    @property
    def look(self) -> Look | None:
        """What is compared to find near-duplicates; None where it is not known."""
        if self.perceptual is None or self.colours is None:
            return None
        return Look(self.perceptual, self.colours)


def update_facts(
    file: Path,
    names: Mapping[str, None],
    root: Path,
    title: str,
    *,
    known: Mapping[str, ImageFact] | None = None,
    decode: bool = False,
    perceptual: bool = False,
    progress: bool = True,
) -> dict[str, ImageFact]:
    """Facts about the images ``names`` below ``root``, written to ``file``.

    Images that ``file`` or ``known`` has with the same size and date are not read again. After an
    interruption ``file`` has the facts gathered so far.
    """
    written = read_facts(file)
    known = {**(known or {}), **written}
    facts: dict[str, ImageFact] = {}
    saved = time.monotonic()
    with progress_bar(title, "images", shown=progress) as advance:
        try:
            gathered = gather_facts(names, root, known, decode=decode, perceptual=perceptual)
            for name, fact in gathered:
                facts[name] = fact
                if len(facts) % 1024 == 0:
                    advance(len(facts), len(names))
                    if time.monotonic() - saved > SAVE_SECONDS:
                        write_facts(file, known | facts)
                        saved = time.monotonic()
        except BaseException:
            # Reading may have taken hours: keep the facts.
            write_facts(file, known | facts)
            raise
    if facts != written:
        write_facts(file, facts)
    return facts


def summary(facts: Mapping[str, ImageFact]) -> dict[str, Any]:
    """Number, bytes and one sha256 over the names and hashes of all images, for the manifest."""
    total = hashlib.sha256()
    for name in sorted(facts):
        total.update(name.encode() + b"\0" + facts[name].sha256)
    size = sum(fact.size for fact in facts.values())
    return {"count": len(facts), "bytes": size, "sha256": total.hexdigest()}


def gather_facts(
    names: Iterable[str],
    root: Path,
    known: Mapping[str, ImageFact],
    *,
    decode: bool = False,
    perceptual: bool = False,
    workers: int | None = None,
) -> Iterator[tuple[str, ImageFact]]:
    """(name, fact) of each image below ``root``, in order, read by ``workers`` threads.

    An image that ``known`` has with the same size and date is not read. ``decode`` reads and
    decodes every image whole; otherwise its header and the end of its file are looked at.
    ``perceptual`` decodes images whose look is not known yet, JPEGs at a small scale.
    """

    def look(part: tuple[str, ...]) -> list[tuple[str, ImageFact]]:
        return [(name, _look_at(root / name, known.get(name), decode, perceptual)) for name in part]

    # Threads are enough: reading and hashing release the interpreter's lock. ``map`` submits all
    # it is given at once, so it is given a limited number of parts at a time.
    rest = iter(names)
    parts = iter(lambda: tuple(islice(rest, _NAMES_PER_TASK)), ())
    with ThreadPoolExecutor(workers or os.cpu_count()) as pool:
        while submitted := list(islice(parts, _PARTS_AHEAD)):
            for facts in pool.map(look, submitted):
                yield from facts


def first_changed(root: Path, facts: Mapping[str, ImageFact]) -> str | None:
    """The first image that has changed since ``facts`` were gathered, or None."""
    for name, fact in facts.items():
        try:
            stamp = size_and_date(root / name)
        except OSError:
            return name
        if stamp != fact[:2]:
            return name
    return None


def write_facts(path: Path, facts: Mapping[str, ImageFact]) -> None:
    columns = [list(facts), *([f[i] for f in facts.values()] for i in range(len(_SCHEMA) - 1))]
    with (
        replacing(path) as temporary,
        pa.OSFile(str(temporary), "wb") as sink,
        pa.ipc.new_stream(sink, _SCHEMA) as writer,
    ):
        writer.write_table(pa.table(columns, schema=_SCHEMA))


def read_facts(path: Path) -> dict[str, ImageFact]:
    """The facts that ``write_facts`` wrote, by name; empty without a file."""
    if not path.is_file():
        return {}
    with pa.ipc.open_stream(pa.memory_map(str(path))) as reader:
        table = reader.read_all()
    columns = {name: table[name].to_pylist() for name in table.column_names}
    names = columns.pop("name")
    if "note" not in columns:  # of an earlier version
        jpeg = (".jpg", ".jpeg")
        columns["note"] = ["" if name.lower().endswith(jpeg) else None for name in names]
    rows = zip(*columns.values(), strict=True)
    return {
        name: ImageFact(**dict(zip(columns, row, strict=True)))
        for name, row in zip(names, rows, strict=True)
    }


def _look_at(path: Path, known: ImageFact | None, decode: bool, perceptual: bool) -> ImageFact:
    try:
        stamp = size_and_date(path)
        seen = known is not None and known[:2] == stamp and known.note is not None
        is_known = seen and not decode
        if known and is_known and (not perceptual or known.look is not None or known.fault):
            return known
        if stamp[0] > MAX_FILE_BYTES:
            return ImageFact(*stamp, b"", f"has more than {MAX_FILE_BYTES} bytes")
        data = read_image(path)
    except FileNotFoundError:
        return ImageFact(0, 0, b"", MISSING)
    except OSError as error:
        return ImageFact(0, 0, b"", f"cannot be read: {error.strerror or error}")
    if known and is_known:
        fact = known
    else:
        fault, note = examine_image(data, decode)
        fact = ImageFact(*stamp, hashlib.sha256(data).digest(), fault, note=note)
    if not perceptual or fact.fault:
        return fact
    try:
        look = look_of(decode_image(data, "", thumbnail=True))
    except ValueError:  # damage in the middle of a file, which only ``decode`` looks for
        return fact._replace(perceptual=None, colours=None)
    return fact._replace(perceptual=look.hash, colours=look.colours)
