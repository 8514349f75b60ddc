"""Reads the annotations of a data set once, verifies them and stores them memory-mapped.

``out/<name>/<split>/`` then holds::

    data.arrow           the examples (dataset.py)
    manifest.json        source, counts, settings, and a stamp of every annotation file
    bad_samples.jsonl    samples that were left out, by file, record and reason
    pictures.arrow       size, date, sha256 and fault of every image (images.py)

Preparing again does nothing as long as the annotation files are the same.

Until it is complete the folder is called ``.<split>.part/``. There ``state.json`` says how many
bytes of ``data.arrow`` are valid and from which files they were read. An interrupted preparation
resumes from it, or begins again if one of these files has changed.
"""

import hashlib
import json
import os
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from itertools import islice
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TypeVar

from instructblip.core.example import Example
from instructblip.core.files import (
    flush,
    locked,
    put_directory,
    read_json,
    recover,
    write_json,
    write_text,
)
from instructblip.core.progress import progress_bar
from instructblip.data.prepared.dataset import (
    DATA_FILE,
    FORMAT_VERSION,
    MANIFEST_FILE,
    SCHEMA,
    PreparedDataset,
    image_names,
    to_batch,
)
from instructblip.data.prepared.images import FACTS_FILE, read_facts, summary, update_facts
from instructblip.data.reading.members import file_of
from instructblip.data.reading.opened import FilesRead, check_file, note_files
from instructblip.data.reading.records import image_name, image_stem, images_by_stem, walk_files
from instructblip.data.sources import Source, source_of

BAD_FILE = "bad_samples.jsonl"
STATE_FILE = "state.json"
LOCK_FILE = "lock"
ROWS_PER_BATCH = 2048
SAVE_SECONDS = 10.0
PARALLEL_BYTES = 1 << 27
"""Bytes of annotations from which several processes prepare faster than one."""
ANNOTATION_FILES = (".json", ".jsonl", ".csv", ".txt", ".arrow")
T = TypeVar("T")
END_OF_STREAM = b"\xff\xff\xff\xff\0\0\0\0"


@dataclass(frozen=True, slots=True)
class Job:
    """One split to prepare: ``source`` is read from ``root`` into ``out/<name>/<split>/``.

    A row that cannot be read, an example whose image is missing, or a training example without
    answer is a bad sample. More
    than ``max_bad_rate`` of them raise ValueError naming the first few; fewer are left out, counted
    in the manifest and listed in ``bad_samples.jsonl``.
    """

    name: str
    root: Path
    split: str
    out: Path
    source: Source
    max_bad_rate: float = 0.0

    @property
    def target(self) -> Path:
        return self.out / self.name / self.split

    def run(self, progress: bool = True) -> PreparedDataset:
        """Prepares the split, unless it was prepared from the same files."""
        if self.split not in self.source.splits:
            raise ValueError(f"split '{self.split}'; expected {', '.join(self.source.splits)}")
        if not self.root.is_dir():
            raise FileNotFoundError(
                f"{self.root.resolve()} does not exist; '{self.name}' needs "
                f"{self.source.files.format(split=self.split)} there, and {self.source.images}/"
            )
        if _is_current(self):
            return PreparedDataset(self.target)
        part = self.target.with_name(f".{self.split}.part")
        with locked(part / LOCK_FILE):
            recover(self.target.parent)
            try:
                # Another process may have prepared it while this one waited.
                if not _is_current(self):
                    _write(self, part, progress)
                    for name in (STATE_FILE, LOCK_FILE):
                        (part / name).unlink()
                    put_directory(part, self.target)
            except (ValueError, FileNotFoundError):
                # Something is wrong with the user's files, which will change before the next try.
                shutil.rmtree(part)
                raise
            shutil.rmtree(part, ignore_errors=True)
        return PreparedDataset(self.target)


def prepare(
    name: str,
    root: str | Path,
    split: str,
    out: str | Path,
    *,
    source: Source | None = None,
    max_bad_rate: float = 0.0,
) -> PreparedDataset:
    """Prepares a split of ``source``, by default ``SOURCES[name]``: see ``Job``."""
    return Job(name, Path(root), split, Path(out), source or source_of(name), max_bad_rate).run()


