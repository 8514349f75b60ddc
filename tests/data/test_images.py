"""Images of every kind decode to RGB, and the pixels equal those of transformers."""

import io
import json
import random
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter
from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil

from instructblip.core.example import Example
from instructblip.data.images import ImageTransform, crop_box, may_flip
from instructblip.data.reading import decode as images_module
from instructblip.data.reading.decode import decode_image, examine_image
from instructblip.data.reading.images import load_image, load_pixels
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


BIT = {"image_processor_type": "BitImageProcessor", "do_center_crop": True}
CONVNEXT = {"image_processor_type": "ConvNextImageProcessor", "crop_pct": 0.875, "resample": 3}


@pytest.mark.parametrize(
    ("stored", "expected"),
    [
        (
            {**BIT, "size": {"shortest_edge": 256}, "crop_size": {"height": 224, "width": 224}},
            ImageTransform(224, crop_pct=0.875),
        ),
        (
            {**BIT, "size": 224, "crop_size": 224, "resample": 2},
            ImageTransform(224, crop_pct=1.0, resample="bilinear"),
        ),
        ({**CONVNEXT, "size": {"shortest_edge": 224}}, ImageTransform(224, crop_pct=0.875)),
        ({**CONVNEXT, "size": {"shortest_edge": 384}}, ImageTransform(384)),
        (
            {"image_processor_type": "ViTImageProcessor", "size": 96},
            ImageTransform(96, resample="bilinear"),
        ),
        ({"size": {"height": 96, "width": 96}}, ImageTransform(96)),
    ],
)
def test_the_files_of_image_encoders(
    stored: dict[str, Any], expected: ImageTransform, tmp_path: Path
) -> None:
    file = tmp_path / "preprocessor_config.json"
    file.write_text(json.dumps(stored))
    transform = ImageTransform.from_pretrained(tmp_path)
    assert transform == expected
    transform.save_pretrained(tmp_path)
    assert ImageTransform.from_pretrained(tmp_path) == transform


@pytest.mark.parametrize("value", [0, 1, "cubic"])
def test_other_filters_are_refused(value: Any, tmp_path: Path) -> None:
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"size": 8, "resample": value}))
    with pytest.raises(ValueError, match=r"'resample' is .*; expected 2 \(bilinear\)"):
        ImageTransform.from_pretrained(tmp_path)


@pytest.mark.parametrize("name", ["pillow", "torch"])
def test_the_centre_is_read_as_transformers_reads_it(name: Any) -> None:
    smooth = Image.effect_noise((160, 120), 90).filter(ImageFilter.GaussianBlur(4)).convert("RGB")
    theirs = BitImageProcessorPil(
        size={"shortest_edge": 64}, crop_size={"height": 48, "width": 48}, resample=2
    )
    expected = theirs(smooth, return_tensors="pt")["pixel_values"][0].float()
    transform = ImageTransform(48, resample="bilinear", crop_pct=0.75, filter=name)
    torch.testing.assert_close(transform(smooth), expected, atol=0.05, rtol=0)
    squashed = replace(transform, crop_pct=None)(smooth)
    assert (squashed - expected).abs().max() > 0.2
    assert transform.seen(160, 120) == (35, 15, 125, 105)


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
    dark = saved(Image.fromarray(np.full((8, 8), 250, dtype=np.uint16)), "PNG").getvalue()
    assert decode_image(dark, "dark").getpixel((0, 0)) == (250, 250, 250)
    assert decode_image(dark, "dark", "full").getpixel((0, 0)) == (1, 1, 1)
    whole = Image.fromarray(np.full((8, 8), 100, dtype=np.int32))
    assert colour_of(saved(whole, "TIFF"), tmp_path) == (100, 100, 100)
    for value, grey in ((0.5, 128), (0.0, 0), (200.0, 200), (40_000.0, 156), (float("nan"), 0)):
        floats = Image.fromarray(np.full((8, 8), value, dtype=np.float32))
        assert colour_of(saved(floats, "TIFF"), tmp_path) == (grey, grey, grey)
    blue = Image.new("RGB", (8, 8), (0, 0, 200))
    frames = saved(red, "GIF", save_all=True, append_images=[blue])
    assert colour_of(frames, tmp_path)[0] > 150


