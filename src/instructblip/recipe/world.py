"""Examples for the pages of a model: images of the world that it was trained on."""

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from instructblip.core.pages import data_url
from instructblip.recipe.load import read_values
from instructblip.recipe.schema import RECIPE_FILE
from instructblip.scenes.dense import render_dense, sample_dense
from instructblip.scenes.world import render, sample_scene


@dataclass(frozen=True, slots=True)
class PageExample:
    """An image as a ``data:`` URL, an instruction, and answers to rank with commas between them."""

    image: str
    instruction: str
    candidates: str


def _short(question: str) -> str:
    return f"Question: {question} Short answer:"


_COLORS = "red, green, blue, yellow, purple, orange"
_SHAPES = "circle, square, triangle, star, heart"
_EXAMPLES = {  # seed of an image, instruction, candidates
    "starter": (
        (36, "A short image description.", ""),
        (30, _short("what color is the circle?"), _COLORS),
        (24, _short("how many shapes are there?"), "1, 2, 3, 4"),
        (26, _short("what shape is red?"), _SHAPES),
    ),
    "dense": (
        (1, _short("what color is the shape in the second row, column 4?"), _COLORS),
        (2, _short("what shape is in the third row, column 2?"), _SHAPES),
    ),
}


def world_of(title: str, assets: Path | None) -> str | None:
    """The world whose images a model reads: that of a model in the package, or of the one that
    tuning on published sets started from; None for your data, and where it is not known."""
    if title in _EXAMPLES:
        return title
    file = None if assets is None else assets / RECIPE_FILE
    if file is None or not file.is_file():
        return None
    recipe = read_values(file)  # of any version
    data, model = (_section(recipe, name) for name in ("data", "model"))
    custom = any(_section(data, "sets", name).get("format") for name in _section(data, "sets"))
    start = model.get("start")
    return start if isinstance(start, str) and not custom else None


def _section(values: dict[str, Any], *names: str) -> dict[str, Any]:
    """A section of a recipe, empty if it has none."""
    for name in names:
        inner = values.get(name)
        values = inner if isinstance(inner, dict) else {}
    return values


def examples_of(world: str | None) -> list[PageExample]:
    """The examples of a world; none where it is not one of the package."""
    return [
        PageExample(data_url(_draw(world, seed)), instruction, candidates)
        for seed, instruction, candidates in _EXAMPLES.get(world or "", ())
    ]


def _draw(world: str | None, seed: int) -> Image.Image:
    rng = random.Random(seed)
    return render_dense(sample_dense(rng)) if world == "dense" else render(sample_scene(rng), 256)
