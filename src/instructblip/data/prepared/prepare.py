"""Read a source once, verify it, and keep it memory-mapped.

``out/<source>/<split>/`` holds ``data.arrow``, ``manifest.json``, ``bad_samples.jsonl`` and
``pictures.arrow`` (size, date, sha256 and fault of every picture). Pictures stay where they are.
Preparing again does nothing while the annotation files are the same; an interrupted preparation
goes on where it stopped.
"""

import json
import os
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from itertools import islice
from multiprocessing import get_context
from pathlib import Path

from instructblip.core.batch import Example
from instructblip.core.files import put_directory, recover, write_json, write_text
from instructblip.core.progress import progress_bar
from instructblip.data.prepared.dataset import (
    DATA_FILE,
    FORMAT_VERSION,
    MANIFEST_FILE,
    PreparedDataset,
    image_names,
)
from instructblip.data.prepared.images import (
    FACTS_FILE,
    read_facts,
    summary,
    update_facts,
)
from instructblip.data.prepared.partial import (
    LOCK_FILE,
    STATE_FILE,
    Partial,
    claim,
)
from instructblip.data.prepared.stamps import (
    same_files,
    sha256_of,
    stamps_of,
)
from instructblip.data.reading.opened import note_files
from instructblip.data.reading.records import image_name
from instructblip.data.sources import Source, source_of

BAD_FILE = "bad_samples.jsonl"
ROWS_PER_BATCH = 2048
PARALLEL_BYTES = 1 << 27


def prepare(
    name: str,
    root: str | Path,
    split: str,
    out: str | Path,
    *,
    source: Source | None = None,
    max_bad_rate: float = 0.0,
    progress: bool = True,
) -> PreparedDataset:
    """Reads ``SOURCES[name]`` (or ``source``) from ``root`` into ``out/<name>/<split>/``.

    A picture that is missing, or a training example without answer, is a bad sample. More than
    ``max_bad_rate`` of them raise ValueError naming the first few; fewer are left out, counted in
    the manifest and listed in ``bad_samples.jsonl``. Broken annotation files always raise.
    """
    if split not in ("train", "val", "test"):
        raise ValueError(f"split '{split}'; expected train, val or test")
    source = source or source_of(name)
    root, target = Path(root).resolve(), Path(out) / name / split
    if not root.is_dir():
        raise FileNotFoundError(
            f"{root} does not exist; '{name}' needs {source.files.format(split=split)} there, "
            f"and {source.images}/"
        )
    if _unchanged(target, root, source, max_bad_rate):
        return PreparedDataset(target)
    folder = target.with_name(f".{split}.part")
    with claim(folder):
        recover(target.parent)
        try:
            # Another process may have prepared it while this one waited.
            if not _unchanged(target, root, source, max_bad_rate):
                _write(folder, target, name, source, root, max_bad_rate, progress)
                _replace(folder, target)
        except (ValueError, FileNotFoundError):
            # The user's files are to blame: they will be others when it is tried again.
            shutil.rmtree(folder)
            raise
        shutil.rmtree(folder, ignore_errors=True)
    return PreparedDataset(target)


@dataclass(frozen=True, slots=True)
class Job:
    """The arguments of one ``prepare``."""

    name: str
    root: Path
    split: str
    out: Path
    source: Source
    max_bad_rate: float = 0.0

    def run(self, progress: bool = True) -> PreparedDataset:
        return prepare(
            self.name,
            self.root,
            self.split,
            self.out,
            source=self.source,
            max_bad_rate=self.max_bad_rate,
            progress=progress,
        )


def prepare_all(jobs: list[Job], workers: int | None = None) -> list[PreparedDataset]:
    """Prepares several sets at a time, one in each process. Those that are done stay done.

    A process takes seconds to start, so small sets are prepared one after the other.
    """
    todo = list(dict.fromkeys(job.out / job.name / job.split for job in jobs))
    workers = min(workers or os.cpu_count() or 1, len(todo))
    if workers == 1 or sum(_annotation_bytes(job) for job in jobs) < PARALLEL_BYTES:
        return [job.run() for job in jobs]
    unique = {job.out / job.name / job.split: job for job in jobs}
    with (
        ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool,
        progress_bar("preparing", "data sets") as advance,
    ):
        running = {pool.submit(job.run, False): key for key, job in unique.items()}
        done = {}
        for future in as_completed(running):
            done[running[future]] = future.result()
            advance(len(done), len(running))
    return [done[job.out / job.name / job.split] for job in jobs]


def _annotation_bytes(job: Job) -> int:
    """An estimate; 0 for what is prepared already, so that nothing is started for it."""
    target = job.out / job.name / job.split
    if (target / "manifest.json").is_file():
        return 0
    files = [*job.root.glob("annotations/*"), *job.root.glob("*.*")]
    return sum(path.stat().st_size for path in files if path.is_file())


