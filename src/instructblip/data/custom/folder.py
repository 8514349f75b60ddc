"""A folder of images (an ``imagefolder``) -> examples, all checked, and split."""

import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Literal, NamedTuple

from instructblip.core.example import Example
from instructblip.data.answers import placeholders
from instructblip.data.custom.formats import (
    folder_of_split,
    has_split_column,
    is_metadata,
    only_table,
    read_custom,
    rows_of,
)
from instructblip.data.custom.rows import CustomSet, Row
from instructblip.data.prepared.near import Look, look_of, near_duplicates
from instructblip.data.reading.images import load_image
from instructblip.data.reading.records import (
    IMAGE_SUFFIXES,
    image_stem,
    images_by_stem,
    list_folder,
    walk_files,
)
from instructblip.data.reading.splits import SPLITS

SplitBy = Literal["images", "column", "files"]
"""How a folder is split: by a hash of each image, or as its column or its files say."""

LEAST_IMAGES = 4
"""Different images that a split needs."""
MAX_LISTED = 20
"""Bad examples that a message lists; it counts the rest."""


@dataclass(frozen=True)
class FolderSet:
    """Examples of one folder, for a loader or an evaluation."""

    examples: Sequence[Example]
    image_root: Path
    name: str = "own"
    looks: Mapping[str, Look] = field(default_factory=dict, repr=False)
    """What is compared of each image of the folder to find near-duplicates."""

    @property
    def images(self) -> set[str]:
        """The names of the images that the examples show."""
        return {name for example in self.examples for name in example.images}

    def __iter__(self) -> Iterator[Example]:
        return iter(self.examples)

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int, /) -> Example:
        return self.examples[index]


@dataclass(frozen=True)
class Sides:
    """A folder, split. ``test`` is None where nothing but ``validation`` is held back."""

    training: FolderSet
    validation: FolderSet
    test: FolderSet | None
    by: SplitBy

    @property
    def final(self) -> FolderSet:
        """The side that scores are reported on."""
        return self.test or self.validation

    @property
    def all(self) -> list[FolderSet]:
        """The sides that there are."""
        return [self.training, self.validation, *filter(None, [self.test])]

    @cached_property
    def lookalikes(self) -> list[tuple[str, str]]:
        """(training image, held-back image) of each pair of near-duplicates."""
        training, held = (
            {name: side.looks[name] for side in sides for name in side.images}
            for sides in ([self.training], [self.validation, self.final])
        )
        return sorted((pair.left, pair.right) for pair in near_duplicates(training, held))


def read_sides(
    root: Path, by: SplitBy | None = None, group: str | None = None, language: str = "en"
) -> Sides:
    """Read and check a folder and split it, by default as its column ``split`` or its files say and
    where neither does, by image.

    Args:
        group: what may not be on two sides: a column, or a regular expression over image paths.
        language: of captions in several languages those in this one are read.

    Raises ValueError for bad examples, for a split that the folder does not have, and for a group
    on two sides.
    """
    rows, given = _all_rows(root, group, language)
    found: SplitBy = "images"
    if given:
        found = "column" if has_split_column(root) else "files"
    if by not in (None, "images", found):
        expected = {
            "column": "a column `split` with train, val or test in every row",
            "files": "folders or tables named train, val or test",
        }
        raise ValueError(f"{root}: --split {by} needs {expected[by or found]}")
    folder = _checked(rows, root)
    if by == "images" or not given:
        return Sides(*split_by_image(folder), None, "images")
    sides = [
        replace(folder, examples=[e for e in folder.examples if e.split == split])
        for split in SPLITS
    ]
    training, *held = sides
    held = [side for side in held if len(side)]
    if not len(training) or not held:
        counts = ", ".join(f"{split} {len(s)}" for split, s in zip(SPLITS, sides, strict=True))
        raise ValueError(f"{root}: the split has {counts}; expected train, and val or test")
    _refuse_shared_groups(sides)
    return Sides(training, held[0], held[1] if len(held) > 1 else None, found)


def _refuse_shared_groups(sides: Sequence[FolderSet]) -> None:
    groups = [{e.extra["group"] for e in side.examples if "group" in e.extra} for side in sides]
    if shared := sorted(groups[0] & (groups[1] | groups[2]) | groups[1] & groups[2]):
        raise ValueError(
            f"{sides[0].image_root}: {len(shared)} groups are on two sides of the split: "
            f"{', '.join(shared[:5])}; move each to one side, or split with --split images"
        )


