"""A folder of pictures (an ``imagefolder``) -> examples, all checked, split by picture."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from instructblip.core.batch import Example
from instructblip.data.images import load_image
from instructblip.data.own.files import Own, records_of
from instructblip.data.own.formats import folder_examples, is_metadata
from instructblip.data.prepared.check import placeholders
from instructblip.data.reading.records import walk_files

SHOWN = 20
"""Bad examples that a message lists; of the rest it gives the number."""


@dataclass(frozen=True)
class FolderSet:
    """Examples of one folder; what a loader and an evaluation read."""

    examples: Sequence[Example]
    image_root: Path
    name: str = "own"

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int, /) -> Example:
        return self.examples[index]


def read_folder(root: Path) -> FolderSet:
    """All examples of a folder, every picture decoded once. ValueError lists what is wrong
    with the first ``SHOWN``."""
    if not root.is_dir():
        raise FileNotFoundError(f"{root}: expected a folder of pictures")
    found = list(folder_examples(Own("own", "imagefolder"), root, "train"))
    if not any(isinstance(row, ValueError) or row.answers for row in found):
        raise ValueError(_nothing_told(root))
    problems = [problem for row in found if (problem := _problem(row, root))]
    if problems:
        shown = problems[:SHOWN]
        if more := len(problems) - len(shown):
            shown.append(f"and {more} more")
        listed = "".join(f"\n  {line}" for line in shown)
        raise ValueError(f"{len(problems)} of {len(found)} examples are bad:{listed}")
    return FolderSet([row for row in found if isinstance(row, Example)], root)


def _nothing_told(root: Path) -> str:
    """Why a folder has no answer: what its table holds, or that there is none."""
    table = next(filter(is_metadata, walk_files(root)), None)
    if table is None:
        return (
            f"{root} holds no metadata.jsonl or metadata.csv (.json, .tsv, .parquet), and no "
            "picture with a .txt beside it"
        )
    columns = next((", ".join(map(repr, record.data)) for _, record in records_of(table)), "")
    if not columns:
        return f"{table}: no row; expected one for each example"
    return (
        f"{table}: no row has an answer; expected a column `answer`, `caption` or `text`, and the "
        f"columns are {columns}"
    )


def _problem(row: Example | ValueError, root: Path) -> str:
    """Why a row cannot be used, by file and place; empty when it can."""
    if isinstance(row, ValueError):
        return str(row)
    if not row.answers:
        return f"{row.where}: no caption and no answer"
    for reason in placeholders(row):
        return f"{row.where}: {reason}"
    try:
        for name in row.images:
            load_image(name, root)
    except (ValueError, FileNotFoundError) as error:
        return f"{row.where}: {error}"
    return ""


def split_by_picture(folder: FolderSet, share: float = 0.2) -> tuple[FolderSet, FolderSet]:
    """(training, held back). Examples that have a picture in common are on one side, whatever the
    picture's name. A hash of the picture decides which, so that more pictures move no others; where
    it leaves a side empty, the nearest go there. ValueError for fewer than four pictures, or where
    all examples hang together."""
    names = {name for example in folder.examples for name in example.images}
    digests = {name: _sha256((folder.image_root / name).read_bytes()) for name in names}
    if (count := len({*digests.values()})) < 4:
        raise ValueError(f"{folder.image_root}: {count} pictures; expected at least 4")
    groups = _groups([[digests[name] for name in example.images] for example in folder.examples])
    order = sorted({*groups}, key=_sha256)
    if len(order) < 2:
        raise ValueError(
            f"{folder.image_root}: all rows hang together by pictures that they share, so none can "
            "be held back; expected at least two rows without a common picture"
        )
    below = sum(_sha256(group)[:8] < int(share * 2**64).to_bytes(8) for group in order)
    held = {*order[: min(max(1, below), len(order) - 1)]}
    sides = ([], [])
    for example, group in zip(folder.examples, groups, strict=True):
        sides[group in held].append(example)
    training = replace(folder, examples=sides[0])
    return training, replace(folder, examples=[replace(e, split="val") for e in sides[1]])


def _groups(rows: list[list[bytes]]) -> list[bytes]:
    """For each row of pictures the least of all that hang together with it."""
    less: dict[bytes, bytes] = {}

    def least(picture: bytes) -> bytes:
        while picture in less:
            picture = less[picture]
        return picture

    for pictures in rows:
        found = {least(picture) for picture in pictures}
        less.update((picture, min(found)) for picture in found - {min(found)})
    return [least(pictures[0]) for pictures in rows]


def _sha256(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()
