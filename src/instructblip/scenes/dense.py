"""The dense world: images of 20 to 25 things on a 5x5 grid, far more than a few queries can carry.

Every thing has a colour, a shape, a size and a printed digit, and no two things of an image share
colour and shape. An instruction asks about one of them, by its place or by its look, so that a
Q-Former has to read it: with Q queries of which each carries one thing, one that does not read
answers at most Q of N questions and guesses the rest (`limit`). The sets have the files and fields
of the published ones.

==============  ================================================================================
held in         coco_caption (three of the things), vqav2 (by place: "what color is the shape in
                the second row, column 4?"), okvqa (by look: "which digit is on the red heart?"),
                aokvqa (both, with choices)
held out        vizwiz (by look, of colour-shape pairs that training never shows), gqa (a thing
                beside another)
held-out types  vsr (true or false), iconqa (how many things of a colour or shape are in a row)
==============  ================================================================================
"""

import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from PIL import Image, ImageDraw

from instructblip.scenes import formats
from instructblip.scenes.formats import Asked, SetFolder
from instructblip.scenes.language import a, join
from instructblip.scenes.official import WrittenSet, chosen_sets, write_sets
from instructblip.scenes.questions import Question
from instructblip.scenes.world import COLOURS, DRAW, HELD_OUT_PAIRS, SHAPES, SIZES, font

FORMAT_VERSION = 2
GRID = 5
"""Cells of a side."""
FEWEST, MOST = 20, GRID * GRID
IMAGE_SIZE = 120
DIGITS = tuple("0123456789")
NUMBERS = tuple(str(number + 1) for number in range(GRID))
"""Of rows and columns."""
ORDINALS = ("first", "second", "third", "fourth", "fifth")
_SCALE = 3  # drawn three times larger, then averaged: anti-aliasing


@dataclass(frozen=True, slots=True)
class Item:
    """One thing; ``row`` and ``column`` count from 0."""

    colour: str
    shape: str
    size: str
    digit: str
    row: int
    column: int

    @property
    def look(self) -> str:
        """ "red heart" """
        return f"{self.colour} {self.shape}"

    @property
    def place(self) -> str:
        """ "the second row, column 4": no two words of a place are the same, so that what they mean
        does not depend on where they stand"""
        return f"the {ORDINALS[self.row]} row, column {self.column + 1}"


@dataclass(frozen=True, slots=True)
class DenseScene:
    """Things in reading order, and the seed of everything that no annotation mentions."""

    items: tuple[Item, ...]
    seed: int

    def at(self, row: int, column: int) -> Item | None:
        """What is in a cell; None outside of the grid, too."""
        return next((i for i in self.items if (i.row, i.column) == (row, column)), None)


def sample_dense(rng: random.Random, pairs: str = "seen") -> DenseScene:
    """A random scene. ``pairs`` is "seen" (no held-out colour-shape pair) or "any"."""
    looks = [
        (c, s) for c in COLOURS for s in SHAPES if pairs == "any" or (c, s) not in HELD_OUT_PAIRS
    ]
    number = rng.randint(FEWEST, MOST)
    cells = sorted(rng.sample(range(GRID * GRID), number))
    items = [
        Item(colour, shape, rng.choice(SIZES), rng.choice(DIGITS), *divmod(cell, GRID))
        for (colour, shape), cell in zip(rng.sample(looks, number), cells, strict=True)
    ]
    return DenseScene(tuple(items), rng.getrandbits(32))


def limit(queries: int, guessed: float) -> float:
    """The largest share of right answers of a Q-Former that does not read the instruction, if each
    query carries one thing: ``guessed`` is the share that is right without the thing."""
    carried = min(1.0, queries / ((FEWEST + MOST) / 2))
    return carried + (1 - carried) * guessed


def render_dense(scene: DenseScene, size: int = IMAGE_SIZE) -> Image.Image:
    """Draw ``scene`` as an RGB image of ``size`` x ``size`` pixels."""
    rng = random.Random(scene.seed)
    side = size * _SCALE
    level = rng.randint(220, 245)
    background = tuple(min(255, level + rng.randint(-8, 8)) for _ in range(3))
    image = Image.new("RGB", (side, side), background)
    draw = ImageDraw.Draw(image)
    cell = side / GRID
    for item in scene.items:
        shift = cell * 0.04
        x = (item.column + 0.5) * cell + rng.uniform(-shift, shift)
        y = (item.row + 0.5) * cell + rng.uniform(-shift, shift)
        radius = cell * (0.46 if item.size == "large" else 0.32) * rng.uniform(0.97, 1.03)
        colour = tuple(min(255, max(0, v + rng.randint(-14, 14))) for v in COLOURS[item.colour])
        DRAW[item.shape](draw, x, y, radius, colour)
        ink = (20, 20, 20) if sum(colour) > 400 else (250, 250, 250)
        edge = round(cell * 0.03)
        draw.text(
            (x, y), item.digit, fill=ink, font=font(round(cell * 0.45)), anchor="mm",
            stroke_width=edge, stroke_fill=colour,
        )  # fmt: skip
    return image.resize((size, size), Image.Resampling.BOX)


