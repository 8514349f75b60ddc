"""Read a source once, verify it, and keep it memory-mapped.

``out/<source>/<split>/`` holds ``data.arrow`` (an Arrow stream that Hugging Face ``datasets``
opens with ``Dataset.from_file``), ``manifest.json`` and ``bad_samples.jsonl``. Pictures stay
where they are. Preparing again does nothing while the annotation files are the same.
"""

import hashlib
import json
import os
import shutil
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, fields
from itertools import accumulate, islice
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pyarrow as pa

from instructblip.batch import Example
from instructblip.data.progress import progress_bar
from instructblip.data.sources import Source, source_of
from instructblip.data.sources.opened import FilesRead, note_files
from instructblip.data.sources.records import image_name

FORMAT_VERSION = 1
ROWS_PER_BATCH = 2048
PARALLEL_BYTES = 1 << 27
ANNOTATION_FILES = (".json", ".jsonl", ".csv", ".txt", ".arrow")

_TEXTS = pa.list_(pa.string())
_TURN = pa.struct([("question", pa.string()), ("answer", pa.string())])
SCHEMA = pa.schema(
    [
        ("dataset", pa.string()),
        ("split", pa.string()),
        ("id", pa.string()),
        ("images", _TEXTS),
        ("task", pa.string()),
        ("question", pa.string()),
        ("answers", _TEXTS),
        ("choices", _TEXTS),
        ("context", pa.string()),
        ("ocr_tokens", _TEXTS),
        ("history", pa.list_(_TURN)),
        ("where", pa.string()),
        ("extra", pa.string()),  # JSON
    ]
)
assert SCHEMA.names == [field.name for field in fields(Example)]


