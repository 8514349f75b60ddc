"""Images: decode anything Pillow reads to RGB, resize, augment, normalise.

The evaluation transform gives the pixels of transformers' BLIP image processor on its Pillow
backend: resize to a square with bicubic resampling, scale to [0, 1], subtract mean, divide by std.
"""

import io
import json
import math
import random
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from instructblip.core.batch import Example
from instructblip.data.reading.records import image_name
from instructblip.data.templates import Rendered

PREPROCESSORS = (
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "processor_config.json",
)
"""Files in which transformers' processors keep size and normalisation; the second one is
InstructBlipVideo's."""

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
MAX_PIXELS = 1 << 26
"""Pixels of one image (67 million, 8192 x 8192); an image whose header says more is not decoded."""
MAX_FILE_BYTES = 1 << 28

_SIDES = re.compile(
    r"\b(left\w*|right\w*|east\w*|west\w*|(?:counter|anti)?-?clockwise)\b|左|右", re.IGNORECASE
)


def load_image(name: str | Path, root: Path | None = None) -> Image.Image:
    """The image as RGB, rotated by its EXIF tag, transparency over white; of an animation the first
    frame.

    With ``root``, ``name`` must be a relative path below it. Raises FileNotFoundError, or
    ValueError naming the file, for anything unreadable.
    """
    path = Path(name) if root is None else Path(root) / image_name(str(name), str(root))
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise ValueError(f"the file is larger than {MAX_FILE_BYTES} bytes")
        data = path.read_bytes()
    except FileNotFoundError:
        raise FileNotFoundError(
            f"image {path} does not exist; check its name, and that all images are there"
        ) from None
    except (OSError, ValueError) as error:
        raise ValueError(f"image {path}: cannot be read: {error}") from None
    return decode_image(data, str(path))


def decode_image(data: bytes, where: str, thumbnail: bool = False) -> Image.Image:
    """The bytes of an image file as RGB; ValueError names ``where``. A ``thumbnail`` of a JPEG is
    decoded at the smallest scale that keeps 64 pixels a side, in a fraction of the time."""
    try:
        with _opened(data) as image:
            if thumbnail:
                image.draft("RGB", (64, 64))
            return _decoded(image)
    except _DECODING_ERRORS as error:
        raise ValueError(
            f"image {where}: cannot be decoded: {_reason(data, error)}; download it again or "
            "remove its annotations"
        ) from None


def image_fault(data: bytes, decode: bool = False) -> str | None:
    """Why an image file cannot be used, or None.

    Decodes the whole image with ``decode``, or if the file does not end as its format prescribes;
    otherwise reads the header only.
    """
    try:
        with _opened(data) as image:
            is_complete = _ENDS.get(image.format or "", lambda _: False)
            if decode or not is_complete(data):
                _decoded(image)
    except _DECODING_ERRORS as error:
        return _reason(data, error)
    return None


_DECODING_ERRORS = (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError)
# How a complete file ends. A JPEG may have more bytes after its end: then it is decoded.
_ENDS: dict[str, Callable[[bytes], bool]] = {
    "JPEG": lambda data: data.rstrip(b"\0").endswith(b"\xff\xd9"),
    "PNG": lambda data: data[-8:-4] == b"IEND",
    "WEBP": lambda data: len(data) >= int.from_bytes(data[4:8], "little") + 8,
}


@contextmanager
def _opened(data: bytes) -> Iterator[Image.Image]:
    """The image with its header read and its size checked, not decoded."""
    with warnings.catch_warnings():
        # Pillow warns of fewer pixels than it refuses; MAX_PIXELS is below both.
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        with Image.open(io.BytesIO(data)) as image:
            if image.width * image.height > MAX_PIXELS:
                raise ValueError(f"{image.width} x {image.height} pixels; at most {MAX_PIXELS}")
            yield image


def _decoded(image: Image.Image) -> Image.Image:
    image.load()
    ImageOps.exif_transpose(image, in_place=True)
    return to_rgb(image)


def _reason(data: bytes, error: Exception) -> str:
    if not data:
        return "empty file"
    if isinstance(error, UnidentifiedImageError):  # its message shows an address in memory
        return "not an image in any format that Pillow reads"
    return str(error) or type(error).__name__


def _scale_of_grey(image: Image.Image) -> float:
    """The factor that maps grey values of more than 8 bits to 0 .. 255; Pillow would clip them.

    16-bit images span 0 .. 65535. 32-bit integers and floats have no fixed range: values up to 255
    count as 8-bit, larger ones as 16-bit, and floats up to 1 as 0 .. 1.
    """
    if image.mode.startswith("I;16"):
        return 1 / 257
    high = float(np.nanmax(np.asarray(image), initial=0))
    if image.mode == "F" and high <= 1:
        return 255.0
    return 1.0 if high <= 255 else 1 / 257


def to_rgb(image: Image.Image) -> Image.Image:
    """RGB from any mode: 16 bits scaled to 8, transparency over white, CMYK, palette."""
    if image.mode.startswith("I;16") or image.mode in ("I", "F"):
        values = np.nan_to_num(np.asarray(image, dtype=np.float64)) * _scale_of_grey(image)
        image = Image.fromarray(np.clip(np.rint(values), 0, 255).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, rgba).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


