"""The exact checker of drawn scenes: reads which object is in each cell of the 3x3 grid.

It asks no model. A cell is occupied where pixels differ from the background. Its object is compared
with each shape rendered at many radii and offsets, and its colour with the six of Scenes. An object
without a clear shape or colour is reported with the name or colour "", which matches nothing.
"""

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from PIL import Image, ImageDraw

from instructblip.scenes.world import COLOURS, DRAW, IMAGE_SIZE, SHAPES, Thing

CELL = IMAGE_SIZE / 3
REACH = 12  # half the side of the window around the centre of a cell, in pixels
OCCUPIED = 12  # pixels of a cell that must differ from the background: the smallest cross has 40
CONTRAST = 60.0  # by how much, Euclidean in RGB; backgrounds vary by 17, colours by 24
FAR_COLOUR = 90.0  # the two nearest colours of Scenes are 97 apart
MAX_ERROR = 0.22  # squared error of the best shape, relative to its area; half a shape has 0.5
RADII = (4.6, 5.0, 5.4, 5.8, 6.4, 7.0, 7.6, 8.2, 8.6, 9.0, 9.4, 9.8)
LARGE = 6.9  # radius in pixels; small objects have 5.0 to 5.5, large ones 8.6 to 9.5
OFFSETS = (-2.4, -1.6, -0.8, 0.0, 0.8, 1.6, 2.4)


@dataclass(frozen=True, slots=True)
class Verdict:
    """Compares an image with the objects that the prompt names, one entry per object.

    ``right``: its cell holds an object of its colour and shape, and of its size if the prompt gives
    one. ``count_right``: the image has as many objects as the prompt.
    """

    right: tuple[bool, ...]
    colour_right: tuple[bool, ...]
    shape_right: tuple[bool, ...]
    occupied: tuple[bool, ...]
    count_right: bool

    @property
    def exact(self) -> bool:
        """Whether the image shows every object of the prompt and no other."""
        return all(self.right) and self.count_right


def check_image(image: Image.Image, things: Sequence[Thing]) -> Verdict:
    """Compare an image with the expected ``things``; an empty ``size`` matches any size."""
    cells = {(t.row, t.column): t for t in find_things(image)}
    pairs = [(cells.get((t.row, t.column)), t) for t in things]
    colour = tuple(f is not None and f.colour == t.colour for f, t in pairs)
    shape = tuple(f is not None and f.name == t.name for f, t in pairs)
    size = [f is not None and t.size in ("", f.size) for f, t in pairs]
    return Verdict(
        right=tuple(all(each) for each in zip(colour, shape, size, strict=True)),
        colour_right=colour,
        shape_right=shape,
        occupied=tuple(f is not None for f, _ in pairs),
        count_right=len(cells) == len(things),
    )


def find_things(image: Image.Image) -> list[Thing]:
    """The objects of a scene in reading order; images of another size are resized first.

    ``colour`` or ``name`` is empty where it is not clear.
    """
    if image.size != (IMAGE_SIZE, IMAGE_SIZE):
        image = image.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BICUBIC)
    pixels = np.asarray(image.convert("RGB"), dtype=np.float32)
    background = _background(pixels)
    padded = np.empty((IMAGE_SIZE + 2 * REACH, IMAGE_SIZE + 2 * REACH, 3), np.float32)
    padded[:] = background
    padded[REACH:-REACH, REACH:-REACH] = pixels
    things = []
    for row, column in itertools.product(range(3), range(3)):
        top, left = round((row + 0.5) * CELL), round((column + 0.5) * CELL)
        window = padded[top : top + 2 * REACH, left : left + 2 * REACH]
        if thing := _read_cell(window, background, row, column):
            things.append(thing)
    return things


def _background(pixels: Float[np.ndarray, "H W 3"]) -> Float[np.ndarray, " 3"]:
    """The mean of the most frequent colour and its neighbours: objects never cover most pixels."""
    flat = pixels.reshape(-1, 3)
    coarse = (flat // 24).astype(int) @ np.array([1, 16, 256])
    values, counts = np.unique(coarse, return_counts=True)
    near = flat[coarse == values[counts.argmax()]].mean(0)
    close = np.linalg.norm(flat - near, axis=1) < 30
    return flat[close].mean(0) if close.any() else near


def _read_cell(
    window: Float[np.ndarray, "R R 3"], background: Float[np.ndarray, " 3"], row: int, column: int
) -> Thing | None:
    """The object in the window around a cell's centre; None for an empty cell."""
    difference = window - background
    distance = np.linalg.norm(difference, axis=2)
    core = slice(2, 2 * REACH - 2)  # excludes what neighbouring cells reach into the window
    standing = distance[core, core] > CONTRAST
    if standing.sum() < OCCUPIED:
        return None
    inner = window[core, core][standing]
    strongest = inner[np.argsort(-distance[core, core][standing])[: max(8, len(inner) // 2)]]
    ink = np.median(strongest, axis=0)
    distances = {name: float(np.linalg.norm(ink - np.array(c))) for name, c in COLOURS.items()}
    nearest = min(distances, key=distances.__getitem__)
    colour = nearest if distances[nearest] < FAR_COLOUR else ""
    direction = ink - background
    # coverage of each pixel: 0 is background, 1 is ink
    alpha = np.clip(difference @ direction / max(float(direction @ direction), 1.0), 0, 1)
    templates, areas, labels = _templates()
    errors = 1 - (2 * templates @ alpha.ravel() - alpha.ravel() @ alpha.ravel()) / areas
    best = int(errors.argmin())
    shape, radius = labels[best]
    size = "large" if radius > LARGE else "small"
    return Thing("shape", shape if errors[best] < MAX_ERROR else "", row, column, colour, size)


@functools.cache
def _templates() -> tuple[np.ndarray, np.ndarray, list[tuple[str, float]]]:
    """Coverage masks [K, 4 REACH^2] of every shape, radius and offset; their squared norms [K];
    and (shape, radius) of each."""
    scale, side = 4, 2 * REACH
    masks, labels = [], []
    for shape, radius, dx, dy in itertools.product(SHAPES, RADII, OFFSETS, OFFSETS):
        big = Image.new("L", (side * scale, side * scale))
        x, y = ((REACH + d) * scale for d in (dx, dy))
        DRAW[shape](ImageDraw.Draw(big), x, y, radius * scale, 255)
        small = big.resize((side, side), Image.Resampling.BOX)
        masks.append(np.asarray(small, np.float32).ravel() / 255)
        labels.append((shape, radius))
    bank = np.stack(masks)
    return bank, (bank**2).sum(1), labels