# Captions and questions


def captions(scene: DenseScene, rng: random.Random) -> list[str]:
    """Five captions, each of three of the things: none can list all."""
    return [join([a(item.look) for item in rng.sample(scene.items, 3)]) for _ in range(5)]


Asker = Callable[[DenseScene, Item, random.Random], Question | None]


def _asks(kind: str, form: str, key: str, options: Sequence[str]) -> Asker:
    """Asks for the property ``key`` of a thing; ``form`` names its place or its look."""

    def ask(_scene: DenseScene, item: Item, _rng: random.Random) -> Question:
        value = getattr(item, key)
        value = str(value + 1) if isinstance(value, int) else value
        text = form.format(place=item.place, look=item.look)
        others = tuple(each for each in options if each != value)
        return Question(kind, text, value, others, cells=((item.row, item.column),))

    return ask


BY_PLACE: dict[str, Asker] = {
    "color at": _asks("color at", "what color is the shape in {place}?", "colour", tuple(COLOURS)),
    "shape at": _asks("shape at", "what shape is in {place}?", "shape", SHAPES),
    "digit at": _asks("digit at", "which digit is in {place}?", "digit", DIGITS),
    "size at": _asks("size at", "is the shape in {place} small or large?", "size", SIZES),
}
BY_LOOK: dict[str, Asker] = {
    "digit on": _asks("digit on", "which digit is on the {look}?", "digit", DIGITS),
    "size of": _asks("size of", "is the {look} small or large?", "size", SIZES),
    "row of": _asks("row of", "in which row is the {look}?", "row", NUMBERS),
    "column of": _asks("column of", "in which column is the {look}?", "column", NUMBERS),
}


