"""Perceptual hashes: stable under what does not change an image, found among many."""

import io
import random

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageEnhance

from instructblip.data.prepared.near import (
    NEAR,
    look_of,
    near_duplicates,
    near_pairs,
    perceptual_hash,
)


def photo(seed: int) -> Image.Image:
    """Smooth noise with shapes on it: an image with structure at all sizes."""
    rng = np.random.default_rng(seed)
    small = rng.integers(0, 256, (9, 12, 3), dtype=np.uint8)
    image = Image.fromarray(small).resize((320, 240), Image.Resampling.BICUBIC)
    pen = ImageDraw.Draw(image)
    for _ in range(6):
        x, y = rng.integers(0, 300), rng.integers(0, 220)
        pen.ellipse((x, y, x + 40, y + 30), fill=tuple(map(int, rng.integers(0, 256, 3))))
    return image


def saved(image: Image.Image, quality: int) -> Image.Image:
    data = io.BytesIO()
    image.save(data, "JPEG", quality=quality)
    return Image.open(data)


CHANGES = {
    "JPEG 40": lambda i: saved(i, 40),
    "smaller": lambda i: i.resize((121, 90)),
    "grey": lambda i: i.convert("L"),
    "brighter": lambda i: ImageEnhance.Brightness(i).enhance(1.1),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_copy_is_near(change: str):
    for seed in range(40):
        original = perceptual_hash(photo(seed))
        copy = perceptual_hash(CHANGES[change](photo(seed)))
        assert (original ^ copy).bit_count() <= NEAR


def test_other_images_are_not_near():
    hashes = [perceptual_hash(photo(seed)) for seed in range(150)]
    assert not [pair for pair in near_pairs(hashes, hashes) if pair[0] != pair[1]]


def test_pairs_are_those_of_a_comparison_of_all():
    rng = random.Random(0)
    left = [rng.getrandbits(64) for _ in range(800)]
    right = [rng.getrandbits(64) for _ in range(500)]
    for i in range(200):  # 0 to 8 bits from a hash of the other side
        right[i] = left[i]
        for bit in rng.sample(range(64), i % 9):
            right[i] ^= 1 << bit
    for distance in (0, 3, NEAR):
        expected = {
            (x, y, bits) for x in left for y in right if (bits := (x ^ y).bit_count()) <= distance
        }
        pairs = list(near_pairs(left, right, distance))
        assert len(pairs) == len(expected) > 0
        assert set(pairs) == expected


def test_flat_images_are_near():
    hashes = {perceptual_hash(Image.new("RGB", (50, 40), (v, v, v))) for v in range(0, 256, 5)}
    assert len(list(near_pairs(hashes, hashes))) == len(hashes) ** 2


def drawing(colour: str, x: int = 20) -> Image.Image:
    """A circle on white paper: its brightness hardly depends on its color."""
    image = Image.new("RGB", (192, 192), "white")
    ImageDraw.Draw(image).ellipse((x, 30, x + 60, 90), fill=colour)
    return image


def test_drawings_of_other_colours_are_no_near_duplicates():
    looks = {colour: look_of(drawing(colour)) for colour in ("red", "green", "gray", "brown")}
    assert (looks["red"].hash ^ looks["green"].hash).bit_count() <= NEAR
    pairs = [(pair.left, pair.right) for pair in near_duplicates(looks, looks)]
    assert pairs == [(colour, colour) for colour in looks]


def test_changed_copies_are_near_duplicates():
    """Also where brightness changes all of a white ground."""
    changes = {
        "jpeg": saved(drawing("red"), 60),
        "half": drawing("red").resize((96, 96)),
        "darker": ImageEnhance.Brightness(drawing("red")).enhance(0.9),
        "brighter": ImageEnhance.Brightness(drawing("red")).enhance(1.1),
    }
    looks = {name: look_of(image) for name, image in changes.items()}
    found = {pair.right: pair for pair in near_duplicates({"own": look_of(drawing("red"))}, looks)}
    assert set(found) == set(changes)
    assert found["darker"].difference < 2


def test_all_images_of_one_hash_are_compared():
    left = {f"red {i}": look_of(drawing("red")) for i in range(3)}
    right = {f"red {i}": look_of(drawing("red")) for i in range(3, 5)}
    right |= {"green": look_of(drawing("green"))}
    pairs = {(pair.left, pair.right) for pair in near_duplicates(left, right)}
    assert pairs == {(x, y) for x in left for y in right if y != "green"}