@pytest.mark.parametrize(
    ("values", "kind", "window", "ends", "note"),
    [
        ((0, 3459), np.uint16, "auto", (0, 255), "grey values 0 to 3459"),
        ((0, 3459), np.uint16, "full", (0, 13), ""),
        ((0, 3459), np.uint16, (0.0, 4095.0), (0, 215), ""),
        ((1000, 4000), np.uint16, "auto", (0, 255), "grey values 1000 to 4000"),
        ((0, 65535), np.uint16, "auto", (0, 255), ""),
        ((0, 20_000), np.uint16, "auto", (0, 78), ""),
        ((-1000, 3000), np.int32, "auto", (0, 255), "grey values -1000 to 3000"),
        ((-1000, 3000), np.int32, (-160.0, 240.0), (0, 255), ""),
        ((0, 200), np.int32, "auto", (0, 200), ""),
        ((0.0, 1.0), np.float32, "auto", (0, 255), ""),
        ((-1000.0, 500.5), np.float32, "auto", (0, 255), "grey values -1000 to 500.5"),
    ],
)
def test_the_window_of_grey_values(
    values: tuple[float, float], kind: Any, window: Any, ends: tuple[int, int], note: str
) -> None:
    ramp = np.linspace(*values, 4096).reshape(64, 64).astype(kind)
    data = saved(Image.fromarray(ramp), "TIFF").getvalue()
    shown = np.asarray(decode_image(data, "ramp", window))
    assert (shown.min(), shown.max()) == ends
    assert (np.diff(shown[:, :, 0].ravel().astype(int)) >= 0).all()
    if window == "auto":
        fault, found = examine_image(data)
        assert fault == ""
        assert found.partition(" of ")[0] == (f"narrow range: {note}" if note else "")


def test_dead_pixels_do_not_hide_a_narrow_range() -> None:
    values = np.linspace(0, 3459, 4096).reshape(64, 64).astype(np.uint16)
    values[0, :2] = 65535
    shown = np.asarray(decode_image(saved(Image.fromarray(values), "PNG").getvalue(), "dead"))
    assert shown.max() == 255
    assert 110 < np.median(shown) < 140


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "TIFF", "AVIF"])
def test_of_an_animation_the_first_frame_is_read_and_noted(kind: str) -> None:
    red, blue = (Image.new("RGB", (8, 8), colour) for colour in ("red", "blue"))
    data = saved(red, kind, save_all=True, append_images=[blue]).getvalue()
    assert decode_image(data, "moving").getpixel((4, 4))[0] > 250  # type: ignore[index]
    assert examine_image(data) == ("", "several frames: the model sees the first one")
    assert examine_image(saved(red, kind).getvalue()) == ("", "")


def test_pictures_of_phones_with_a_second_frame_are_usual() -> None:
    red, blue = (Image.new("RGB", (8, 8), colour) for colour in ("red", "blue"))
    data = saved(red, "MPO", save_all=True, append_images=[blue]).getvalue()
    assert decode_image(data, "phone").getpixel((4, 4))[0] > 250  # type: ignore[index]
    assert examine_image(data) == ("", "")


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_exif_orientation(kind: str, orientation: int, tmp_path: Path) -> None:
    """A viewer shows the red corner at the top left, whichever way the camera was held."""
    upright = Image.new("RGB", (48, 32), "white")
    upright.paste("red", (0, 0, 16, 16))
    turned = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # how the camera stores it
    image = upright.transpose(Image.Transpose(turned[orientation])) if orientation > 1 else upright
    exif = image.getexif()
    exif[0x0112] = orientation
    path = tmp_path / "picture"
    path.write_bytes(saved(image, kind, exif=exif).getvalue())
    for shown in (load_image(path), Image.fromarray(load_pixels(path))):
        assert shown.size == (48, 32)
        assert np.abs(np.asarray(shown, int)[8, 8] - (255, 0, 0)).max() < 20
        assert np.asarray(shown, int)[24, 8].min() > 235


def test_colours_of_cmyk_and_palettes() -> None:
    orange = Image.new("RGB", (16, 16), (240, 120, 0))
    for data in (
        saved(orange.convert("CMYK"), "JPEG", quality=98),
        saved(orange.convert("CMYK"), "TIFF"),
        saved(orange.convert("P", palette=Image.Palette.ADAPTIVE), "PNG"),
        saved(orange.convert("P", palette=Image.Palette.ADAPTIVE), "GIF"),
        saved(orange.convert("P", palette=Image.Palette.ADAPTIVE).convert("PA"), "TIFF"),
    ):
        colour = decode_image(data.getvalue(), "orange").getpixel((8, 8))
        assert np.abs(np.subtract(colour, (240, 120, 0))).max() < 8


