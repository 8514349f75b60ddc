"""Images of every kind decode to RGB, and the pixels equal those of transformers."""

import io
import random
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil

from instructblip.core.batch import Example
from instructblip.data import images as images_module
from instructblip.data.images import (
    ImageTransform,
    crop_box,
    load_image,
    may_flip,
)
from instructblip.data.templates import Rendered
from tests.testing import write_picture


@pytest.mark.parametrize("size", [(64, 48), (17, 90), (8, 8)])
@pytest.mark.parametrize("side", [8, 30])
def test_pixels_are_those_of_transformers(size: tuple[int, int], side: int, tmp_path: Path) -> None:
    image = load_image(write_picture(tmp_path / "a.png", size))
    theirs = BlipImageProcessorPil(size={"height": side, "width": side})
    expected = theirs(image, return_tensors="pt")["pixel_values"][0]
    got = ImageTransform(image_size=side)(image)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, expected.float(), atol=1e-6, rtol=0)


def test_config_is_that_of_transformers(tmp_path: Path) -> None:
    transform = ImageTransform(image_size=30, mean=(0.5, 0.4, 0.3), std=(0.1, 0.2, 0.3))
    transform.save_pretrained(tmp_path)
    assert ImageTransform.from_pretrained(tmp_path) == transform
    theirs = BlipImageProcessorPil.from_pretrained(str(tmp_path))
    image = Image.new("RGB", (5, 7), (10, 20, 30))
    expected = theirs(image, return_tensors="pt")["pixel_values"][0]
    torch.testing.assert_close(transform(image), expected.float(), atol=1e-6, rtol=0)
    with pytest.raises(FileNotFoundError, match=r"preprocessor_config\.json"):
        ImageTransform.from_pretrained(tmp_path / "none")


def saved(image: Image.Image, kind: str, **options: Any) -> io.BytesIO:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file


def colour_of(file: io.BytesIO, tmp_path: Path) -> tuple[int, ...]:
    path = tmp_path / "picture"
    path.write_bytes(file.getvalue())
    image = load_image(path)
    assert image.mode == "RGB"
    colour = image.getpixel((0, 0))
    assert isinstance(colour, tuple)
    return tuple(int(c) for c in colour)


def test_every_mode_becomes_rgb(tmp_path: Path) -> None:
    red = Image.new("RGB", (8, 8), (200, 10, 10))
    assert colour_of(saved(red.convert("P"), "PNG"), tmp_path)[0] > 150
    assert colour_of(saved(red.convert("CMYK"), "JPEG", quality=95), tmp_path)[0] > 150
    assert colour_of(saved(red.convert("L"), "PNG"), tmp_path) == (67, 67, 67)
    clear = Image.new("RGBA", (8, 8), (200, 10, 10, 0))
    assert colour_of(saved(clear, "PNG"), tmp_path) == (255, 255, 255)
    half = Image.new("LA", (8, 8), (0, 128))
    assert 125 <= colour_of(saved(half, "PNG"), tmp_path)[0] <= 129
    palette = red.convert("P")
    assert colour_of(saved(palette, "PNG", transparency=palette.getpixel((0, 0))), tmp_path) == (
        255,
        255,
        255,
    )
    deep = Image.fromarray(np.full((8, 8), 40_000, dtype=np.uint16))
    assert colour_of(saved(deep, "PNG"), tmp_path) == (156, 156, 156)
    dark = Image.fromarray(np.full((8, 8), 250, dtype=np.uint16))
    assert colour_of(saved(dark, "PNG"), tmp_path) == (1, 1, 1)
    whole = Image.fromarray(np.full((8, 8), 100, dtype=np.int32))
    assert colour_of(saved(whole, "TIFF"), tmp_path) == (100, 100, 100)
    for value, grey in ((0.5, 128), (0.0, 0), (200.0, 200), (40_000.0, 156), (float("nan"), 0)):
        floats = Image.fromarray(np.full((8, 8), value, dtype=np.float32))
        assert colour_of(saved(floats, "TIFF"), tmp_path) == (grey, grey, grey)
    blue = Image.new("RGB", (8, 8), (0, 0, 200))
    frames = saved(red, "GIF", save_all=True, append_images=[blue])
    assert colour_of(frames, tmp_path)[0] > 150


def test_exif_rotation(tmp_path: Path) -> None:
    image = Image.new("RGB", (8, 4))
    exif = image.getexif()
    exif[0x0112] = 6
    path = tmp_path / "a.jpg"
    image.save(path, exif=exif)
    assert load_image(path).size == (4, 8)


def test_unreadable_images_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = write_picture(tmp_path / "a.jpg", (64, 64)).read_bytes()
    path = tmp_path / "b.jpg"
    for content in (whole[: len(whole) // 2], whole[:30], b"", b"GIF89a", b"no image"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=re.escape(str(path)) + ".*download it again"):
            load_image(path)
    with pytest.raises(FileNotFoundError, match=r"c\.jpg does not exist"):
        load_image("c.jpg", tmp_path)
    with pytest.raises(ValueError, match="leaves the image root"):
        load_image("../a.jpg", tmp_path / "x")
    with pytest.raises(ValueError, match="cannot be read"):
        load_image(tmp_path)
    monkeypatch.setattr(images_module, "MAX_PIXELS", 1000)
    with pytest.raises(ValueError, match="64 x 64 pixels; at most 1000"):
        load_image(tmp_path / "a.jpg")


def test_training_crops_stay_inside_and_cover_half_the_area() -> None:
    rng = random.Random(0)
    areas = []
    for width, height in [(64, 48), (200, 10), (1, 1), (10, 300)] * 200:
        left, top, right, bottom = crop_box(width, height, 0.5, rng)
        assert 0 <= left < right <= width
        assert 0 <= top < bottom <= height
        if (width, height) == (64, 48):
            areas.append((right - left) * (bottom - top) / (width * height))
    assert 0.48 < min(areas) < 0.6
    assert 0.9 < max(areas) <= 1


def test_training_transform_repeats_with_its_seed(tmp_path: Path) -> None:
    image = load_image(write_picture(tmp_path / "a.png", (40, 40)))
    transform = ImageTransform(image_size=16).for_training()
    first = transform(image, random.Random(3))
    assert torch.equal(first, transform(image, random.Random(3)))
    assert not torch.equal(first, transform(image, random.Random(4)))
    seeds = range(20)
    same = [
        torch.equal(
            transform(image, random.Random(s)), transform(image, random.Random(s), flip=False)
        )
        for s in seeds
    ]
    assert any(same)
    assert not all(same)
    with pytest.raises(ValueError, match="needs rng"):
        transform(image)


@pytest.mark.parametrize(
    ("prompt", "response", "expected"),
    [
        ("what colour is the cat?", "red", True),
        ("what is left of the cat?", "dog", False),
        ("where is it?", "on the Right-hand side", False),
        ("is it bright, or cleft?", "yes", True),
        ("左边是什么", "猫", False),
    ],
)
def test_no_flip_where_sides_are_named(prompt: str, response: str, expected: bool) -> None:
    example = Example(dataset="d", split="train", id="1", images=("a",), task="vqa")
    assert may_flip(example, Rendered(prompt, prompt, response)) is expected
    words = Example(dataset="d", split="train", id="1", images=("a",), task="read")
    assert not may_flip(words, Rendered("what is it?", "what is it?", "red"))