@dataclass(frozen=True, slots=True)
class ImageTransform:
    """RGB image -> float [3, S, S]. ``train`` adds a random crop and a random flip."""

    image_size: int = 224
    mean: tuple[float, float, float] = CLIP_MEAN
    std: tuple[float, float, float] = CLIP_STD
    train: bool = False
    min_scale: float = 0.5

    def __call__(
        self, image: Image.Image, rng: random.Random | None = None, flip: bool = True
    ) -> Float[Tensor, "3 S S"]:
        """Normalised pixels; ``flip=False`` where the text says left or right (``may_flip``)."""
        return self.normalise(self.resize(image, rng, flip))

    def resize(
        self, image: Image.Image, rng: random.Random | None = None, flip: bool = True
    ) -> UInt8[np.ndarray, "S S 3"]:
        """The resized image: the part of the transform that is worth caching."""
        size = (self.image_size, self.image_size)
        if not self.train:
            return np.asarray(image.resize(size, Image.Resampling.BICUBIC))
        if rng is None:
            raise ValueError("a training transform needs rng; use train=False for evaluation")
        box = crop_box(image.width, image.height, self.min_scale, rng)
        mirrored = rng.random() < 0.5  # drawn even if unused: later draws do not depend on `flip`
        image = image.crop(box).resize(size, Image.Resampling.BICUBIC)
        if flip and mirrored:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return np.asarray(image)

    def normalise(self, pixels: UInt8[np.ndarray, "S S 3"]) -> Float[Tensor, "3 S S"]:
        """Subtract ``mean`` and divide by ``std``, by a table of the 256 values of each channel."""
        values = _normal_values(self.mean, self.std)
        channels = [values[c][pixels[:, :, c]] for c in range(3)]
        return torch.from_numpy(np.stack(channels))

    @classmethod
    def from_pretrained(cls, path: str | Path) -> "ImageTransform":
        """Reads the first of ``PREPROCESSORS`` in ``path`` that describes images."""
        for file in (Path(path) / name for name in PREPROCESSORS):
            config: dict[str, Any] = json.loads(file.read_bytes()) if file.is_file() else {}
            config = config.get("image_processor", config.get("video_processor", config))
            if config.keys() & {"size", "image_mean", "image_processor_type"}:
                break
        else:
            raise FileNotFoundError(
                f"no preprocessor_config.json in {path}; expected a model directory"
            )
        size = config.get("size", 224)
        if isinstance(size, dict):
            size = size.get("height", size.get("shortest_edge"))
        if not isinstance(size, int) or size < 1:
            raise ValueError(f"{file}: 'size' is {config.get('size')!r}; expected height and width")
        return cls(
            image_size=size,
            mean=_three(config.get("image_mean", CLIP_MEAN), "image_mean", file),
            std=_three(config.get("image_std", CLIP_STD), "image_std", file),
        )

    def save_pretrained(self, path: str | Path) -> None:
        """Writes ``preprocessor_config.json`` as transformers' BLIP image processor reads it."""
        config = {
            "image_processor_type": "BlipImageProcessor",
            "do_convert_rgb": True,
            "do_resize": True,
            "size": {"height": self.image_size, "width": self.image_size},
            "resample": int(Image.Resampling.BICUBIC),
            "do_rescale": True,
            "rescale_factor": 1 / 255,
            "do_normalize": True,
            "image_mean": list(self.mean),
            "image_std": list(self.std),
        }
        text = json.dumps(config, indent=2) + "\n"
        (Path(path) / "preprocessor_config.json").write_text(text, encoding="utf-8")

    def for_training(self) -> "ImageTransform":
        """The same size and normalisation, with augmentation."""
        return replace(self, train=True)


@cache
def _normal_values(
    mean: tuple[float, float, float], std: tuple[float, float, float]
) -> Float[np.ndarray, "3 256"]:
    """The normalised value of each of the 256 pixel values, by channel."""
    values = np.arange(256, dtype=np.float32) / np.float32(255)
    centred = values - np.asarray(mean, dtype=np.float32)[:, None]
    return centred / np.asarray(std, dtype=np.float32)[:, None]


def may_flip(example: Example, rendered: Rendered) -> bool:
    """Whether a mirrored image still fits its text: no sides named, no words to read."""
    if example.ocr_tokens or example.task in ("read", "caption_ocr"):
        return False
    return not _SIDES.search(f"{rendered.prompt} {rendered.response}")


def crop_box(
    width: int, height: int, min_scale: float, rng: random.Random
) -> tuple[int, int, int, int]:
    """A random crop (left, top, right, bottom) with ``min_scale`` to 1 of the area and an aspect
    ratio of 3:4 to 4:3; after ten that do not fit, the largest centred crop of such a ratio."""
    low, high = math.log(3 / 4), math.log(4 / 3)
    for _ in range(10):
        area = width * height * rng.uniform(min_scale, 1)
        ratio = math.exp(rng.uniform(low, high))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            left, top = rng.randint(0, width - w), rng.randint(0, height - h)
            return left, top, left + w, top + h
    w = min(width, max(1, round(height * 4 / 3)))
    h = min(height, max(1, round(width * 4 / 3)))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


def _three(value: Any, name: str, file: Path) -> tuple[float, float, float]:
    if not isinstance(value, list | tuple) or len(value) != 3:
        raise ValueError(f"{file}: '{name}' is {value!r}; expected three numbers")
    return (float(value[0]), float(value[1]), float(value[2]))
