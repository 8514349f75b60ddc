"""The bytes of an image file as RGB: ``FORMATS``, DICOM and HEIC.

It does without torch, so that a process that only decodes starts in half a second.
"""

import io
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, Literal

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageOps, UnidentifiedImageError

from instructblip.data.reading.cost import check_cost, check_exif
from instructblip.data.reading.dicom import is_dicom, read_dicom

MAX_PIXELS = 1 << 26
"""Pixels of one image (67 million, 8192 x 8192); an image whose header says more is not decoded."""
MAX_SIDE = 1 << 16
"""Pixels of one side: Pillow's resizing of a longer one takes seconds and 32 bytes for each."""
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG2000", "PPM")
"""What Pillow may decode; it would run Ghostscript on an EPS file."""

Window = Literal["auto", "full"] | tuple[float, float]
"""Which grey values of images with more than 8 bits become black and white. ``full``: the ends of
their type. ``auto``: the window that a DICOM file names, and the values that the image uses (its
quantiles 0.001 and 0.999) where these are at most a quarter of the type's."""
NARROW = "narrow range"
"""The kind of note about an image whose pixels depend on ``auto``."""


def decode_image(
    data: bytes, where: str, window: Window = "auto", thumbnail: bool = False
) -> Image.Image:
    """The bytes of an image file as RGB; ValueError names ``where``. A ``thumbnail`` of a JPEG is
    decoded at the smallest scale that keeps 64 pixels a side, in a fraction of the time."""
    try:
        if is_dicom(data):
            return _from_dicom(data, window)
        with _opened(data) as image:
            if thumbnail:
                image.draft("RGB", (64, 64))
            return _decoded(image, window)
    except ImportError as error:
        raise ValueError(f"image {where}: {error}") from None
    except _DECODING_ERRORS as error:
        raise ValueError(
            f"image {where}: cannot be decoded: {_reason(data, error)}; download it again or "
            "remove its annotations"
        ) from None


def examine_image(data: bytes, decode: bool = False) -> tuple[str, str]:
    """(why an image file cannot be used, what is unusual about it as "kind: reason"), or "".

    Decodes the whole image with ``decode``, if it has more than 8 bits, or if the file does not end
    as its format prescribes; otherwise reads the header only.
    """
    try:
        if is_dicom(data):
            num_frames = read_dicom(data, MAX_PIXELS).num_frames
            which = f"{num_frames} frames, of which the model sees the middle one"
            return "", f"several frames: {which}" if num_frames > 1 else ""
        with _opened(data) as image:
            animated = getattr(image, "is_animated", False) and image.format != "MPO"
            note = "several frames: the model sees the first one" if animated else ""
            if _is_deep(image):
                note = _note_of_range(image) or note
            elif decode or not _ENDS.get(image.format or "", lambda _: False)(data):
                _decoded(image, "auto")
            return "", note
    except ImportError as error:
        return str(error), ""
    except _DECODING_ERRORS as error:
        return _reason(data, error), ""


_DECODING_ERRORS = (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError)
# How a complete file ends. A JPEG may have more bytes after its end: then it is decoded.
_ENDS: dict[str, Callable[[bytes], bool]] = {
    "JPEG": lambda data: data.rstrip(b"\0").endswith(b"\xff\xd9"),
    "PNG": lambda data: data[-8:-4] == b"IEND",
    "WEBP": lambda data: len(data) >= int.from_bytes(data[4:8], "little") + 8,
}


# The first brand of an HEIC file; AVIF, of the same family, is read by Pillow.
_HEIF = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")


@cache
def _register_heif() -> None:
    try:
        from pillow_heif import register_heif_opener
    except ImportError:
        raise ImportError("HEIC needs pillow-heif: pip install 'instructblip[heif]'") from None
    register_heif_opener()


def jpeg_pixels(data: bytes) -> UInt8[np.ndarray, "H W 3"] | None:
    """The pixels that Pillow decodes from a JPEG, or None where it has to decode the file itself:
    other formats, colours and orientations, damage, or no simplejpeg."""
    decode = _simplejpeg()
    if decode is None or not data.startswith(b"\xff\xd8"):
        return None
    try:
        with _opened(data) as image:
            if image.mode not in ("RGB", "L") or image.getexif().get(0x0112, 1) != 1:
                return None
        return decode(data, "RGB", fastdct=False, fastupsample=False)
    except _DECODING_ERRORS:
        return None  # Pillow says what is wrong


@cache
def _simplejpeg() -> Callable[..., Any] | None:
    try:
        from simplejpeg import decode_jpeg
    except ImportError:
        return None
    return decode_jpeg


