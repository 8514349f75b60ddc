"""The exact checker of drawn scenes: which thing stands in each cell of the 3x3 grid.

No model is asked. A cell is occupied where pixels leave the background; what stands there is
compared with each shape drawn at many radii and offsets, and its colour with the six of the world.
A thing that is no clear shape, or of no clear colour, is found and named "": it matches nothing.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

from instructblip.scenes.world import (
    COLOURS,
    DRAW,
    IMAGE_SIZE,
    SHAPES,
    Thing,
)

CELL = IMAGE_SIZE / 3
REACH = 12  # half the side of the window around the centre of a cell, in pixels
OCCUPIED = 12  # pixels of a cell that must leave the background: the smallest cross has 40
CONTRAST = 60.0  # how far they leave it, Euclidean in RGB; backgrounds vary by 17, colours by 24
FAR_COLOUR = 90.0  # the two nearest colours of the world are 97 apart
MAX_ERROR = 0.22  # squared error of the best shape, relative to its area; a half shape has 0.5
RADII = (4.6, 5.0, 5.4, 5.8, 6.4, 7.0, 7.6, 8.2, 8.6, 9.0, 9.4, 9.8)
LARGE = 6.9  # pixels; small things have 5.0 to 5.5, large ones 8.6 to 9.5
OFFSETS = (-2.4, -1.6, -0.8, 0.0, 0.8, 1.6, 2.4)


@dataclass(frozen=True, slots=True)
class Verdict:
    """What was asked for against what is there. ``right[i]``: thing i has its colour and shape
    (and size, if that was asked for) in its cell. ``count_right``: as many cells are occupied."""

    right: tuple[bool, ...]
    colour_right: tuple[bool, ...]
    shape_right: tuple[bool, ...]
    occupied: tuple[bool, ...]
    count_right: bool

    @property
    def exact(self) -> bool:
        """Everything asked for, and nothing else."""
        return all(self.right) and self.count_right


def check_picture(picture: Image.Image, things: Sequence[Thing]) -> Verdict:
    """Hold a picture to the ``things`` that were asked for; an empty ``size`` was left open."""
    found = {(t.row, t.column): t for t in find_things(picture)}
    there = [found.get((t.row, t.column)) for t in things]
    pairs = list(zip(things, there, strict=True))
    colour = tuple(f is not None and f.colour == t.colour for t, f in pairs)
    shape = tuple(f is not None and f.name == t.name for t, f in pairs)
    size = [f is not None and t.size in ("", f.size) for t, f in pairs]
    return Verdict(
        right=tuple(all(each) for each in zip(colour, shape, size, strict=True)),
        colour_right=colour,
        shape_right=shape,
        occupied=tuple(f is not None for f in there),
        count_right=len(found) == len(things),
    )


def find_things(picture: Image.Image) -> list[Thing]:
    """The things of a picture of the world in reading order; pictures of another size are resized.

    ``colour`` or ``name`` is empty where it is not clear.
    """
    if picture.size != (IMAGE_SIZE, IMAGE_SIZE):
        picture = picture.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BICUBIC)
    pixels = np.asarray(picture.convert("RGB"), dtype=np.float32)
    background = _background(pixels)
    padded = np.empty((IMAGE_SIZE + 2 * REACH, IMAGE_SIZE + 2 * REACH, 3), np.float32)
    padded[:] = background
    padded[REACH:-REACH, REACH:-REACH] = pixels
    things = []
    for row in range(3):
        for column in range(3):
            top, left = round((row + 0.5) * CELL), round((column + 0.5) * CELL)
            window = padded[top : top + 2 * REACH, left : left + 2 * REACH]
            thing = _read_cell(window, background, row, column)
            if thing is not None:
                things.append(thing)
    return things


def _background(pixels: np.ndarray) -> np.ndarray:
    """The most frequent colour, coarsely, then its mean: things never cover most of a picture."""
    flat = pixels.reshape(-1, 3)
    coarse = (flat // 24).astype(int) @ np.array([1, 16, 256])
    values, counts = np.unique(coarse, return_counts=True)
    near = flat[coarse == values[counts.argmax()]].mean(0)
    close = np.linalg.norm(flat - near, axis=1) < 30
    return flat[close].mean(0) if close.any() else near


def _read_cell(window: np.ndarray, background: np.ndarray, row: int, column: int) -> Thing | None:
    away = window - background  # [2R, 2R, 3]
    distance = np.linalg.norm(away, axis=2)
    core = slice(2, 2 * REACH - 2)  # without what neighbours may reach into the window
    standing = distance[core, core] > CONTRAST
    if standing.sum() < OCCUPIED:
        return None
    inner = window[core, core][standing]
    strongest = inner[np.argsort(-distance[core, core][standing])[: max(8, len(inner) // 2)]]
    ink = np.median(strongest, axis=0)
    names = list(COLOURS)
    apart = [float(np.linalg.norm(ink - np.array(COLOURS[name]))) for name in names]
    colour = names[int(np.argmin(apart))] if min(apart) < FAR_COLOUR else ""
    direction = ink - background
    alpha = np.clip(away @ direction / max(float(direction @ direction), 1.0), 0, 1)
    shape, radius = _read_shape(alpha.ravel())
    size = "large" if radius > LARGE else "small"
    return Thing("shape", shape, row, column, colour, size)


def _read_shape(alpha: np.ndarray) -> tuple[str, float]:
    """The shape nearest to a coverage mask and its radius in pixels; "" where none is near."""
    templates, areas, labels = _templates()
    errors = 1 - (2 * templates @ alpha - alpha @ alpha) / areas
    best = int(errors.argmin())
    shape, radius = labels[best]
    return (shape if errors[best] < MAX_ERROR else ""), radius


@functools.cache
def _templates() -> tuple[np.ndarray, np.ndarray, list[tuple[str, float]]]:
    """Coverage masks [K, 4 R^2] of every shape, radius and offset, their squared norms, labels."""
    scale, side = 4, 2 * REACH
    masks, labels = [], []
    for shape in SHAPES:
        for radius in RADII:
            for dx in OFFSETS:
                for dy in OFFSETS:
                    big = Image.new("L", (side * scale, side * scale))
                    x, y = ((REACH + d) * scale for d in (dx, dy))
                    DRAW[shape](ImageDraw.Draw(big), x, y, radius * scale, 255)
                    small = big.resize((side, side), Image.Resampling.BOX)
                    masks.append(np.asarray(small, np.float32).ravel() / 255)
                    labels.append((shape, radius))
    bank = np.stack(masks)
    return bank, (bank**2).sum(1), labels
