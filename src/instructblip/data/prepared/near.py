"""Near-duplicates: images that show the same although their files differ.

An image has a 64-bit perceptual hash: the signs of the 64 lowest frequencies of its brightness,
compared with their median (Zauner, "Implementation and benchmarking of perceptual image hash
functions", 2010, section 3.2.1). Saving it again, in another size or quality, changes a few bits.
Flat drawings have few such patterns and share hashes without being alike, so images with close
hashes are compared a second time, by the colors of 8 x 8 cells.
"""

from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping
from functools import cache
from typing import Any, Literal, NamedTuple

import numpy as np
from jaxtyping import Float, UInt64
from PIL import Image

NEAR = 6
"""Bits of 64 in which the hashes of two near-duplicates differ at the most."""
ALIKE = 50
"""Grey levels of 255 by which no color of a cell may differ more, once both are equally bright."""
_GAIN = 1.25
"""Brightness is made equal up to this factor."""
_CELLS = 8
_SIDE, _KEPT = 32, 8
_SIDES: tuple[Literal["left"], Literal["right"]] = ("left", "right")


class Look(NamedTuple):
    """What is compared of an image: its perceptual hash, and the RGB of its 8 x 8 cells [192]."""

    hash: int
    colours: bytes


class NearPair(NamedTuple):
    """Two names, the bits in which their hashes differ, and the largest difference of a cell."""

    left: str
    right: str
    bits: int
    difference: float


def look_of(image: Image.Image) -> Look:
    """The look of an image of any mode and size."""
    cells = image.convert("RGB").resize((_CELLS, _CELLS), Image.Resampling.BOX)
    return Look(perceptual_hash(image), cells.tobytes())


def near_duplicates(left: Mapping[str, Look], right: Mapping[str, Look]) -> Iterator[NearPair]:
    """Pairs of an image of ``left`` and one of ``right`` that look alike."""
    sides = []
    for looks in (left, right):
        names = defaultdict(list)
        for name, look in looks.items():
            names[look.hash].append(name)
        sides.append(names)
    mine, theirs = sides
    for x, y, bits in near_pairs(mine, theirs):
        others = _cells([right[name] for name in theirs[y]])
        for name, cells in zip(mine[x], _cells([left[name] for name in mine[x]]), strict=True):
            gain = others @ cells / max(1.0, float(cells @ cells))
            scaled = np.clip(gain, 1 / _GAIN, _GAIN)[:, None] * cells
            difference = abs(scaled - others).max(axis=1)
            for i in np.flatnonzero(difference <= ALIKE):
                yield NearPair(name, theirs[y][i], bits, float(difference[i]))


def _cells(looks: list[Look]) -> Float[np.ndarray, "n 192"]:
    return np.array([[*look.colours] for look in looks], dtype=np.float64)


def perceptual_hash(image: Image.Image) -> int:
    """The 64-bit hash of an image of any mode and size."""
    small = image.convert("L").resize((_SIDE, _SIDE), Image.Resampling.LANCZOS)
    cosines = _cosines()
    waves = cosines @ np.asarray(small, dtype=np.float64) @ cosines.T  # [8, 8]
    # Rounded, so that the noise of the arithmetic in a flat image does not decide a bit.
    bits = (np.round(waves, 6) > np.median(np.round(waves, 6).ravel()[1:])).ravel()
    return int.from_bytes(np.packbits(bits).tobytes())


@cache
def _cosines() -> Float[np.ndarray, "8 32"]:
    """The first rows of the discrete cosine transform of 32 values."""
    places = (np.arange(_SIDE) + 0.5) * np.pi / _SIDE
    return np.cos(np.arange(_KEPT)[:, None] * places)


def near_pairs(
    left: Collection[int], right: Collection[int], distance: int = NEAR
) -> Iterator[tuple[int, int, int]]:
    """(x, y, bits), each pair once: a hash of ``left`` and one of ``right`` that differ in at most
    ``distance`` of their 64 bits.

    The 64 bits are cut into ``distance + 1`` bands. Two hashes with fewer differences than there
    are bands agree in one band at least, so only hashes that share a band are compared. 100,000 x
    100,000 hashes take seconds.
    """
    a, b = (np.array(sorted({*hashes}), dtype=np.uint64) for hashes in (left, right))
    edges = np.linspace(0, 64, distance + 2).round().astype(np.uint64)
    bands = list(zip(edges, edges[1:] - edges[:-1], strict=False))  # (first bit, width)
    for k, band in enumerate(bands):
        for mine, theirs in _buckets(a, b, *band):
            bits = np.bitwise_count(mine[:, None] ^ theirs)
            for i, j in np.argwhere(bits <= distance):
                x, y = mine[i], theirs[j]
                if not any(_band(x, *earlier) == _band(y, *earlier) for earlier in bands[:k]):
                    yield int(x), int(y), int(bits[i, j])


def _band(hashes: Any, start: np.uint64, width: np.uint64) -> Any:
    return (hashes >> start) & (np.uint64(2**64 - 1) >> (np.uint64(64) - width))


def _buckets(
    left: UInt64[np.ndarray, " n"],
    right: UInt64[np.ndarray, " m"],
    start: np.uint64,
    width: np.uint64,
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The hashes of both sides that have the same value in one band, for each value of it."""
    sides = []
    for hashes in (left, right):
        values = _band(hashes, start, width)
        order = np.argsort(values, kind="stable")
        sides.append((hashes[order], values[order]))
    (a, in_a), (b, in_b) = sides
    common = np.intersect1d(in_a, in_b)
    bounds = [np.searchsorted(v, common, side) for v in (in_a, in_b) for side in _SIDES]
    for first, last, start_b, end_b in zip(*bounds, strict=True):
        yield a[first:last], b[start_b:end_b]