def prepare_all(jobs: list[Job], workers: int | None = None) -> list[PreparedDataset]:
    """Prepares several splits, each in its own process.

    All are tried: those without an error stay prepared, then the errors of the others are raised as
    one. A process takes seconds to start, so small sets are prepared here, one after the other.
    """
    unique = {job.target: job for job in jobs}
    workers = min(workers or os.cpu_count() or 1, len(unique))
    if workers == 1 or sum(_annotation_bytes(job) for job in jobs) < PARALLEL_BYTES:
        return all_of(job.run for job in jobs)
    with (
        ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool,
        progress_bar("preparing", "data sets") as advance,
    ):
        running = {pool.submit(job.run, False): target for target, job in unique.items()}
        for number, _ in enumerate(as_completed(running), start=1):
            advance(number, len(running))
    done = dict(zip(unique, all_of(future.result for future in running), strict=True))
    return [done[job.target] for job in jobs]


def all_of(calls: Iterable[Callable[[], T]]) -> list[T]:
    """The results of all calls. Errors of the user's files are raised after the last call, several
    of them together as one ValueError."""
    results, errors = [], []
    for call in calls:
        try:
            results.append(call())
        except (FileNotFoundError, ValueError) as error:
            errors.append(error)
    if errors:
        raise errors[0] if len(errors) == 1 else ValueError("\n".join(map(str, errors)))
    return results


def _annotation_bytes(job: Job) -> int:
    """An estimate of the bytes to read; 0 for what is prepared."""
    if (job.target / MANIFEST_FILE).is_file():
        return 0
    files = [*job.root.glob("annotations/*"), *job.root.glob("*.*")]
    return sum(path.stat().st_size for path in files if path.is_file())


def _is_current(job: Job) -> bool:
    """Whether the split was prepared from the annotation files that are there now."""
    try:
        manifest = read_json(job.target / MANIFEST_FILE)
    except (FileNotFoundError, ValueError):
        return False
    root = job.root.resolve()
    return (
        manifest.get("format_version") == FORMAT_VERSION
        and manifest["root"] == str(root)
        and manifest["settings"] == job.source.settings
        and manifest["max_bad_rate"] == job.max_bad_rate
        and (job.target / DATA_FILE).is_file()
        and _same_files(manifest, root, job.out.resolve(), by_content=True)
    )


def _write(job: Job, part: Path, progress: bool) -> None:
    """Writes all prepared files into ``part``, the manifest last."""
    root, out = job.root.resolve(), job.out.resolve()
    image_root, title = root / job.source.images, f"{job.name} {job.split}"
    rows = _read(job, part, progress)
    bad_lines = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in rows.bad)
    if len(rows.bad) > job.max_bad_rate * rows.seen:
        listed = job.target.with_name(f"{job.split}.{BAD_FILE}")
        write_text(listed, bad_lines)
        shown = "".join(f"\n  {b['file']}:{b['record']}: {b['reason']}" for b in rows.bad[:5])
        raise ValueError(
            f"{title}: {len(rows.bad)} of {rows.seen} samples are bad, more than the rate of "
            f"{job.max_bad_rate:g} allowed:{shown}\nAll are listed in {listed}. Repair them, or "
            "raise `max_bad_rate` to leave them out"
        )
    count = sum(rows.tasks.values())
    if not count:
        raise ValueError(f"{title}: no example in {root}; expected {job.source.files}")
    (part / BAD_FILE).write_text(bad_lines, encoding="utf-8")
    facts = update_facts(
        part / FACTS_FILE,
        image_names(part / DATA_FILE),
        image_root,
        title,
        known=read_facts(job.target / FACTS_FILE),
        progress=progress,
    )
    manifest = {
        "format_version": FORMAT_VERSION,
        "source": job.name,
        "split": job.split,
        "count": count,
        "tasks": dict(rows.tasks),
        "bad": len(rows.bad),
        "bad_reasons": dict(Counter(line["kind"] for line in rows.bad)),
        "max_bad_rate": job.max_bad_rate,
        "root": str(root),
        "settings": job.source.settings,
        "image_root": str(image_root),
        "images": summary(facts),
        "bytes": (part / DATA_FILE).stat().st_size,
        "licence": job.source.licence,
        "annotations": [
            stamp | {"sha256": _sha256_of(root / stamp["file"], out)}
            for stamp in rows.files["annotations"]
        ],
        "absent": rows.files["absent"],
    }
    write_json(part / MANIFEST_FILE, manifest)