def ask_one_each(scene: DenseScene) -> list[Question]:
    """Three questions by look, about three things far from each other."""
    rng = random.Random(scene.seed)
    first, last = scene.items[0], scene.items[-1]
    middle = scene.items[len(scene.items) // 2]
    asked = (
        (BY_LOOK["row of"], first),
        (BY_LOOK["digit on"], middle),
        (BY_LOOK["size of"], last),
    )
    return [question for ask, item in asked if (question := ask(scene, item, rng))]


BESIDE = {"right of": (0, 1), "left of": (0, -1), "below": (1, 0), "above": (-1, 0)}


def ask_beside(scene: DenseScene, item: Item, rng: random.Random) -> Question | None:
    """A property of what is beside ``item``."""
    side, (down, right) = rng.choice(list(BESIDE.items()))
    other = scene.at(item.row + down, item.column + right)
    if other is None:
        return None
    form, key, options = rng.choice(
        (
            ("what shape is {} the {}?", "shape", SHAPES),
            ("what color is the shape {} the {}?", "colour", tuple(COLOURS)),
            ("which digit is {} the {}?", "digit", DIGITS),
        )
    )
    value = getattr(other, key)
    others = tuple(each for each in options if each != value)
    cells = ((other.row, other.column),)
    return Question("beside", form.format(side, item.look), value, others, cells=cells)


def ask_statement(_scene: DenseScene, item: Item, rng: random.Random) -> Question:
    """A statement about one thing; the answer is "true" or "false"."""
    key, options = rng.choice(
        (("colour", tuple(COLOURS)), ("shape", SHAPES), ("digit", DIGITS), ("size", SIZES))
    )
    answer = rng.choice(("true", "false"))
    stated = getattr(item, key)
    if answer == "false":
        stated = rng.choice([each for each in options if each != stated])
    text = {
        "colour": f"the shape in {item.place} is {stated}.",
        "shape": f"the shape in {item.place} is a {stated}.",
        "digit": f"the digit on the {item.look} is {stated}.",
        "size": f"the {item.look} is {stated}.",
    }[key]
    other = "false" if answer == "true" else "true"
    return Question(key, text, answer, (other,), cells=((item.row, item.column),))


def ask_number(scene: DenseScene, item: Item, rng: random.Random) -> Question:
    """How many things of a colour or a shape are in the row of ``item``."""
    key = rng.choice(("colour", "shape"))
    value = getattr(item, key)
    if rng.random() < 0.3:
        value = rng.choice(tuple(COLOURS) if key == "colour" else SHAPES)
    number = sum(getattr(other, key) == value for other in scene.items if other.row == item.row)
    plural = "crosses" if value == "cross" else f"{value}s"
    what = f"{value} shapes" if key == "colour" else plural
    text = f"how many {what} are in the {ORDINALS[item.row]} row?"
    others = tuple(str(n) for n in range(GRID + 1) if n != number)
    return Question("number", text, str(number), others)


# The sets


def asked(
    out: SetFolder,
    number: int,
    kinds: Sequence[Asker],
    per_scene: int = 1,
    pairs: str = "seen",
    about: Callable[[Item], bool] = lambda item: True,
) -> Iterable[tuple[DenseScene, list[Question]]]:
    """``number`` scenes, each with ``per_scene`` different questions about its things."""
    while number > 0:
        scene = sample_dense(out.rng, pairs)
        items = [item for item in scene.items if about(item)]
        if not items:
            continue
        questions: dict[str, Question] = {}
        for _ in range(4 * per_scene):
            if question := out.rng.choice(kinds)(scene, out.rng.choice(items), out.rng):
                questions[question.text] = question
        if len(questions) >= per_scene:
            number -= 1
            yield scene, list(questions.values())[:per_scene]


def _stated(question: Question) -> Asked:
    return Asked(
        question=question.text,
        answer=question.answer,
        answers=(question.answer,) * 10,
        kind=question.kind,
    )


def _chosen(question: Question, rng: random.Random) -> Asked:
    choices, right = question.choices(rng)
    return replace(_stated(question), choices=choices, right=right)


def coco_caption(out: SetFolder, number: int) -> None:
    scenes = (sample_dense(out.rng) for _ in range(number))
    formats.coco_caption(out, ((render_dense(s), captions(s, out.rng)) for s in scenes))


def vqav2(out: SetFolder, number: int) -> None:
    some = asked(out, number // 3, [*BY_PLACE.values()], per_scene=3)
    formats.vqav2(out, ((render_dense(s), [*map(_stated, each)]) for s, each in some))


def okvqa(out: SetFolder, number: int) -> None:
    some = asked(out, number // 3, [*BY_LOOK.values()], per_scene=3)
    formats.okvqa(out, ((render_dense(s), [*map(_stated, each)]) for s, each in some))


def aokvqa(out: SetFolder, number: int) -> None:
    kinds = [*BY_PLACE.values(), *BY_LOOK.values()]
    some = asked(out, number, kinds)
    formats.aokvqa(out, ((render_dense(s), _chosen(each[0], out.rng)) for s, each in some))


def vizwiz(out: SetFolder, number: int) -> None:
    some = asked(
        out, number, [*BY_LOOK.values()], pairs="any",
        about=lambda item: (item.colour, item.shape) in HELD_OUT_PAIRS,
    )  # fmt: skip
    formats.vizwiz(out, ((render_dense(s), _stated(each[0])) for s, each in some))


def gqa(out: SetFolder, number: int) -> None:
    some = asked(out, number, [ask_beside])
    formats.gqa(out, ((render_dense(s), _stated(each[0])) for s, each in some))


def vsr(out: SetFolder, number: int) -> None:
    some = asked(out, number, [ask_statement])
    formats.vsr(out, ((render_dense(s), _stated(each[0])) for s, each in some))


def iconqa(out: SetFolder, number: int) -> None:
    some = asked(out, number, [ask_number])
    formats.iconqa(out, ((render_dense(s), _chosen(each[0], out.rng)) for s, each in some))


DENSE_SETS: dict[str, WrittenSet] = {
    "coco_caption": WrittenSet(coco_caption, {"train": 2000, "val": 200}),
    "vqav2": WrittenSet(vqav2, {"train": 9000, "val": 300}),
    "okvqa": WrittenSet(okvqa, {"train": 9000, "val": 300}),
    "aokvqa": WrittenSet(aokvqa, {"train": 2000, "val": 200}),
    "vizwiz": WrittenSet(vizwiz, {"val": 200}),
    "gqa": WrittenSet(gqa, {"test": 200}),
    "vsr": WrittenSet(vsr, {"test": 200}),
    "iconqa": WrittenSet(iconqa, {"test": 200}),
}


def write_dense(
    root: str | Path, seed: int = 0, scale: float | int = 1.0, sets: tuple[str, ...] | None = None
) -> dict[str, Path]:
    """Write the sets of the dense world below ``root``, as `official.write_scenes` writes those of
    Scenes; returns the folder of each."""
    settings = {"format": FORMAT_VERSION, "world": "dense", "seed": seed, "scale": scale}
    due = chosen_sets(DENSE_SETS, sets)
    return write_sets(Path(root), due, settings, SetFolder, "instructblip scenes --dense")
