"""Images: load as RGB, resize, augment, normalise.

The evaluation transform gives the pixels of transformers' BLIP image processor on its Pillow
backend: resize to a square with bicubic resampling, scale to [0, 1], subtract mean, divide by std.
Training resizes with torch's antialiased bicubic filter, which is faster; on photographs 0.4 % of
its values are one grey level off.
"""

import json
import math
import random
import re
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate

from instructblip.core.example import Example
from instructblip.core.files import read_json
from instructblip.data.reading.decode import Window
from instructblip.data.reading.images import load_image, load_pixels
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
MAX_SIDE = 1 << 13
"""Pixels of a side of what an image encoder reads."""
RESAMPLING = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
"""Filters of image encoders' own files, by the names that torch has for them."""
BILINEAR_PROCESSORS = ("ViT", "Siglip2", "DINOv3")
"""How the names of transformers' image processors begin whose default is not bicubic."""

_SIDES = re.compile(
    r"\b(left\w*|right\w*|east\w*|west\w*|(?:counter|anti)?-?clockwise)\b|左|右", re.IGNORECASE
)


@dataclass(frozen=True, slots=True)
class ImageTransform:
    """RGB image -> float [3, S, S]. Training may crop and mirror images at random.

    ``filter`` resizes: "pillow" as transformers' processor, "torch" faster (see above). With
    ``crop_pct`` an image is not squashed to a square: the square in its centre is cut out, whose
    side is this part of the shorter side of the image.
    """

    image_size: int = 224
    mean: tuple[float, float, float] = CLIP_MEAN
    std: tuple[float, float, float] = CLIP_STD
    crop: bool = False
    mirror: bool = False
    min_scale: float = 0.5
    filter: Literal["pillow", "torch"] = "pillow"
    window: Window = "auto"
    resample: Literal["bilinear", "bicubic"] = "bicubic"
    crop_pct: float | None = None

    @property
    def is_random(self) -> bool:
        """Whether two uses of an image may give different pixels."""
        return self.crop or self.mirror

    def __call__(
        self,
        image: Image.Image | UInt8[np.ndarray, "H W 3"],
        rng: random.Random | None = None,
        flip: bool = True,
    ) -> Float[Tensor, "3 S S"]:
        """Normalised pixels; ``flip=False`` where the text says left or right (``may_flip``)."""
        return self.normalise(self.resize(image, rng, flip))

    def read(self, path: str) -> Image.Image | UInt8[np.ndarray, "H W 3"]:
        """The image file as ``resize`` takes it, with this transform's window."""
        if self.filter == "torch":
            return load_pixels(path, self.window)
        return load_image(path, window=self.window)

    def resize(
        self,
        image: Image.Image | UInt8[np.ndarray, "H W 3"],
        rng: random.Random | None = None,
        flip: bool = True,
    ) -> UInt8[np.ndarray, "S S 3"]:
        """The resized image: the part of the transform that is worth caching."""
        width, height = image.size if isinstance(image, Image.Image) else image.shape[1::-1]
        box, mirrored = self.seen(width, height), False
        if self.is_random:
            if rng is None:
                raise ValueError("a transform that crops or mirrors needs rng")
            if self.crop:
                box = crop_box(width, height, self.min_scale, rng)
            # drawn even if unused: later draws do not depend on `flip`
            mirrored = rng.random() < 0.5 and self.mirror and flip
        if self.filter == "torch":
            pixels = image if isinstance(image, np.ndarray) else np.array(image)
            resized = _resize_by_torch(pixels, box, self)
        else:
            image = image if isinstance(image, Image.Image) else Image.fromarray(image)
            size = (self.image_size, self.image_size)
            resized = np.asarray(image.crop(box).resize(size, RESAMPLING[self.resample]))
        return np.ascontiguousarray(resized[:, ::-1]) if mirrored else resized

    def seen(self, width: int, height: int) -> tuple[int, int, int, int]:
        """The part of an image (left, top, right, bottom) that is read when it is not cropped at
        random."""
        if self.crop_pct is None:
            return 0, 0, width, height
        side = max(1, round(self.crop_pct * min(width, height)))
        left, top = (width - side) // 2, (height - side) // 2
        return left, top, left + side, top + side

    @property
    def levels(self) -> Float[Tensor, "3 256"]:
        """What `normalise` makes of each of the 256 pixel values, by channel."""
        return torch.from_numpy(_normal_values(self.mean, self.std))

    def normalise(self, pixels: UInt8[np.ndarray, "S S 3"]) -> Float[Tensor, "3 S S"]:
        """Subtract ``mean`` and divide by ``std``, by a table of the 256 values of each channel."""
        values = _normal_values(self.mean, self.std)
        channels = [values[c][pixels[:, :, c]] for c in range(3)]
        return torch.from_numpy(np.stack(channels))

    @classmethod
    def from_pretrained(cls, path: str | Path) -> "ImageTransform":
        """Reads the first of ``PREPROCESSORS`` in ``path`` that describes images."""
        for file in (Path(path) / name for name in PREPROCESSORS):
            config: dict[str, Any] = read_json(file) if file.is_file() else {}
            config = config.get("image_processor", config.get("video_processor", config))
            if not isinstance(config, dict):
                raise ValueError(
                    f"{file}: image_processor is {str(config)[:80]!r}; expected an object"
                )
            if config.keys() & {"size", "image_mean", "image_processor_type"}:
                break
        else:
            raise FileNotFoundError(
                f"no preprocessor_config.json in {path}; expected a model directory"
            )
        kind = str(config.get("image_processor_type", config.get("feature_extractor_type", "")))
        size, crop_pct = config.get("size", 224), config.get("crop_pct")
        if config.get("do_center_crop") and config.get("crop_size") and crop_pct is None:
            whole, size = _shortest_edge(size), config["crop_size"]
            crop_pct = min(1.0, (_shortest_edge(size) or 0) / whole) if whole else None
        elif kind.startswith("ConvNext") and (_shortest_edge(size) or 0) >= 384:
            crop_pct = None
        if isinstance(size, dict):
            size = size.get("height", size.get("shortest_edge"))
        if crop_pct is not None and not (isinstance(crop_pct, int | float) and 0 < crop_pct <= 1):
            raise ValueError(f"{file}: 'crop_pct' is {crop_pct!r}; expected a part of 1")
        if not isinstance(size, int) or not 1 <= size <= MAX_SIDE:
            raise ValueError(
                f"{file}: 'size' is {str(config.get('size'))[:80]}; expected height and width of 1 "
                f"to {MAX_SIDE}"
            )
        return cls(
            image_size=size,
            mean=_three(config.get("image_mean", CLIP_MEAN), "image_mean", file),
            std=_three(config.get("image_std", CLIP_STD), "image_std", file),
            window=_stored_window(config.get("window", "auto"), file),
            resample=_stored_filter(config.get("resample"), kind, file),
            crop_pct=crop_pct,
        )

    def save_pretrained(self, path: str | Path) -> None:
        """Writes ``preprocessor_config.json`` as transformers' BLIP image processor reads it."""
        (Path(path) / PREPROCESSORS[0]).write_text(self.to_json(), encoding="utf-8")

    def to_json(self) -> str:
        """The text of ``preprocessor_config.json``, with ``window`` where one was chosen."""
        config = {
            "image_processor_type": "BlipImageProcessor",
            "do_convert_rgb": True,
            "do_resize": True,
            "size": {"height": self.image_size, "width": self.image_size},
            "resample": int(RESAMPLING[self.resample]),
            "do_rescale": True,
            "rescale_factor": 1 / 255,
            "do_normalize": True,
            "image_mean": list(self.mean),
            "image_std": list(self.std),
        }
        if self.window != "auto":
            config["window"] = self.window
        if self.crop_pct is not None:
            config["crop_pct"] = self.crop_pct
        return json.dumps(config, indent=2) + "\n"

    def for_training(self, crop: bool = True, mirror: bool = True) -> "ImageTransform":
        """The same size, normalisation and window, with augmentation and the faster filter."""
        return replace(self, crop=crop, mirror=mirror, filter="torch")

    def for_features(self) -> "ImageTransform":
        """The pixels of stored features: never mirrored, since the text of a sample may name a
        side, and exact where they are not cropped, so that evaluation reads the same ones."""
        return replace(self, mirror=False, filter=self.filter if self.crop else "pillow")


