"""A folder of pictures (an ``imagefolder``) -> examples, all checked, split by picture."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from instructblip.batch import Example
from instructblip.data.images import load_image
from instructblip.data.sources.own import folder_examples
from instructblip.data.sources.own_files import Own


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
    """All examples of a folder, every picture decoded once. ValueError lists what is wrong."""
    if not root.is_dir():
        raise FileNotFoundError(f"{root}: expected a folder of pictures")
    found = list(folder_examples(Own("own", "imagefolder"), root, "train"))
    if not any(isinstance(row, ValueError) or row.answers for row in found):
        raise ValueError(
            f"{root} holds no metadata.jsonl, no metadata.csv and no picture with a .txt beside it"
        )
    problems = [problem for row in found if (problem := _problem(row, root))]
    if problems:
        shown = "\n  ".join(problems[:20])
        raise ValueError(f"{len(problems)} of {len(found)} examples are bad:\n  {shown}")
    return FolderSet([row for row in found if isinstance(row, Example)], root)


def _problem(row: Example | ValueError, root: Path) -> str:
    """Why a row cannot be used, by file and place; empty when it can."""
    if isinstance(row, ValueError):
        return str(row)
    if not row.answers:
        return f"{row.where}: no caption and no answer"
    try:
        for name in row.images:
            load_image(name, root)
    except (ValueError, FileNotFoundError) as error:
        return f"{row.where}: {error}"
    return ""


def split_by_picture(folder: FolderSet, share: float = 0.2) -> tuple[FolderSet, FolderSet]:
    """(training, held back). A picture is on one side only, always the same one; at least one
    picture and at most 500 are held back. ValueError for fewer than four pictures."""
    pictures = {example.images for example in folder.examples}
    order = sorted(pictures, key=lambda names: hashlib.sha256("\0".join(names).encode()).digest())
    if len(order) < 4:
        raise ValueError(f"{folder.image_root}: {len(order)} pictures; expected at least 4")
    held = set(order[: max(1, min(500, round(len(order) * share)))])
    sides = ([], [])
    for example in folder.examples:
        sides[example.images in held].append(example)
    training = replace(folder, examples=sides[0])
    return training, replace(folder, examples=[replace(e, split="val") for e in sides[1]])