def _read(job: Job, part: Path, progress: bool) -> "_Rows":
    """Reads all examples into ``part``, or those that an interrupted preparation has not read."""
    root, out = job.root.resolve(), job.out.resolve()
    key = {"version": FORMAT_VERSION, "root": str(root), "settings": job.source.settings}
    rows = _Rows(part, key)
    images = _ImageNames(root / job.source.images)
    repaired = any(not name or name in images for name in rows.missing)
    if repaired or not _same_files(rows.files, root, out, by_content=False):
        rows.restart()
    with (
        note_files() as files,
        progress_bar(f"{job.name} {job.split}", "bytes", shown=progress) as advance,
    ):
        unread = () if rows.ended else islice(job.source.read(root, job.split), rows.seen, None)
        good = _good(unread, job.split, images, rows)
        while examples := list(islice(good, ROWS_PER_BATCH)):
            rows.append(examples)
            advance(*files.position())
            if rows.due():
                rows.save(_stamps_of(files, root, out))
        if not rows.ended:
            rows.save(_stamps_of(files, root, out), ended=True)
    rows.close()
    return rows


def _good(
    examples: Iterable[Example | ValueError], split: str, images: "_ImageNames", rows: "_Rows"
) -> Iterator[Example]:
    """The good examples; the others are listed in ``rows.bad``."""
    for example in examples:
        if isinstance(example, ValueError):
            where, _, reason = str(example).partition(": ")
            rows.note(where, "bad row", reason)
            continue
        names = (n for n in example.images if image_name(n, example.where) not in images)
        absent = next(names, None)
        if not example.images:
            rows.missing.append("")  # the names under which they may appear are unknown
            kind, reason = "no image", "no image"
            if video := example.extra.get("video"):
                wanted = f"a folder of frames such as {video}/, or a file such as {video}.mp4"
                reason = f"video {video!r} is not in {images.root}; expected {wanted}"
        elif absent is not None:
            rows.missing.append(absent)
            kind, reason = images.fault(absent)
        elif split == "train" and not example.taught:
            kind, reason = "no answer", "a training example needs an answer"
        else:
            yield example
            continue
        rows.note(example.where, kind, reason)