def test_heic(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    heif = pytest.importorskip("pillow_heif")
    upright = Image.new("RGB", (64, 32), "white")
    upright.paste("red", (0, 0, 32, 32))
    turned = upright.transpose(Image.Transpose.ROTATE_90)  # as orientation 6 stores it
    exif = Image.Exif()
    exif[0x0112] = 6
    path = tmp_path / "phone.heic"
    heif.from_pillow(turned).save(path, exif=exif.tobytes(), quality=95)
    shown = load_image(path)
    assert shown.size == (64, 32)
    assert np.abs(np.subtract(shown.getpixel((5, 16)), (255, 0, 0))).max() < 20
    assert examine_image(path.read_bytes()) == ("", "")
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    images_module._register_heif.cache_clear()
    with pytest.raises(ValueError, match=r"phone\.heic: HEIC needs .*'instructblip\[heif\]'$"):
        load_image(path)
    assert "pip install" in examine_image(path.read_bytes())[0]


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


def photo(size: tuple[int, int] = (640, 480)) -> Image.Image:
    rng = np.random.default_rng(0)
    coarse = Image.fromarray(rng.integers(0, 256, (30, 40, 3), dtype=np.uint8))
    noise = Image.fromarray(rng.integers(0, 256, (*size[::-1], 3), dtype=np.uint8))
    smooth = coarse.resize(size, Image.Resampling.BICUBIC)
    return Image.blend(smooth, noise.filter(ImageFilter.GaussianBlur(1)), 0.2)


def test_the_filter_of_training_is_a_grey_level_from_the_exact_one() -> None:
    exact = ImageTransform()
    fast = exact.for_training(crop=False, mirror=False)
    apart = np.abs(exact.resize(photo()).astype(int) - fast.resize(np.array(photo())))
    assert apart.max() == 1
    assert apart.mean() < 0.005
    crop = replace(fast, crop=True)
    exact_crop = replace(crop, filter="pillow")
    pixels = [t.resize(photo(), random.Random(3)).astype(int) for t in (crop, exact_crop)]
    assert np.abs(pixels[0] - pixels[1]).max() <= 1


@pytest.mark.parametrize(
    "options",
    [
        {"quality": 90},
        {"quality": 75, "subsampling": 0},
        {"quality": 60, "progressive": True},
        {"mode": "L"},
        {"mode": "CMYK"},
        {"size": (641, 479)},
    ],
)
def test_simplejpeg_decodes_the_pixels_of_pillow(options: dict[str, Any], tmp_path: Path) -> None:
    pytest.importorskip("simplejpeg")
    mode, size = options.pop("mode", "RGB"), options.pop("size", (640, 480))
    path = tmp_path / "a.jpg"
    path.write_bytes(saved(photo(size).convert(mode), "JPEG", **options).getvalue())
    assert (images_module.jpeg_pixels(path.read_bytes()) is None) == (mode == "CMYK")
    assert np.array_equal(load_pixels(path), np.asarray(load_image(path)))


def test_a_damaged_jpeg_is_named_with_simplejpeg_too(tmp_path: Path) -> None:
    path = tmp_path / "a.jpg"
    data = saved(photo(), "JPEG").getvalue()
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match=r"a\.jpg: cannot be decoded: image file is truncated"):
        load_pixels(path)


def test_cropping_and_mirroring_are_apart() -> None:
    image = np.array(photo((40, 40)))
    base = ImageTransform(image_size=16)
    crops = [base.for_training(mirror=False).resize(image, random.Random(s)) for s in range(20)]
    both = [base.for_training().resize(image, random.Random(s)) for s in range(20)]
    same = [np.array_equal(a, b) for a, b in zip(crops, both, strict=True)]
    assert any(same)
    assert not all(same)
    assert all(
        np.array_equal(a, b) or np.array_equal(a[:, ::-1], b)
        for a, b in zip(crops, both, strict=True)
    )
    plain = base.for_training(crop=False, mirror=False).resize(image)
    mirror = base.for_training(crop=False)
    mirrored = [mirror.resize(image, random.Random(s)) for s in range(20)]
    sides = [np.array_equal(m, plain) or -np.array_equal(m, plain[:, ::-1]) for m in mirrored]
    assert {*sides} == {True, -1}
    assert all(
        np.array_equal(mirror.resize(image, random.Random(s), False), plain) for s in range(9)
    )


def test_a_chosen_window_is_saved_where_transformers_reads_it(tmp_path: Path) -> None:
    for window in ("full", (0.0, 4095.0)):
        transform = ImageTransform(image_size=30, window=window)  # type: ignore[arg-type]
        transform.save_pretrained(tmp_path)
        assert ImageTransform.from_pretrained(tmp_path) == transform
        BlipImageProcessorPil.from_pretrained(str(tmp_path))
    file = tmp_path / "preprocessor_config.json"
    file.write_text(file.read_text().replace("4095.0", '"high"'))
    with pytest.raises(ValueError, match=r"'window' is \[0.0, 'high'\]; expected auto, full or"):
        ImageTransform.from_pretrained(tmp_path)


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
