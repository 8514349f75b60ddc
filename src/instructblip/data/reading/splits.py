"""The names under which data says that it is for training, validation or the test."""

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

SPLITS = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation", "dev"),
    "test": ("test", "testing"),
}
"""The splits of this package, each with the names that others give it."""


def split_named(name: str) -> str | None:
    """The split that a name stands for, whatever its case; None for any other name."""
    plain = name.strip().casefold()
    return next((split for split, names in SPLITS.items() if plain in names), None)


def split_of_file(path: Path) -> str | None:
    """The split that the first or last word of a file name stands for: ``train-00000-of-00002``,
    ``chest_val``. None for any other name."""
    words = [word for word in re.split(r"[^a-z]+", path.stem.casefold()) if word not in ("", "of")]
    named = (split_named(word) for word in (*words[:1], *words[-1:]))
    return next((split for split in named if split), None)


def files_of_split(files: Sequence[Path], split: str) -> list[Path]:
    """The files of one split. Where no file is named for training, all belong to every split; where
    one is, those without a split in their names are for training too."""
    named = [split_of_file(file) for file in files]
    if "train" not in named:
        return list(files)
    return [file for file, name in zip(files, named, strict=True) if (name or "train") == split]


def first_folder(split: str, parents: Iterable[Path]) -> Path | None:
    """The first folder in ``parents`` that is named for the split."""
    paths = (parent / name for parent in parents for name in SPLITS[split])
    return next((path for path in paths if path.is_dir()), None)