class _ImageNames:
    """The names of image files below a folder: ``"a/b.jpg" in names``.

    Each folder is listed once, since a stat for every image is slow on a network file system.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self._folders: dict[str, frozenset[str]] = {}
        self._unreadable: dict[str, str] = {}  # the folder -> why
        self._by_stem: dict[str, dict[str, str]] = {}  # the folder -> its images

    def __contains__(self, name: str) -> bool:
        name = file_of(name)
        folder, _, base = name.rpartition("/")
        if folder not in self._folders:
            self._folders[folder] = frozenset(self._list(folder))
        return base in self._folders[folder]

    def _list(self, folder: str) -> list[str]:
        try:
            return [entry.name for entry in os.scandir(self.root / folder)]
        except (FileNotFoundError, NotADirectoryError):
            return []
        except OSError as error:
            self._unreadable[folder] = f"cannot be read: {error.strerror}"
            return []

    def fault(self, name: str) -> tuple[str, str]:
        """(kind, reason) for an image that is not there."""
        name = file_of(name)
        folder = name.rpartition("/")[0]
        if reason := self._unreadable.get(folder):
            return "unreadable folder", f"folder {self.root / folder} {reason}"
        if folder not in self._by_stem:
            self._by_stem[folder] = images_by_stem(self._folders.get(folder, ()))
        near = self._by_stem[folder].get(image_stem(name))
        hint = f"; did you mean {near}?" if near else ""
        return "missing image", f"image {self.root / name} does not exist{hint}"


class _Rows:
    """The examples written so far to ``data.arrow`` in ``folder``, and what they were read from.

    Begins with the rows that an earlier preparation with the same ``key`` has left there. ``bad``
    are the lines of ``bad_samples.jsonl``, ``missing`` the names of missing images, and ``files``
    the result of ``_stamps_of``.
    """

    def __init__(self, folder: Path, key: dict[str, Any]) -> None:
        self.folder, self.key = folder, key
        try:
            state = read_json(folder / STATE_FILE)
        except (FileNotFoundError, ValueError):
            state = {}
        self._start(state if state.get("key") == key else {})

    def _start(self, state: dict[str, Any]) -> None:
        self.tasks: Counter[str] = Counter(state.get("tasks", {}))
        self.bad: list[dict[str, str]] = state.get("bad", [])
        self.missing: list[str] = state.get("missing", [])
        self.files: dict[str, Any] = state.get("files", {})
        self.ended: bool = state.get("ended", False)
        self._data = (self.folder / DATA_FILE).open("a+b")
        self._data.truncate(state.get("bytes", 0))  # a kill may have left half a batch after it
        if not state:
            self._data.write(SCHEMA.serialize())
        self._saved = time.monotonic()

    def restart(self) -> None:
        """Discards all rows."""
        self.close()
        self._start({})

    @property
    def seen(self) -> int:
        """Number of examples read, good and bad."""
        return sum(self.tasks.values()) + len(self.bad)

    def append(self, examples: list[Example]) -> None:
        self._data.write(to_batch(examples).serialize())
        self.tasks.update(example.task for example in examples)

    def note(self, where: str, kind: str, reason: str) -> None:
        """Record a bad sample."""
        file, _, record = where.partition(":")
        self.bad.append({"file": file, "record": record, "kind": kind, "reason": reason})

    def due(self) -> bool:
        """Whether it is time to save."""
        return time.monotonic() - self._saved > SAVE_SECONDS

    def save(self, files: dict[str, Any], ended: bool = False) -> None:
        """Makes all rows so far available to the next preparation."""
        self.files, self.ended = files, ended
        if ended:
            self._data.write(END_OF_STREAM)
        flush(self._data)
        state = {
            "key": self.key,
            "tasks": dict(self.tasks),
            "bad": self.bad,
            "missing": self.missing,
            "files": files,
            "ended": ended,
            "bytes": self._data.seek(0, os.SEEK_END),
        }
        write_json(self.folder / STATE_FILE, state)
        self._saved = time.monotonic()

    def close(self) -> None:
        self._data.close()


# Stamps of annotation files: their size, date and hash. A folder of small files has one stamp with
# a hash over their names, sizes and dates. ``without`` is the folder of all prepared data, which
# may lie inside such a folder and is no part of it.


def _stamps_of(files: FilesRead, root: Path, without: Path) -> dict[str, Any]:
    """Stamps of the files that a reader read, and names of those it would have read."""
    return {
        "annotations": [_stamp(path, root, without) for path in files.present],
        "absent": [str(path.relative_to(root)) for path in files.absent],
    }


def _same_files(stamps: dict[str, Any], root: Path, without: Path, by_content: bool) -> bool:
    """Whether the files of ``_stamps_of`` are unchanged, and none of the absent ones has appeared.

    ``by_content`` compares the hashes of files whose date has changed.
    """
    if any((root / name).exists() for name in stamps.get("absent", ())):
        return False
    for known in stamps.get("annotations", ()):
        path = root / known["file"]
        if not path.exists():
            return False
        now = _stamp(path, root, without)
        if now["bytes"] != known["bytes"]:
            return False
        touched = any(known.get(key) != value for key, value in now.items())
        if touched and not (by_content and _sha256_of(path, without) == known["sha256"]):
            return False
    return True


def _stamp(path: Path, root: Path, without: Path) -> dict[str, Any]:
    file = str(path.relative_to(root))
    if not path.is_dir():
        status = path.stat()
        return {"file": file, "bytes": status.st_size, "modified_ns": status.st_mtime_ns}
    stats = [(str(f.relative_to(path)), f.stat()) for f in _files_of(path, without)]
    listed = [(name, status.st_size, status.st_mtime_ns) for name, status in stats]
    return {
        "file": file,
        "bytes": sum(size for _, size, _ in listed),
        "listing": hashlib.sha256(repr(listed).encode()).hexdigest(),
    }


def _sha256_of(path: Path, without: Path) -> str:
    """Of a file, or of the names and contents of a folder's annotation files; of the size and date
    of a tar shard, which may have many gigabytes of images."""
    digest = hashlib.sha256()
    if path.suffix.lower() == ".tar":
        status = path.stat()
        return hashlib.sha256(repr((status.st_size, status.st_mtime_ns)).encode()).hexdigest()
    for file in _files_of(path, without) if path.is_dir() else [path]:
        if file != path:
            digest.update(f"{file.relative_to(path)}\0{file.stat().st_size}\0".encode())
        check_file(file)
        with file.open("rb") as opened:
            while block := opened.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def _files_of(folder: Path, without: Path) -> list[Path]:
    """The annotation files of a folder."""
    files = [file for file in walk_files(folder) if file.suffix.lower() in ANNOTATION_FILES]
    if folder not in without.parents:
        return files
    return [file for file in files if without not in file.parents]
