"""Scenes, the embedded world: images of a few things on a 3x3 grid, and how they are drawn.

A `Scene` is data; `render` is a function of the scene alone, so the same seed gives the same
bytes. The handwritten digits are real (scikit-learn's bundled `load_digits`, 8x8, UCI optical
digits). Training and evaluation images show different handwriting, and six colour-shape pairs
(`HELD_OUT_PAIRS`) appear in evaluation only.
"""

import functools
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (214, 39, 40),
    "green": (44, 150, 44),
    "blue": (40, 90, 220),
    "yellow": (240, 215, 40),
    "purple": (140, 60, 190),
    "orange": (250, 130, 20),
}
SHAPES = ("circle", "square", "triangle", "star", "cross", "heart")
SIZES = ("small", "large")
ROWS = ("top", "middle", "bottom")
COLUMNS = ("left", "middle", "right")
WORDS = ("cat", "sun", "bus", "map", "key", "fox", "jam", "ice")
HELD_OUT_PAIRS = frozenset(
    {
        ("red", "star"),
        ("green", "heart"),
        ("blue", "triangle"),
        ("yellow", "cross"),
        ("purple", "square"),
        ("orange", "circle"),
    }
)
IMAGE_SIZE = 64
_SCALE = 3  # drawn three times larger, then averaged: anti-aliasing


@dataclass(frozen=True, slots=True)
class Thing:
    """One object of a scene. ``kind`` is shape, word or digit; ``name`` is which one."""

    kind: str
    name: str
    row: int
    column: int
    colour: str = ""
    size: str = ""

    @property
    def place(self) -> str:
        """The cell in words: "top left", "top", "left", "middle", ..."""
        row, column = ROWS[self.row], COLUMNS[self.column]
        if row == "middle":
            return column
        return row if column == "middle" else f"{row} {column}"


@dataclass(frozen=True, slots=True)
class Scene:
    """Things in reading order, and the seed of everything that no annotation mentions.

    ``test_digits`` selects the half of the handwritten digits kept for evaluation; ``blur`` is
    the radius of a Gaussian blur in pixels.
    """

    things: tuple[Thing, ...]
    seed: int
    test_digits: bool = False
    blur: float = 0.0

    @property
    def shapes(self) -> tuple[Thing, ...]:
        return tuple(t for t in self.things if t.kind == "shape")

    def of_kind(self, kind: str) -> tuple[Thing, ...]:
        return tuple(t for t in self.things if t.kind == kind)


def sample_scene(
    rng: random.Random,
    shapes: tuple[int, int] = (1, 3),
    words: int = 0,
    digits: int = 0,
    pairs: str = "seen",
    test_digits: bool = False,
) -> Scene:
    """A random scene.

    ``shapes`` bounds the number of shapes; ``pairs`` is "seen" (no held-out colour-shape pair),
    "unseen" (at least one) or "any". Two things never share a cell, two shapes never share both
    colour and shape. Every other scene repeats a shape or a colour, so that there is something to
    count.
    """
    number = rng.randint(*shapes)
    cells = rng.sample(range(9), number + words + digits)
    looks = _sample_looks(rng, number, pairs)
    things = [
        Thing("shape", shape, *divmod(cell, 3), colour, rng.choice(SIZES))
        for (colour, shape), cell in zip(looks, cells[:number], strict=True)
    ]
    names = rng.sample(WORDS, words) + [str(rng.randrange(10)) for _ in range(digits)]
    kinds = ["word"] * words + ["digit"] * digits
    things += [
        Thing(kind, name, *divmod(cell, 3))
        for kind, name, cell in zip(kinds, names, cells[number:], strict=True)
    ]
    things.sort(key=lambda t: (t.row, t.column))
    return Scene(tuple(things), rng.getrandbits(32), test_digits)


def _sample_looks(rng: random.Random, number: int, pairs: str) -> list[tuple[str, str]]:
    allowed = [
        (c, s) for c in COLOURS for s in SHAPES if pairs != "seen" or (c, s) not in HELD_OUT_PAIRS
    ]
    looks = [rng.choice(sorted(HELD_OUT_PAIRS))] if pairs == "unseen" and number else []
    repeat = rng.random() < 0.5
    while len(looks) < number:
        fresh = [look for look in allowed if look not in looks]
        if looks and repeat:
            base = rng.choice(looks)
            fresh = [look for look in fresh if look[0] == base[0] or look[1] == base[1]] or fresh
            repeat = rng.random() < 0.3
        elif looks:
            apart = [look for look in fresh if all(look[0] != c and look[1] != s for c, s in looks)]
            fresh = apart or fresh
        looks.append(rng.choice(fresh))
    rng.shuffle(looks)
    return looks