class PreparedDataset:
    """Examples of one prepared split. ``dataset[i] -> Example``; pictures below ``image_root``.

    Holds a memory map, not the rows: a copy for a worker process carries the path alone.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        file = self.path / "manifest.json"
        if not file.is_file():
            raise FileNotFoundError(f"{self.path} is not a prepared data set; run `prepare` first")
        self.manifest: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        if self.manifest.get("format_version") != FORMAT_VERSION:
            raise ValueError(
                f"{file}: format {self.manifest.get('format_version')}; this version reads "
                f"{FORMAT_VERSION}. Prepare the data again"
            )
        self.name: str = self.manifest["source"]
        self.split: str = self.manifest["split"]
        self.image_root = Path(self.manifest["image_root"])
        self._batches: list[pa.RecordBatch] | None = None
        self._ends: list[int] = []

    def __len__(self) -> int:
        return int(self.manifest["count"])

    def __getitem__(self, index: int) -> Example:
        if not 0 <= index < len(self):
            raise IndexError(f"example {index} of {len(self)} in {self.path}")
        batches = self._open()
        i = bisect_right(self._ends, index)
        row = index - (self._ends[i] - batches[i].num_rows)
        return _to_example(batches[i].slice(row, 1).to_pylist()[0])

    def __iter__(self) -> Iterator[Example]:
        return (_to_example(row) for batch in self._open() for row in batch.to_pylist())

    def column(self, name: str) -> Iterator[Any]:
        """One field of every example, without building the others."""
        return (value for batch in self._open() for value in batch.column(name).to_pylist())

    def images(self) -> set[tuple[str, ...]]:
        """The distinct ``Example.images``, without reading anything else."""
        return {tuple(names) for names in self.column("images")}

    def _open(self) -> list[pa.RecordBatch]:
        if self._batches is None:
            with pa.ipc.open_stream(pa.memory_map(str(self.path / "data.arrow"))) as reader:
                self._batches = list(reader)
            self._ends = list(accumulate(batch.num_rows for batch in self._batches))
        return self._batches

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_batches": None, "_ends": []}

    def __repr__(self) -> str:
        return f"PreparedDataset({self.name} {self.split}, {len(self)} examples)"


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
    if (target / "manifest.json").is_file() and _unchanged(target, root, source, max_bad_rate):
        return PreparedDataset(target)
    temporary = target.with_name(f".{split}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        _write(temporary, target, name, source, root, max_bad_rate, progress)
        _replace(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
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
    split = target.name
    image_root = root / source.images
    check = _Check(image_root, split)
    tasks: Counter[str] = Counter()
    with (
        note_files() as files,
        pa.OSFile(str(folder / "data.arrow"), "wb") as sink,
        pa.ipc.new_stream(sink, SCHEMA) as writer,
        progress_bar(f"{name} {split}", "bytes", shown=progress) as advance,
    ):
        good = check.good(source.read(root, split))
        while rows := list(islice(good, ROWS_PER_BATCH)):
            tasks.update(example.task for example in rows)
            writer.write_batch(_to_batch(rows))
            advance(*files.position())
    count, bad = sum(tasks.values()), check.bad
    lines = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in bad)
    (folder / "bad_samples.jsonl").write_text(lines, encoding="utf-8")
    if len(bad) > max_bad_rate * (count + len(bad)):
        kept = target.with_name(f"{split}.bad_samples.jsonl")
        kept.write_text(lines, encoding="utf-8")
        shown = "".join(f"\n  {b['file']}:{b['record']}: {b['reason']}" for b in bad[:5])
        raise ValueError(
            f"{name} {split}: {len(bad)} of {count + len(bad)} samples are bad, more than the rate "
            f"of {max_bad_rate:g} allowed:{shown}\nAll are in {kept}. Repair them, or raise "
            "`max_bad_rate` to leave them out"
        )
    if not count:
        raise ValueError(f"{name} {split}: no example in {root}; expected {source.files}")
    manifest = {
        "format_version": FORMAT_VERSION,
        "source": name,
        "split": split,
        "count": count,
        "tasks": dict(tasks),
        "bad": len(bad),
        "bad_reasons": dict(Counter(line["kind"] for line in bad)),
        "max_bad_rate": max_bad_rate,
        "root": str(root),
        "settings": source.settings,
        "image_root": str(image_root),
        "bytes": (folder / "data.arrow").stat().st_size,
        "licence": source.licence,
        "annotations": [_stamp(path, root) | {"sha256": _sha256(path)} for path in files.found],
        "absent": _absent(files, root),
    }
    text = json.dumps(manifest, indent=2, ensure_ascii=False) + "\n"
    (folder / "manifest.json").write_text(text, encoding="utf-8")


class _Check:
    """Passes good examples on and notes the bad ones."""

    def __init__(self, image_root: Path, split: str) -> None:
        self.image_root, self.split = image_root, split
        self.listed: dict[str, frozenset[str]] = {}
        self.bad: list[dict[str, str]] = []

    def good(self, examples: Iterable[Example]) -> Iterator[Example]:
        for example in examples:
            found = self.fault(example)
            if found is None:
                yield example
                continue
            file, _, record = example.where.partition(":")
            kind, reason = found
            self.bad.append({"file": file, "record": record, "kind": kind, "reason": reason})

    def fault(self, example: Example) -> tuple[str, str] | None:
        if not example.images:
            return "no picture", "no picture, or no frames in the folder of this video"
        for name in example.images:
            folder, _, base = image_name(name, example.where).rpartition("/")
            if base not in self.names(folder):
                return "missing picture", f"picture {self.image_root / name} does not exist"
        if self.split == "train" and not any(answer.strip() for answer in example.answers):
            return "no answer", "a training example needs an answer"
        return None

    def names(self, folder: str) -> frozenset[str]:
        """File names of a folder, read in one pass: a stat per picture is slow on a network."""
        if folder not in self.listed:
            try:
                entries = list(os.scandir(self.image_root / folder))
                self.listed[folder] = frozenset(entry.name for entry in entries)
            except (FileNotFoundError, NotADirectoryError):
                self.listed[folder] = frozenset()
        return self.listed[folder]


def _unchanged(target: Path, root: Path, source: Source, max_bad_rate: float) -> bool:
    """Whether ``target`` was prepared from the files that are at ``root`` now."""
    try:
        manifest = json.loads((target / "manifest.json").read_text(encoding="utf-8"))
    except ValueError:
        return False
    if (
        manifest.get("format_version") != FORMAT_VERSION
        or manifest.get("root") != str(root)
        or manifest.get("settings", "") != source.settings
        or manifest.get("max_bad_rate") != max_bad_rate
        or not (target / "data.arrow").is_file()
        or any((root / name).exists() for name in manifest["absent"])
    ):
        return False
    for known in manifest["annotations"]:
        path = root / known["file"]
        if not path.exists():
            return False
        now = _stamp(path, root)
        if now["bytes"] != known["bytes"]:
            return False
        if now["modified_ns"] != known["modified_ns"] and _sha256(path) != known["sha256"]:
            return False
    return True


def _absent(files: FilesRead, root: Path) -> list[str]:
    """Files that would be read instead or in addition if they appeared."""
    return [str(path.relative_to(root)) for path in files.absent]


def _files_of(path: Path) -> list[Path]:
    """The file itself, or the annotation files of a folder."""
    if not path.is_dir():
        return [path]
    return sorted(file for file in path.rglob("*") if file.suffix in ANNOTATION_FILES)


def _stamp(path: Path, root: Path) -> dict[str, Any]:
    stats = [file.stat() for file in _files_of(path)]
    return {
        "file": str(path.relative_to(root)),
        "bytes": sum(stat.st_size for stat in stats),
        "modified_ns": max((stat.st_mtime_ns for stat in stats), default=0),
    }


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    for file in _files_of(path):
        with file.open("rb") as opened:
            while block := opened.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def _replace(temporary: Path, target: Path) -> None:
    """Puts the finished folder in place; what was there stays until the new one is whole."""
    for file in temporary.iterdir():
        with file.open("rb") as opened:
            os.fsync(opened.fileno())
    old = target.with_name(f".{target.name}.{os.getpid()}.old")
    if target.exists():
        target.rename(old)
    temporary.rename(target)
    shutil.rmtree(old, ignore_errors=True)


def _to_batch(examples: list[Example]) -> pa.RecordBatch:
    columns: dict[str, list[Any]] = {
        name: [getattr(example, name) for example in examples] for name in SCHEMA.names
    }
    columns["history"] = [
        [{"question": question, "answer": answer} for question, answer in turns]
        for turns in columns["history"]
    ]
    columns["extra"] = [json.dumps(extra, ensure_ascii=False) for extra in columns["extra"]]
    return pa.RecordBatch.from_pydict(columns, schema=SCHEMA)


def _to_example(row: dict[str, Any]) -> Example:
    for name in ("images", "answers", "choices", "ocr_tokens"):
        row[name] = tuple(row[name])
    row["history"] = tuple((turn["question"], turn["answer"]) for turn in row["history"])
    row["extra"] = json.loads(row["extra"])
    return Example(**row)