@contextmanager
def _opened(data: bytes) -> Iterator[Image.Image]:
    """The image with its header read, its size and its cost checked, not decoded."""
    check_cost(data)
    formats = FORMATS
    with warnings.catch_warnings():
        # Pillow warns of fewer pixels than it refuses; MAX_PIXELS is below both.
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        if data[4:8] == b"ftyp" and data[8:12] in _HEIF:
            _register_heif()
            formats = ("HEIF",)
        with Image.open(io.BytesIO(data), formats=formats) as image:
            if image.width * image.height > MAX_PIXELS:
                raise ValueError(f"{image.width} x {image.height} pixels; at most {MAX_PIXELS}")
            if max(image.size) > MAX_SIDE:
                raise ValueError(
                    f"{image.width} x {image.height} pixels; at most {MAX_SIDE} a side"
                )
            yield image


def _decoded(image: Image.Image, window: Window) -> Image.Image:
    image.load()
    check_exif(image.info.get("exif") or image.info.get("Raw profile type exif"))
    ImageOps.exif_transpose(image, in_place=True)
    return to_rgb(image, window)


def _reason(data: bytes, error: Exception) -> str:
    if not data:
        return "empty file"
    if isinstance(error, UnidentifiedImageError):  # its message shows an address in memory
        return f"not an image in any of {', '.join(FORMATS)}"
    return str(error) or type(error).__name__


def _is_deep(image: Image.Image) -> bool:
    """Whether grey values have more than 8 bits; Pillow would clip them."""
    return image.mode.startswith("I;16") or image.mode in ("I", "F")


def _grey_range(values: np.ndarray, mode: str, window: Window) -> tuple[float, float]:
    """The grey values that become black and white.

    16-bit images span 0 .. 65535. 32-bit integers and floats have no fixed range: values up to 255
    count as 8-bit, larger ones as 16-bit, and floats up to 1 as 0 .. 1.
    """
    if not isinstance(window, str):
        return window
    low, high = float(values.min(initial=0)), float(values.max(initial=0))
    signed = window == "auto" and low < 0
    if mode == "F" and high <= 1 and not signed:
        return 0.0, 1.0
    if high <= 255 and not signed and (window == "auto" or not mode.startswith("I;16")):
        return 0.0, 255.0
    full = (0.0, 65535.0)
    return (window == "auto" and _narrow_range(values, full)) or full


def _narrow_range(values: np.ndarray, full: tuple[float, float]) -> tuple[float, float] | None:
    """The values that an image uses if they are a small part of ``full``, of more than 8 bits. A
    few pixels, such as dead ones of a detector, do not count."""
    low, high = (float(v) for v in np.quantile(values, (0.001, 0.999)))
    width = full[1] - full[0]
    return (low, high) if width > 255 and 0 < high - low <= width / 4 else None


def _note_of_range(image: Image.Image) -> str:
    values = _grey_values(image)
    low, high = _grey_range(values, image.mode, "auto")
    if (low, high) == _grey_range(values, image.mode, "full"):
        return ""
    return f"{NARROW}: grey values {values.min():g} to {values.max():g} of {image.mode} pixels"


def _grey_values(image: Image.Image) -> np.ndarray:
    return np.nan_to_num(np.asarray(image, dtype=np.float64))


def _to_8_bits(values: np.ndarray, ends: tuple[float, float]) -> UInt8[np.ndarray, "..."]:
    """``ends`` become 0 and 255; what is outside is clipped."""
    low, high = ends
    scaled = (values - low) * (255 / (high - low))
    return np.clip(np.rint(scaled), 0, 255).astype(np.uint8)


def _from_dicom(data: bytes, window: Window) -> Image.Image:
    dicom = read_dicom(data, MAX_PIXELS)
    if dicom.values.ndim == 3:  # colours have no window
        return Image.fromarray(_to_8_bits(dicom.values, dicom.full))
    if window == "auto":
        ends = dicom.window or _narrow_range(dicom.values, dicom.full) or dicom.full
    else:
        ends = dicom.full if isinstance(window, str) else window
    grey = _to_8_bits(dicom.values, ends)
    return Image.fromarray(255 - grey if dicom.inverted else grey).convert("RGB")


def to_rgb(image: Image.Image, window: Window = "auto") -> Image.Image:
    """RGB from any mode: grey of more than 8 bits by ``window``, transparency over white, CMYK,
    palette."""
    if _is_deep(image):
        values = _grey_values(image)
        image = Image.fromarray(_to_8_bits(values, _grey_range(values, image.mode, window)))
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, rgba).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")
