"""A folder of images (an ``imagefolder``) -> examples, all checked, and split by image."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from instructblip.core.batch import Example
from instructblip.data.custom.formats import folder_examples, is_metadata, records_of
from instructblip.data.custom.rows import CustomSet
from instructblip.data.images import load_image
from instructblip.data.prepared.check import placeholders
from instructblip.data.reading.records import walk_files

MAX_LISTED = 20
"""Bad examples that a message lists; it counts the rest."""


@dataclass(frozen=True)
class FolderSet:
    """Examples of one folder, for a loader or an evaluation."""

    examples: Sequence[Example]
    image_root: Path
    name: str = "own"

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int, /) -> Example:
        return self.examples[index]


def read_folder(root: Path, language: str = "en") -> FolderSet:
    """All examples of a folder, with every image decoded once. Of captions in several languages
    those in ``language`` are read.

    ValueError lists the first ``MAX_LISTED`` bad examples, or says why none has an answer.
    """
    if not root.is_dir():
        raise FileNotFoundError(f"{root}: expected a folder of images")
    custom = CustomSet("own", "imagefolder", language=language)
    rows = list(folder_examples(custom, root, "train"))
    if not any(isinstance(row, ValueError) or row.answers for row in rows):
        raise ValueError(_why_no_answers(root))
    problems = [problem for row in rows if (problem := _problem(row, root))]
    if problems:
        listed = problems[:MAX_LISTED]
        if more := len(problems) - len(listed):
            listed.append(f"and {more} more")
        lines = "".join(f"\n  {line}" for line in listed)
        raise ValueError(f"{len(problems)} of {len(rows)} examples are bad:{lines}")
    return FolderSet([row for row in rows if isinstance(row, Example)], root)


def _why_no_answers(root: Path) -> str:
    table = next(filter(is_metadata, walk_files(root)), None)
    if table is None:
        return (
            f"{root} holds no metadata.jsonl or metadata.csv (.json, .tsv, .parquet), and no "
            "image with a .txt beside it"
        )
    columns = next((", ".join(map(repr, record.data)) for _, record in records_of(table)), "")
    if not columns:
        return f"{table}: no row; expected one for each example"
    return (
        f"{table}: no row has an answer; expected a column `answer`, `caption` or `text`, and the "
        f"columns are {columns}"
    )


def _problem(row: Example | ValueError, root: Path) -> str:
    """Why a row cannot be used, with its file and place; empty when it can."""
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


def split_by_image(folder: FolderSet, share: float = 0.2) -> tuple[FolderSet, FolderSet]:
    """(training, validation). Examples that share an image, by its bytes, are on one side.

    A hash of the image decides the side, so adding images moves no others; where the hash leaves
    a side empty, the nearest examples fill it. ValueError for fewer than four images, or where
    shared images connect all examples.
    """
    names = {name for example in folder.examples for name in example.images}
    digests = {name: _sha256((folder.image_root / name).read_bytes()) for name in names}
    if (count := len({*digests.values()})) < 4:
        raise ValueError(f"{folder.image_root}: {count} images; expected at least 4")
    groups = _groups([[digests[name] for name in example.images] for example in folder.examples])
    order = sorted({*groups}, key=_sha256)
    if len(order) < 2:
        raise ValueError(
            f"{folder.image_root}: shared images connect all rows, so none can be held back; "
            "expected at least two rows without a common image"
        )
    below = sum(_sha256(group)[:8] < int(share * 2**64).to_bytes(8) for group in order)
    held_back = {*order[: min(max(1, below), len(order) - 1)]}
    pairs = list(zip(folder.examples, groups, strict=True))
    training = [example for example, group in pairs if group not in held_back]
    validation = [replace(e, split="val") for e, group in pairs if group in held_back]
    return replace(folder, examples=training), replace(folder, examples=validation)


def _groups(rows: list[list[bytes]]) -> list[bytes]:
    """For each row of images, the least of all images connected with it (union-find)."""
    parent: dict[bytes, bytes] = {}

    def least(image: bytes) -> bytes:
        while image in parent:
            image = parent[image]
        return image

    for images in rows:
        roots = {least(image) for image in images}
        parent.update((image, min(roots)) for image in roots - {min(roots)})
    return [least(images[0]) for images in rows]


def _sha256(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()