def read_folder(root: Path, language: str = "en", group: str | None = None) -> FolderSet:
    """All examples of a folder without a split, with every image decoded once. Of captions in
    several languages those in ``language`` are read.

    ValueError lists the first ``MAX_LISTED`` bad examples, or says why none has an answer.
    """
    return _checked(_read_rows(root, "train", group, language), root)


def read_partly(root: Path, language: str = "en") -> tuple[FolderSet, FolderSet]:
    """The examples of a folder with an answer and those without one, of all its splits, with every
    image decoded once. An image that no row names is asked what most rows ask.

    ValueError lists the first ``MAX_LISTED`` bad examples.
    """
    rows, _ = _all_rows(root, None, language)
    unlabelled = [row for row in rows if isinstance(row, Example) and not row.answers]
    labelled = [row for row in rows if isinstance(row, ValueError) or row.answers]
    known = [row for row in rows if isinstance(row, Example)]
    named = {name for row in known for name in row.images}
    asked = Counter((row.task, row.question, row.choices) for row in known).most_common(1)
    task, question, choices = asked[0][0] if asked else ("caption", "", ())
    for path in walk_files(root):
        name = path.relative_to(root).as_posix()
        if path.suffix.lower() in IMAGE_SUFFIXES and name not in named:
            unlabelled.append(
                Example(
                    dataset="own",
                    split="train",
                    id=name,
                    images=(name,),
                    task=task,
                    question=question,
                    choices=choices,
                    where=name,
                )
            )
    if not labelled and not unlabelled:
        raise ValueError(f"{root} has no images; expected files such as .jpg or .png")
    empty = FolderSet([], root)
    return (
        _checked(labelled, root) if labelled else empty,
        _checked(unlabelled, root, answered=False) if unlabelled else empty,
    )


def _all_rows(
    root: Path, group: str | None, language: str
) -> tuple[list[Example | ValueError], bool]:
    """The rows of all splits, each once, and whether the folder says which split they are in."""
    parts = {split: _read_rows(root, split, group, language) for split in SPLITS}
    places = [[str(r) if isinstance(r, ValueError) else r.where for r in p] for p in parts.values()]
    given = any(each != places[0] for each in places)
    rows = [row for part in (parts.values() if given else [parts["train"]]) for row in part]
    # the error of a row whose split is unknown is in every part
    return [*{str(r) if isinstance(r, ValueError) else id(r): r for r in rows}.values()], given


def _read_rows(
    root: Path, split: str, group: str | None, language: str
) -> list[Example | ValueError]:
    if not root.is_dir():
        raise FileNotFoundError(f"{root}: expected a folder of images")
    custom = CustomSet("own", "imagefolder", group=group, language=language)
    return list(read_custom(custom, root, split))


def _checked(rows: Sequence[Example | ValueError], root: Path, answered: bool = True) -> FolderSet:
    if answered and not any(isinstance(row, ValueError) or row.answers for row in rows):
        raise ValueError(_why_no_answers(root))
    looks: dict[str, Look] = {}
    problems = [problem for row in rows if (problem := _problem(row, root, looks, answered))]
    if problems:
        listed = [problem.describe() for problem in problems[:MAX_LISTED]]
        if more := len(problems) - len(listed):
            listed.append(f"and {more} more")
        lines = "".join(f"\n  {line}" for line in listed)
        raise ValueError(f"{len(problems)} of {len(rows)} examples are bad:{lines}")
    return FolderSet([row for row in rows if isinstance(row, Example)], root, looks=looks)


def _why_no_answers(root: Path) -> str:
    paths = walk_files(root)
    table = next(filter(is_metadata, paths), None) or next(iter(only_table(root, paths)), None)
    if table is None:
        folder = folder_of_split(root, "train") or root
        images = [p for p in walk_files(folder) if p.suffix.lower() in IMAGE_SUFFIXES]
        inner = sorted({p.relative_to(folder).parts[0] for p in images if p.parent != folder})
        remedy = ""
        if len(inner) == 1:
            remedy = (
                f". Folders are read as labels where there are two or more; {folder} has one, "
                f"{inner[0]!r}. If the labels are the folders in it, give {folder / inner[0]}"
            )
        if inner and (beside := [p.name for p in images if p.parent == folder]):
            remedy = (
                ". Folders are read as labels where all images are in them; beside them are "
                f"{len(beside)} images, such as {beside[0]}: move each into the folder of its label"
            )
        return (
            f"{root} holds no table of its images (metadata.csv, or one .csv, .jsonl, .json, .tsv, "
            f".parquet of any name), and no image with a .txt beside it{remedy}"
        )
    row = next(rows_of(table), None)
    if not isinstance(row, Row):
        return f"{table}: no row; expected one for each example"
    columns = ", ".join(map(repr, row.record.data))
    return (
        f"{table}: no row has an answer; expected a column `answer`, `caption` or `text`, and the "
        f"columns are {columns}"
    )