def _write(
    folder: Path,
    target: Path,
    name: str,
    source: Source,
    root: Path,
    max_bad_rate: float,
    progress: bool,
) -> None:
    """Writes the prepared files of ``target`` into ``folder``; the manifest comes last."""
    split, image_root = target.name, root / source.images
    rows = _read(folder, name, source, root, split, progress)
    lines = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in rows.bad)
    count = sum(rows.tasks.values())
    if len(rows.bad) > max_bad_rate * rows.seen:
        kept = target.with_name(f"{split}.{BAD_FILE}")
        write_text(kept, lines)
        shown = "".join(f"\n  {b['file']}:{b['record']}: {b['reason']}" for b in rows.bad[:5])
        raise ValueError(
            f"{name} {split}: {len(rows.bad)} of {rows.seen} samples are bad, more than the rate "
            f"of {max_bad_rate:g} allowed:{shown}\nAll are in {kept}. Repair them, or raise "
            "`max_bad_rate` to leave them out"
        )
    if not count:
        raise ValueError(f"{name} {split}: no example in {root}; expected {source.files}")
    (folder / BAD_FILE).write_text(lines, encoding="utf-8")
    facts = update_facts(
        folder / FACTS_FILE,
        image_names(folder / DATA_FILE),
        image_root,
        f"{name} {split}",
        known=read_facts(target / FACTS_FILE),
        progress=progress,
    )
    manifest = {
        "format_version": FORMAT_VERSION,
        "source": name,
        "split": split,
        "count": count,
        "tasks": dict(rows.tasks),
        "bad": len(rows.bad),
        "bad_reasons": dict(Counter(line["kind"] for line in rows.bad)),
        "max_bad_rate": max_bad_rate,
        "root": str(root),
        "settings": source.settings,
        "image_root": str(image_root),
        "images": summary(facts),
        "bytes": (folder / DATA_FILE).stat().st_size,
        "licence": source.licence,
        "annotations": [
            stamp | {"sha256": sha256_of(root / stamp["file"], _out_of(target))}
            for stamp in rows.files["annotations"]
        ],
        "absent": rows.files["absent"],
    }
    write_json(folder / MANIFEST_FILE, manifest)


def _read(
    folder: Path, name: str, source: Source, root: Path, split: str, progress: bool
) -> Partial:
    """Reads all rows into ``folder``, or those that an interrupted preparation had not reached."""
    image_root, out = root / source.images, _out_of(folder)
    key = {"version": FORMAT_VERSION, "root": str(root), "settings": source.settings}
    rows = Partial(folder, key)
    check = _Check(image_root, split, rows)
    repaired = any(not name or check.there(name) for name in rows.missing)
    if repaired or not same_files(rows.files, root, out, by_content=False):
        rows.restart()
    with (
        note_files() as files,
        progress_bar(f"{name} {split}", "bytes", shown=progress) as advance,
    ):
        unread = () if rows.ended else islice(source.read(root, split), rows.seen, None)
        good = check.good(unread)
        while examples := list(islice(good, ROWS_PER_BATCH)):
            rows.append(examples)
            advance(*files.position())
            if rows.due():
                rows.save(stamps_of(files, root, out))
        if not rows.ended:
            rows.save(stamps_of(files, root, out), ended=True)
    rows.close()
    return rows


class _Check:
    """Passes good examples on and notes the bad ones in ``rows``."""

    def __init__(self, image_root: Path, split: str, rows: Partial) -> None:
        self.image_root, self.split, self.rows = image_root, split, rows
        self.listed: dict[str, frozenset[str]] = {}
        self.unreadable: dict[str, str] = {}

    def good(self, examples: Iterable[Example]) -> Iterator[Example]:
        for example in examples:
            found = self.fault(example)
            if found is None:
                yield example
                continue
            file, _, record = example.where.partition(":")
            kind, reason = found
            self.rows.bad.append({"file": file, "record": record, "kind": kind, "reason": reason})

    def fault(self, example: Example) -> tuple[str, str] | None:
        if not example.images:
            self.rows.missing.append("")  # the names under which they may appear are unknown
            return "no image", "no image, or no frames in the folder of this video"
        for name in example.images:
            if not self.there(image_name(name, example.where)):
                self.rows.missing.append(name)
                if (folder := name.rpartition("/")[0]) in self.unreadable:
                    return "unreadable folder", self.unreadable[folder]
                return "missing image", f"image {self.image_root / name} does not exist"
        if self.split == "train" and not example.taught:
            return "no answer", "a training example needs an answer"
        return None

    def there(self, name: str) -> bool:
        """Whether the picture of this name exists; its contents are not looked at."""
        folder, _, base = name.rpartition("/")
        return base in self.names(folder)

    def names(self, folder: str) -> frozenset[str]:
        """File names of a folder, read in one pass: a stat per picture is slow on a network."""
        if folder not in self.listed:
            path = self.image_root / folder
            names: list[str] = []
            try:
                names = [entry.name for entry in os.scandir(path)]
            except (FileNotFoundError, NotADirectoryError):
                pass
            except OSError as error:
                self.unreadable[folder] = f"folder {path} cannot be read: {error.strerror}"
            self.listed[folder] = frozenset(names)
        return self.listed[folder]


def _unchanged(target: Path, root: Path, source: Source, max_bad_rate: float) -> bool:
    """Whether ``target`` was prepared from the files that are at ``root`` now."""
    try:
        manifest = json.loads((target / MANIFEST_FILE).read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return False
    return (
        manifest.get("format_version") == FORMAT_VERSION
        and manifest["root"] == str(root)
        and manifest["settings"] == source.settings
        and manifest["max_bad_rate"] == max_bad_rate
        and (target / DATA_FILE).is_file()
        and same_files(manifest, root, _out_of(target), by_content=True)
    )


def _out_of(target: Path) -> Path:
    """The folder of all prepared data, in which ``target`` is ``<name>/<split>``."""
    return target.parents[1].resolve()


def _replace(folder: Path, target: Path) -> None:
    """Puts the finished folder in place; what was there stays until the new one is whole."""
    for name in (STATE_FILE, LOCK_FILE):
        (folder / name).unlink()
    put_directory(folder, target)
