"""Drawings in a folder: what text to image writes and the report shows.

The folder holds images and ``drawn.json``, a list of `DrawnKind`.
"""

from dataclasses import dataclass
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from instructblip.core.problems import problems

INDEX = "drawn.json"


@dataclass(frozen=True, slots=True)
class Figures:
    """Percent of the objects of one kind of prompt; ``exact`` is percent of the images.

    ``pictures`` is the number of images, ``seconds`` the share of one image in its batch.
    """

    objects: float
    exact: float
    place: float
    colour: float
    shape: float
    pictures: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Drawing:
    """A prompt, its image, the subject image if there is one, and the checker's verdict. Images are
    file names relative to the folder."""

    prompt: str
    picture: str
    subject: str | None
    right: bool


@dataclass(frozen=True, slots=True)
class DrawnKind:
    """The figures of one kind of prompt and some of its drawings."""

    kind: str
    figures: Figures
    drawings: tuple[Drawing, ...]


def read_drawings(folder: Path) -> tuple[DrawnKind, ...]:
    """What ``drawn.json`` of a folder lists. Raises FileNotFoundError or ValueError naming it."""
    path = folder / INDEX
    if not path.is_file():
        raise FileNotFoundError(
            f"{folder} holds no drawings: {INDEX} is missing; write them with "
            f"`python benchmarks/draw.py --out {folder}`"
        )
    try:
        return TypeAdapter(tuple[DrawnKind, ...]).validate_json(path.read_bytes())
    except ValidationError as error:
        raise ValueError(f"{path}: {problems(error)}") from None