class _Problem(NamedTuple):
    reason: str
    absent: Path | None = None
    """The image that does not exist."""

    def describe(self) -> str:
        """The reason, with the name of an image that may be meant."""
        if self.absent is None or not self.absent.parent.is_dir():
            return self.reason
        names = [path.name for path in list_folder(self.absent.parent)]
        near = images_by_stem(names).get(image_stem(self.absent.name))
        return self.reason + (f"; did you mean {near}?" if near else "")


def _problem(
    row: Example | ValueError, root: Path, looks: dict[str, Look], answered: bool
) -> _Problem | None:
    """Why a row cannot be used, with its file and place; None when it can. Adds the looks of its
    images to ``looks``."""
    if isinstance(row, ValueError):
        return _Problem(str(row))
    if answered and not row.answers:
        return _Problem(f"{row.where}: no caption and no answer")
    for reason in placeholders(row):
        return _Problem(f"{row.where}: {reason}")
    for name in row.images:
        if name in looks:
            continue
        try:
            looks[name] = look_of(load_image(name, root))
        except (ValueError, FileNotFoundError) as error:
            absent = root / name if isinstance(error, FileNotFoundError) else None
            return _Problem(f"{row.where}: {error}", absent)
    return None


def split_by_image(folder: FolderSet, share: float = 0.2) -> tuple[FolderSet, FolderSet]:
    """(training, validation). Examples that share an image, by its bytes, or a group are on one
    side.

    A hash of the image decides the side, so adding images moves no others; where the hash leaves
    a side empty, the nearest examples fill it. ValueError for fewer than four images, or where
    shared images connect all examples.
    """
    groups = _image_groups(folder)
    order = sorted({*groups}, key=_sha256)
    if len(order) < 2:
        raise ValueError(
            f"{folder.image_root}: shared images or groups connect all rows, so none can be held "
            "back; expected at least two rows without a common image or group"
        )
    below = sum(_sha256(group)[:8] < int(share * 2**64).to_bytes(8) for group in order)
    held_back = {*order[: min(max(1, below), len(order) - 1)]}
    pairs = list(zip(folder.examples, groups, strict=True))
    training = [example for example, group in pairs if group not in held_back]
    validation = [replace(e, split="val") for e, group in pairs if group in held_back]
    return replace(folder, examples=training), replace(folder, examples=validation)


def in_folds(folder: FolderSet, folds: int) -> list[tuple[FolderSet, FolderSet]]:
    """(the others, the part) for each of ``folds`` parts of about equal size, of which every
    example is in one; examples that share an image are in one part.

    ValueError for fewer than four images, or fewer than two for each part.
    """
    groups = _image_groups(folder)
    order = sorted({*groups}, key=_sha256)
    if len(order) < 2 * folds:
        raise ValueError(
            f"{folder.image_root}: {len(order)} labelled images (those that rows share count "
            f"once); --folds {folds} needs at least {2 * folds}"
        )
    part = {group: number % folds for number, group in enumerate(order)}
    pairs = list(zip(folder.examples, groups, strict=True))
    return [
        (
            replace(folder, examples=[e for e, group in pairs if part[group] != number]),
            replace(folder, examples=[e for e, group in pairs if part[group] == number]),
        )
        for number in range(folds)
    ]


def _image_groups(folder: FolderSet) -> list[bytes]:
    """What keeps each example with others: the least of the hashes of all images and groups that
    are connected with it."""
    names = {name for example in folder.examples for name in example.images}
    digests = {name: _sha256((folder.image_root / name).read_bytes()) for name in names}
    if (count := len({*digests.values()})) < LEAST_IMAGES:
        raise ValueError(f"{folder.image_root}: {count} images; expected at least {LEAST_IMAGES}")
    return _groups([[digests[n] for n in e.images] + _group_key(e) for e in folder.examples])


def _group_key(example: Example) -> list[bytes]:
    group = example.extra.get("group")
    return [] if group is None else [_sha256(f"group {group}".encode())]


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
