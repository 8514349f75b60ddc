"""What to draw: examples from caption sets, from instruction files, and fresh ones from Scenes.

An instruction file has one JSON object a line; ``image``, the subject to draw from, is optional::

    {"instruction": "draw the same shape in blue at the left", "target_image": "b.png",
     "image": "a.png"}
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Protocol, runtime_checkable

from PIL import Image

from instructblip.data.order import mix
from instructblip.data.reading.images import load_image
from instructblip.data.reading.records import image_name, read_lines
from instructblip.data.samples import Examples
from instructblip.scenes.language import at, join, phrase
from instructblip.scenes.world import (
    COLOURS,
    HELD_OUT_PAIRS,
    SHAPES,
    SIZES,
    Scene,
    Thing,
    render,
    sample_scene,
)

DRAW_TEMPLATES = (
    "draw {}",
    "draw a picture of {}",
    "paint {}",
    "create an image of {}",
    "a picture of {}",
    "{}",
)
"""Instructions to draw what a caption describes."""


@dataclass(frozen=True, slots=True)
class DrawExample:
    """One image to draw. ``target`` and ``image``, the subject, load an image; without a subject
    the instruction stands alone. ``things`` are the objects that the checker of Scenes expects,
    with an empty size where any will do. ``where`` names the example in errors."""

    instruction: str
    target: Callable[[], Image.Image] | None = None
    image: Callable[[], Image.Image] | None = None
    things: tuple[Thing, ...] = ()
    where: str = ""


@runtime_checkable
class Drawings(Protocol):
    """A set of examples. ``[i]`` is the same example every time."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> DrawExample: ...


def read_instructions(path: Path, root: Path | None = None) -> list[DrawExample]:
    """The examples of an instruction file (see above) whose images lie below ``root``, by default
    the file's folder.

    Raises FileNotFoundError, or ValueError naming file and line.
    """
    if not path.is_file():
        raise FileNotFoundError(
            f"no instruction file {path}; expected lines such as "
            '{"instruction": "...", "target_image": "..."}'
        )
    root, examples = root or path.parent, []
    for _, record in read_lines(path):
        record = replace(record, remedy="Repair the line")
        where, text = record.where, record.text("instruction")
        if not text:
            record.fail("instruction", "a text that states what to draw")
        target, image = image_name(record.text("target_image"), where), None
        if "image" in record:
            image = partial(load_image, image_name(record.text("image"), where), root)
        examples.append(DrawExample(text, partial(load_image, target, root), image, where=where))
    if not examples:
        raise ValueError(f"{path} holds no instructions")
    return examples


@dataclass(frozen=True)
class CaptionedImages:
    """A caption set in reverse: a caption asks for its image. The index decides the template."""

    examples: Examples
    seed: int = 0

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> DrawExample:
        example = self.examples[index]
        rng = random.Random(mix(self.seed, index))
        captions = example.taught
        if not captions:
            raise ValueError(f"{example.dataset} {example.where}: no caption to draw from")
        text = rng.choice(DRAW_TEMPLATES).format(rng.choice(captions))
        target = partial(load_image, example.images[0], self.examples.image_root)
        return DrawExample(text, target, where=example.where)


def describe(things: Sequence[Thing], with_size: bool) -> tuple[str, tuple[Thing, ...]]:
    """Words for every object and its place, and what the checker then expects."""
    text = join([phrase(t, size=with_size, place=True) for t in things])
    return text, tuple(things) if with_size else tuple(replace(t, size="") for t in things)


class _Generated:
    """A set that makes its examples, as many as any training needs."""

    def __len__(self) -> int:
        return 1 << 30


@dataclass(frozen=True)
class SceneDrawings(_Generated):
    """Fresh scenes of ``shapes`` (fewest, most); the instruction names each with its place."""

    shapes: tuple[int, int] = (1, 2)
    pairs: str = "seen"
    seed: int = 0

    def __getitem__(self, index: int) -> DrawExample:
        rng = random.Random(mix(self.seed, 5, index))
        scene = sample_scene(rng, shapes=self.shapes, pairs=self.pairs)
        with_size = rng.random() < 0.5
        things = list(scene.things)
        if rng.random() < 0.5:
            rng.shuffle(things)
        text, expected = describe(things, with_size)
        instruction = rng.choice(DRAW_TEMPLATES).format(text)
        return DrawExample(instruction, partial(render, scene), None, expected)


@dataclass(frozen=True)
class SubjectDrawings(_Generated):
    """A subject image of one object, and an instruction that keeps its shape, colour, or both."""

    seed: int = 0

    def __getitem__(self, index: int) -> DrawExample:
        rng = random.Random(mix(self.seed, 6, index))
        while True:  # until neither image shows a held-out pair
            subject, wanted = _random_shape(rng), _random_shape(rng)
            size = rng.choice(SIZES)
            subject, wanted = replace(subject, size=size), replace(wanted, size=size)
            kept = rng.choice(("shape", "colour", "both"))
            if kept != "colour":
                wanted = replace(wanted, name=subject.name)
            if kept != "shape":
                wanted = replace(wanted, colour=subject.colour)
            if not {(t.colour, t.name) for t in (subject, wanted)} & HELD_OUT_PAIRS:
                break
        where = at(wanted.place)
        if wanted.place != "middle" and rng.random() < 0.3:
            where = where.replace("at the", "on the")
        text = {
            "shape": f"draw the same shape in {wanted.colour} {where}",
            "colour": f"draw a {wanted.name} in the same color {where}",
            "both": f"draw the same thing {where}",
        }[kept]
        reference = partial(render, Scene((subject,), rng.getrandbits(32)))
        target = partial(render, Scene((wanted,), rng.getrandbits(32)))
        return DrawExample(text, target, reference, (replace(wanted, size=""),))


def _random_shape(rng: random.Random) -> Thing:
    cell = divmod(rng.randrange(9), 3)
    return Thing("shape", rng.choice(SHAPES), *cell, rng.choice(tuple(COLOURS)))
