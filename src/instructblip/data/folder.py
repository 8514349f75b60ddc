"""A folder of pictures as somebody has it on a disk -> examples, checked and split by picture.

``metadata.jsonl`` or ``metadata.csv`` with a row for each example: ``file_name`` and one of
``caption`` (or ``text``), ``question`` with ``answer`` (and ``choices``, in a CSV between bars), or
``instruction`` with ``answer``. Without such a file, a ``.txt`` beside a picture holds its
captions, one a line.
"""

import csv
import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from instructblip.batch import Example
from instructblip.data.images import load_image
from instructblip.data.sources.records import image_name

PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")


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
    rows = list(_rows(root))
    if not rows:
        raise ValueError(
            f"{root} holds no metadata.jsonl, no metadata.csv and no picture with a .txt beside it"
        )
    examples, problems = [], []
    for number, (row, where) in enumerate(rows):
        try:
            example = _example(row, str(number), where)
            for name in example.images:
                load_image(name, root)
            examples.append(example)
        except (ValueError, FileNotFoundError) as error:
            text = str(error)
            problems.append(text if text.startswith(where) else f"{where}: {text}")
    if problems:
        shown = "\n  ".join(problems[:20])
        raise ValueError(f"{len(problems)} of {len(rows)} examples are bad:\n  {shown}")
    return FolderSet(examples, root)


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


def _rows(root: Path) -> Iterator[tuple[dict[str, Any], str]]:
    listed = root / "metadata.jsonl"
    if listed.is_file():
        for number, line in enumerate(listed.read_text(encoding="utf-8").splitlines(), start=1):
            if line.strip():
                yield _json(line, f"{listed}, line {number}"), f"{listed}, line {number}"
        return
    listed = root / "metadata.csv"
    if listed.is_file():
        with listed.open(newline="", encoding="utf-8-sig") as file:
            for number, row in enumerate(csv.DictReader(file), start=2):
                kept: dict[str, Any] = {k: v for k, v in row.items() if k and v}
                if "choices" in kept:
                    kept["choices"] = [c.strip() for c in kept["choices"].split("|")]
                yield kept, f"{listed}, line {number}"
        return
    for picture in sorted(p for p in root.rglob("*") if p.suffix.lower() in PICTURES):
        text = picture.with_suffix(".txt")
        if text.is_file():
            lines = [line.strip() for line in text.read_text(encoding="utf-8").splitlines()]
            name = picture.relative_to(root).as_posix()
            yield {"file_name": name, "caption": [line for line in lines if line]}, str(text)


def _json(line: str, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where} is not JSON: {error}") from error
    if not isinstance(row, dict):
        raise ValueError(f"{where}: expected an object with file_name")
    return row


def _example(row: dict[str, Any], number: str, where: str) -> Example:
    asked = row.get("question", row.get("instruction", ""))
    answers = _texts(row.get("answer", row.get("caption", row.get("text"))))
    if not answers or not isinstance(asked, str):
        raise ValueError(
            f"{where}: expected a caption, a question with an answer, or an instruction with one"
        )
    choices = _texts(row.get("choices"))
    if choices and answers[0] not in choices:
        raise ValueError(f"{where}: the answer {answers[0]!r} is none of the choices")
    task = "multiple_choice" if choices else "vqa" if "question" in row else "caption"
    names = _texts(row.get("file_name"))
    if not names:
        raise ValueError(f"{where}: no file_name")
    return Example(
        dataset="own",
        split="train",
        id=number,
        images=tuple(image_name(name, where) for name in names),
        task="instruct" if "instruction" in row else task,
        question=asked,
        answers=answers,
        choices=choices,
        where=where,
    )


def _texts(value: Any) -> tuple[str, ...]:
    """A text or a list of them, as a tuple without the empty ones."""
    values = value if isinstance(value, list) else [value]
    return tuple(v.strip() for v in values if isinstance(v, str) and v.strip())
