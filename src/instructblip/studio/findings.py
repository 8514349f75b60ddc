"""The doctor's findings about the annotations of a studio, each at the image that it concerns."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from instructblip.core.example import Example
from instructblip.data.custom.rows import Row, examples_of
from instructblip.data.prepared.check import placeholders, too_long
from instructblip.data.prepared.near import Look, near_duplicates
from instructblip.data.reading.records import Record
from instructblip.data.tokens import Tokens
from instructblip.studio.project import OWN, Annotation, Project

SAME = 10
"""Grey levels of 255 by which no color of a cell differs between two copies of one image: other
images that look alike are often what a task is about."""


class Finding(NamedTuple):
    """What is wrong or unusual about an image, or about one row of it."""

    image: str
    kind: str
    about: str
    """The image that it looks like, or the reason in words."""
    row: str = ""
    bad: bool = False
    """Whether `tune` refuses the row."""


def find(
    project: Project,
    rows: Sequence[Annotation],
    names: Sequence[str],
    looks: Mapping[str, Look],
    unreadable: Mapping[str, str],
    tokens: Tokens,
) -> list[Finding]:
    """All findings. ``looks`` and ``unreadable`` are of the images that were decoded so far."""
    found = [Finding(name, "unreadable", why, bad=True) for name, why in unreadable.items()]
    known, asked = {*names}, {}
    for row in rows:
        image = row.images[0]
        found += [
            Finding(image, "missing", name, row.id, bool(row.text("answer")))
            for name in row.images
            if name not in known
        ]
        example = _example(project, row)
        if isinstance(example, ValueError):
            reason = str(example).removeprefix(f"{row.id}: ")
            found.append(Finding(image, "row", reason, row.id, True))
            continue
        if example.answers:
            found += [Finding(image, "placeholder", r, row.id, True) for r in placeholders(example)]
            found += [Finding(image, k, r, row.id) for k, r in too_long(example, tokens, None)]
        key = (*row.images, row.text("question").casefold())
        if key in asked:
            found.append(Finding(image, "twice", "", row.id))
        asked[key] = row.text("answer")
    return found + _lookalikes(rows, looks)


def _example(project: Project, row: Annotation) -> Example | ValueError:
    record = Record(dict(row.data), row.id)
    try:
        return next(iter(examples_of(OWN, project.root, "train", [Row(row.id, record)])))
    except ValueError as error:
        return error


def _lookalikes(rows: Sequence[Annotation], looks: Mapping[str, Look]) -> list[Finding]:
    """Images that are copies of another one, worse where the same question has another answer."""
    answers: dict[str, dict[str, str]] = {}
    for row in rows:
        if len(row.images) == 1 and row.text("answer"):
            by_question = answers.setdefault(row.images[0], {})
            by_question[row.text("question").casefold()] = row.text("answer").casefold()
    found = []
    for pair in near_duplicates(looks, looks):
        if pair.left <= pair.right or pair.difference > SAME:
            continue
        mine, theirs = answers.get(pair.left, {}), answers.get(pair.right, {})
        differ = any(mine[q] != theirs[q] for q in mine.keys() & theirs.keys())
        found.append(Finding(pair.left, "conflict" if differ else "alike", pair.right))
    return found
