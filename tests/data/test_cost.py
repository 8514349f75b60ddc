"""Images that would cost a decoder minutes are refused; those of cameras and programs are read."""

import io
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageCms, PngImagePlugin

import instructblip.data.reading.decode as images_module
from instructblip.data.reading.cost import check_cost
from instructblip.data.reading.decode import MAX_SIDE, decode_image, examine_image
from instructblip.data.reading.images import load_image, load_pixels


def noise(width: int = 320, height: int = 240) -> Image.Image:
    rng = np.random.default_rng(0)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


def saved(image: Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def segment(marker: int, content: bytes) -> bytes:
    return struct.pack(">BBH", 0xFF, marker, len(content) + 2) + content


def jpeg_with(inserted: bytes) -> bytes:
    data = saved(Image.new("RGB", (8, 8)), "JPEG")
    return data[:2] + inserted + data[2:]


def many_scans(number: int, side: int = 64) -> bytes:
    """A progressive JPEG whose last scan is repeated."""
    data = saved(Image.new("RGB", (side, side)), "JPEG", progressive=True)
    last = data[data.rfind(b"\xff\xda") : -2]
    return data[:-2] + last * number + data[-2:]


def gif_with(inserted: bytes) -> bytes:
    data = saved(Image.new("P", (8, 8)), "GIF")
    at = 13 + (3 << (data[10] & 7) + 1 if data[10] & 128 else 0)
    return data[:at] + inserted + data[at:]


def chunk(kind: bytes, content: bytes) -> bytes:
    parts = (struct.pack(">I", len(content)), kind, content)
    return b"".join((*parts, struct.pack(">I", zlib.crc32(kind + content))))


def png_with(inserted: bytes) -> bytes:
    data = saved(Image.new("RGB", (8, 8)), "PNG")
    return data[:33] + inserted + data[33:]


def bmp_runs(runs: int) -> bytes:
    start = 54 + 1024
    header = struct.pack("<IiiHHIIiiII", 40, 8, 8, 1, 8, 1, 2 * runs, 0, 0, 256, 0)
    return (
        b"BM"
        + struct.pack("<IHHI", start + 2 * runs, 0, 0, start)
        + header
        + bytes(1024 + 2 * runs)
    )


COSTLY: dict[str, Callable[[], bytes]] = {
    "101 scans": lambda: many_scans(91),
    "pixels in all its scans": lambda: many_scans(60, 4096),
    "segments before its first scan": lambda: jpeg_with(segment(0xE1, b"Exif\0\0") * 1000),
    "bytes of Exif": lambda: jpeg_with(segment(0xE1, b"Exif\0\0" + bytes(60_000)) * 3),
    "bytes between its segments": lambda: jpeg_with(b"\xff" * 70_000),
    "bytes of tables": lambda: jpeg_with(segment(0xDB, (b"\0" + b"\1" * 64) * 900) * 2),
    # Pillow reads no length after this marker, so what follows are segments
    "1001 segments": lambda: jpeg_with(b"\xff\xc8\xff\xf0" + segment(0xE1, b"Exif\0\0") * 2000),
    "blocks in its first frames": lambda: gif_with(b"!\xfe" + b"\1c" * 2000 + b"\0"),
    "bytes of comments": lambda: gif_with(b"!\xfe" + (b"\xff" + b"c" * 255) * 300 + b"\0"),
    "bytes between its blocks": lambda: gif_with(b"x" * 70_000),
    "chunks": lambda: png_with(chunk(b"tEXt", b"a\0b") * 2000),
    "131080 bytes of Exif": lambda: png_with(chunk(b"eXIf", bytes((1 << 17) + 2))),
    "200004 bytes of Exif": lambda: png_with(
        chunk(
            b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(b"\nexif\n9\n" + b"0" * 400_000)
        )
    ),
    "bytes of run lengths": lambda: bmp_runs(1 << 19),
}


@pytest.mark.parametrize("reason", COSTLY)
def test_images_that_cost_too_much_are_refused(reason: str, tmp_path: Path) -> None:
    data = COSTLY[reason]()
    assert reason in examine_image(data, decode=True)[0]
    path = tmp_path / "image.jpg"
    path.write_bytes(data)
    for load in (load_image, load_pixels):
        with pytest.raises(ValueError, match=rf"image\.jpg: .*{reason}.*; expected at most"):
            load(path)


@pytest.mark.parametrize("size", [(MAX_SIDE + 1, 1), (1, MAX_SIDE + 1)])
def test_a_very_long_side_is_refused(size: tuple[int, int]) -> None:
    data = saved(Image.new("1", size), "PNG")
    assert "65537" in examine_image(data)[0]
    with pytest.raises(ValueError, match=r"65537.*; at most 65536 a side"):
        decode_image(data, "a.png")


def exif() -> Image.Exif:
    """Exif of a camera: a thumbnail in it, GPS, and a maker's note that fills its segment."""
    tags = Image.Exif()
    tags[0x010F], tags[0x0112] = "Camera", 1
    tags.get_ifd(0x8769)[0x927C] = bytes(40_000)
    tags.get_ifd(0x8825)[1] = "N"
    tags.get_ifd(0x0201)  # IFD1
    return tags


def test_images_of_cameras_and_programs_are_read(tmp_path: Path) -> None:
    image = noise()
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    thumbnail = saved(image.resize((160, 120)), "JPEG", progressive=True)
    notes = segment(0xE1, b"http://ns.adobe.com/xap/1.0/\0" + thumbnail + b"\xff\xda" * 5000) * 20
    photo = {"quality": 95, "icc_profile": profile + bytes(300_000), "exif": exif()}
    info = PngImagePlugin.PngInfo()
    info.add_itxt("XML:com.adobe.xmp", "x" * 100_000)
    progressive = saved(image, "JPEG", progressive=True, **photo)
    files = {
        "baseline": saved(image, "JPEG", **photo),
        "progressive": progressive,
        "restarts": saved(image, "JPEG", restart_marker_blocks=1, **photo),
        "comment": saved(image, "JPEG", comment=b"c" * 60_000, **photo),
        "grey": saved(image.convert("L"), "JPEG", progressive=True),
        "cmyk": saved(image.convert("CMYK"), "JPEG", progressive=True),
        "notes": progressive[:2] + notes + progressive[2:],
        # a phone's video after the image
        "trailer": progressive + b"\xff\xda\0\x08" * 5000,
        "phone": saved(image, "MPO", save_all=True, append_images=[image] * 2, exif=exif()),
        "png": saved(image, "PNG", pnginfo=info, exif=exif(), icc_profile=profile),
        "webp": saved(image, "WEBP", exif=exif(), icc_profile=profile),
        "gif": saved(image, "GIF", save_all=True, append_images=[noise()] * 3, comment=b"c" * 9000),
        "bmp": saved(image, "BMP"),
        "tiff": saved(image, "TIFF", exif=exif()),
        "avif": saved(image, "AVIF", exif=exif()),
        "jp2": saved(image, "JPEG2000"),
        "ppm": saved(image, "PPM"),
    }
    for name, data in files.items():
        assert examine_image(data, decode=True)[0] == "", name
        path = tmp_path / name
        path.write_bytes(data)
        assert load_image(path).size == image.size, name
        assert load_pixels(path).shape == (240, 320, 3), name


def test_every_prefix_of_an_image_ends_in_one_line() -> None:
    for kind in ("JPEG", "PNG", "GIF", "BMP"):
        data = saved(noise(16, 16), kind)
        for end in range(0, len(data), 3):
            check_cost(data[:end])


def test_formats_that_are_not_named_are_not_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pillow opens EPS with Ghostscript."""
    pages = saved(noise(16, 16), "EPS")
    with Image.open(io.BytesIO(pages)) as image:
        assert image.format == "EPS"
    with pytest.raises(ValueError, match=r"not an image in any of JPEG, PNG, .*PPM"):
        decode_image(pages, "page")
    for kind in ("TGA", "PCX", "ICO", "ICNS", "SGI", "DDS"):
        assert examine_image(saved(noise(16, 16), kind))[0].startswith("not an image in any of"), (
            kind
        )
    monkeypatch.setattr(images_module, "FORMATS", (*images_module.FORMATS, "EPS"))
    assert not examine_image(pages)[0].startswith("not an image")
