"""A prepared split on disk: examples, manifest and facts about images; images stay where they are.

``data.arrow`` is an Arrow IPC stream, which Hugging Face ``datasets`` opens with
``Dataset.from_file``: the schema, then record batches of up to 2,048 examples. It is memory-mapped:
opening it reads the sizes of the batches, and example i the pages of its one row, which processes
on one machine share.
"""

import json
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from itertools import accumulate, chain
from pathlib import Path
from typing import Any

import pyarrow as pa

from instructblip.core.example import Example
from instructblip.core.files import current, read_json, write_json
from instructblip.data.prepared.images import (
    FACTS_FILE,
    ImageFact,
    read_facts,
    summary,
    update_facts,
)
from instructblip.data.samples import Examples

FORMAT_VERSION = 2
DATA_FILE = "data.arrow"
MANIFEST_FILE = "manifest.json"

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
    """The examples of one prepared split, by index; their images are below ``image_root``.

    A copy for a worker process carries the path and the manifest, not the rows. Raises
    FileNotFoundError for an unprepared path, ValueError for another format version.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = current(Path(path))
        file = self.path / MANIFEST_FILE
        if not file.is_file():
            raise FileNotFoundError(f"{self.path} is not a prepared data set; run `prepare` first")
        self.manifest: dict[str, Any] = read_json(file)
        if self.manifest.get("format_version") != FORMAT_VERSION:
            raise ValueError(
                f"{file}: format {self.manifest.get('format_version')}; this version reads "
                f"{FORMAT_VERSION}. Prepare the data again"
            )
        self.name: str = self.manifest["source"]
        self.split: str = self.manifest["split"]
        self.image_root = Path(self.manifest["image_root"])
        self._batches: list[pa.RecordBatch] | None = None
        self._ends: list[int] = []  # of each batch, the index after its last example

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

    @property
    def has_groups(self) -> bool:
        """Whether the examples have ``extra["group"]``."""
        return len(self) > 0 and "group" in self[0].extra

    def images(self) -> set[tuple[str, ...]]:
        """The distinct ``Example.images``, without reading anything else."""
        columns = (batch.column("images").to_pylist() for batch in self._open())
        return {tuple(names) for names in chain.from_iterable(columns)}

    def facts(self) -> dict[str, ImageFact]:
        """The stored facts about the image files, by path."""
        known = read_facts(self.path / FACTS_FILE)
        return {str(self.image_root / name): fact for name, fact in known.items()}

    def update_images(self, decode: bool = False, perceptual: bool = False) -> dict[str, ImageFact]:
        """Facts about every image as it is now, by name, stored here and in the manifest."""
        facts = update_facts(
            self.path / FACTS_FILE,
            image_names(self.path / DATA_FILE),
            self.image_root,
            f"checking {self.name} {self.split}",
            decode=decode,
            perceptual=perceptual,
        )
        if self.manifest["images"] != summary(facts):
            self.manifest["images"] = summary(facts)
            write_json(self.path / MANIFEST_FILE, self.manifest)
        return facts

    def describe(self) -> str:
        """``vqav2 train: 9,000 examples, 3,000 images of 12.3 MB; CC BY 4.0``."""
        manifest, images = self.manifest, self.manifest["images"]
        bad = f", {manifest['bad']:,} bad ones skipped" if manifest["bad"] else ""
        return (
            f"{self.name} {self.split}: {len(self):,} examples{bad}, {images['count']:,} images "
            f"of {images['bytes'] / 1e6:,.1f} MB; {manifest['licence']}"
        )

    def _open(self) -> list[pa.RecordBatch]:
        if self._batches is None:
            with pa.ipc.open_stream(pa.memory_map(str(self.path / DATA_FILE))) as reader:
                self._batches = list(reader)
            self._ends = list(accumulate(batch.num_rows for batch in self._batches))
        return self._batches

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_batches": None, "_ends": []}

    def __repr__(self) -> str:
        return f"PreparedDataset({self.name} {self.split}, {len(self)} examples)"


@dataclass(frozen=True)
class DatasetView:
    """Some examples of a data set, by index."""

    dataset: Examples
    indices: Sequence[int]

    @property
    def name(self) -> str:
        return self.dataset.name

    @property
    def image_root(self) -> Path:
        return self.dataset.image_root

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int, /) -> Example:
        return self.dataset[self.indices[index]]

    def images(self) -> set[tuple[str, ...]]:
        """The distinct ``Example.images``."""
        return {self[i].images for i in range(len(self))}


def image_names(data: Path) -> dict[str, None]:
    """The images of the examples in a ``data.arrow``, each once, in the order of the examples."""
    with pa.ipc.open_stream(pa.memory_map(str(data))) as reader:
        parts = (batch.column("images").flatten().unique().to_pylist() for batch in reader)
        return dict.fromkeys(name for part in parts for name in part)


def to_batch(examples: list[Example]) -> pa.RecordBatch:
    """The rows of ``data.arrow`` for these examples."""
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