def _resize_by_torch(
    pixels: UInt8[np.ndarray, "H W 3"], box: tuple[int, int, int, int], to: ImageTransform
) -> UInt8[np.ndarray, "S S 3"]:
    left, top, right, bottom = box
    chosen = torch.from_numpy(pixels[top:bottom, left:right]).permute(2, 0, 1)[None]  # [1, 3, h, w]
    size = (to.image_size, to.image_size)
    resized = interpolate(chosen, size, mode=to.resample, antialias=True)
    return resized[0].permute(1, 2, 0).numpy()


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
    numbers = isinstance(value, list | tuple) and all(type(one) in (int, float) for one in value)
    if not numbers or len(value) != 3 or not all(map(math.isfinite, value)):
        raise ValueError(f"{file}: '{name}' is {str(value)[:80]}; expected three numbers")
    return (float(value[0]), float(value[1]), float(value[2]))


def _shortest_edge(size: Any) -> int | None:
    """The length of the shorter side that transformers' ``size`` stands for."""
    if isinstance(size, dict):
        size = size.get("shortest_edge", size.get("height"))
    return size if isinstance(size, int) else None


def _stored_filter(value: Any, kind: str, file: Path) -> Literal["bilinear", "bicubic"]:
    if value is None:
        return "bilinear" if kind.startswith(BILINEAR_PROCESSORS) else "bicubic"
    for name in ("bilinear", "bicubic"):
        if value == RESAMPLING[name]:
            return name
    raise ValueError(f"{file}: 'resample' is {value!r}; expected 2 (bilinear) or 3 (bicubic)")


def _stored_window(value: Any, file: Path) -> Window:
    if value in ("auto", "full"):
        return value
    numbers = isinstance(value, list) and all(isinstance(v, int | float) for v in value)
    if not numbers or len(value) != 2:
        raise ValueError(f"{file}: 'window' is {value!r}; expected auto, full or [low, high]")
    return float(value[0]), float(value[1])