def render(scene: Scene, size: int = IMAGE_SIZE) -> Image.Image:
    """Draw ``scene`` as an RGB image of ``size`` x ``size`` pixels."""
    rng = random.Random(scene.seed)
    side = size * _SCALE
    dark = rng.random() < 0.5
    level = rng.randint(15, 50) if dark else rng.randint(215, 245)
    background = tuple(min(255, max(0, level + rng.randint(-10, 10))) for _ in range(3))
    image = Image.new("RGB", (side, side), background)
    draw = ImageDraw.Draw(image)
    ink = (235, 235, 235) if dark else (25, 25, 25)
    for thing in scene.things:
        cell = side / 3
        shift = cell * 0.08
        x = (thing.column + 0.5) * cell + rng.uniform(-shift, shift)
        y = (thing.row + 0.5) * cell + rng.uniform(-shift, shift)
        if thing.kind == "shape":
            radius = cell * (0.43 if thing.size == "large" else 0.25) * rng.uniform(0.94, 1.04)
            colour = tuple(
                min(255, max(0, v + rng.randint(-14, 14))) for v in COLOURS[thing.colour]
            )
            DRAW[thing.name](draw, x, y, radius, colour)
        elif thing.kind == "word":
            x = min(max(x, cell * 0.52), side - cell * 0.52)
            letters = font(round(cell * 0.52))
            draw.text((x, y), thing.name.upper(), fill=ink, font=letters, anchor="mm")
        else:
            _paste_digit(image, thing.name, x, y, cell * 0.9, ink, scene.test_digits, rng)
    image = image.resize((size, size), Image.Resampling.BOX)
    return image.filter(ImageFilter.GaussianBlur(scene.blur)) if scene.blur else image


def _polygon(points: Sequence[tuple[float | int, float | int]]):
    def draw_polygon(draw: ImageDraw.ImageDraw, x: float, y: float, r: float, fill) -> None:
        draw.polygon([(x + r * px, y + r * py) for px, py in points], fill=fill)

    return draw_polygon


def _circle(draw: ImageDraw.ImageDraw, x: float, y: float, r: float, fill) -> None:
    draw.ellipse((x - r, y - r, x + r, y + r), fill=fill)


def _star_points() -> list[tuple[float, float]]:
    turns = [(-90 + 36 * k, 1.08 if k % 2 == 0 else 0.45) for k in range(10)]
    return [(r * math.cos(math.radians(a)), r * math.sin(math.radians(a))) for a, r in turns]


def _heart_points() -> list[tuple[float, float]]:
    points = []
    for k in range(40):
        t = 2 * math.pi * k / 40
        px = 16 * math.sin(t) ** 3
        py = 13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)
        points.append((px / 16.5, -(py + 2) / 15.5))
    return points


_T = 0.36  # half the thickness of a cross's arm
DRAW = {
    "circle": _circle,
    "square": _polygon([(-0.86, -0.86), (0.86, -0.86), (0.86, 0.86), (-0.86, 0.86)]),
    "triangle": _polygon([(0, -1), (1, 0.85), (-1, 0.85)]),
    "star": _polygon(_star_points()),
    "cross": _polygon(
        [
            (-_T, -1), (_T, -1), (_T, -_T), (1, -_T), (1, _T), (_T, _T),
            (_T, 1), (-_T, 1), (-_T, _T), (-1, _T), (-1, -_T), (-_T, -_T),
        ]
    ),
    "heart": _polygon(_heart_points()),
}  # fmt: skip


@functools.cache
def font(pixels: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size=pixels)


@functools.cache
def _digits() -> tuple[np.ndarray, np.ndarray]:
    from sklearn.datasets import load_digits

    images, labels = map(np.asarray, load_digits(return_X_y=True))
    return (images.reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8), labels


def _paste_digit(image, name: str, x, y, side: float, ink, test: bool, rng) -> None:
    images, labels = _digits()
    half = 2 * len(labels) // 3
    pool = np.flatnonzero(labels == int(name))
    pool = pool[pool >= half] if test else pool[pool < half]
    pixels = round(side)
    glyph = Image.fromarray(images[pool[rng.randrange(len(pool))]])
    mask = glyph.resize((pixels, pixels), Image.Resampling.BILINEAR)
    image.paste(ink, (round(x - side / 2), round(y - side / 2)), mask)
