"""From an example and its rendered texts to a ``Sample``, and from B samples to a ``Batch``.

``make_sample`` chooses frames, loads images and tokenizes text; ``collate`` stacks the distinct
images of a batch and pads its texts. Training, evaluation and serving all use these two.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeVar, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from instructblip.core.batch import Batch, Sample
from instructblip.core.example import Example
from instructblip.core.recent import Recent
from instructblip.data.features import Features
from instructblip.data.images import ImageTransform, may_flip
from instructblip.data.reading.frames import evenly_spaced
from instructblip.data.templates import Rendered
from instructblip.data.tokens import Tokens

T = TypeVar("T")

PAD_ID = 0
"""Id at positions where the mask is 0. Any valid id works: the model never reads them."""


@runtime_checkable
class Examples(Protocol):
    """A data set as the loader reads it: ``PreparedDataset``, ``DatasetView`` or any other."""

    @property
    def name(self) -> str: ...

    @property
    def image_root(self) -> Path:
        """The folder that ``Example.images`` are relative to."""
        ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Example: ...


@dataclass
class ImageReader:
    """Reads the images of examples, as pixels or as stored features.

    A cache of ``cache_images_mb`` MiB, empty in a new worker process, keeps images that were read
    recently: resized ones when the transform is fixed, whole ones when it augments.

    ``in_8_bits`` leaves pixels, and features stored in int8, as they are for `Batch.to`.
    """

    transform: ImageTransform
    num_frames: int = 4
    cache_images_mb: int = 256
    features: Features | None = None
    in_8_bits: bool = False
    _recent: Recent[np.ndarray] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self._recent = Recent(self.cache_images_mb << 20)

    def select(self, each: tuple[T, ...]) -> tuple[T, ...]:
        """Of what belongs to ``each`` image those that the model sees, in order: all, or
        ``num_frames`` evenly spaced ones."""
        return tuple(each[i] for i in evenly_spaced(len(each), self.num_frames))

    def paths(self, names: tuple[str, ...], image_root: Path) -> tuple[str, ...]:
        """The paths of the images that the model sees of ``Example.images``."""
        return tuple(str(image_root / name) for name in self.select(names))

    def load(
        self, path: str, rng: random.Random | None, flip: bool
    ) -> Float[Tensor, "3 S S"] | UInt8[Tensor, "3 S S"]:
        """The image at ``path``, transformed; ``rng`` and ``flip`` matter when that augments."""
        transform = self.transform
        if transform.is_random:
            whole = self._cached(path, lambda: np.asarray(transform.read(path)))
            pixels = transform.resize(whole, rng, flip)
        else:
            pixels = self._cached(path, lambda: transform.resize(transform.read(path)))
        if self.in_8_bits:
            return torch.from_numpy(pixels.transpose(2, 0, 1).copy())
        return transform.normalise(pixels)

    def _cached(self, path: str, read: Callable[[], np.ndarray]) -> np.ndarray:
        pixels = self._recent.get(path)
        if pixels is None:
            pixels = read()
            self._recent.put(path, pixels)
        return pixels

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_recent": Recent(self._recent.limit)}


def make_sample(
    example: Example,
    rendered: Rendered,
    tokens: Tokens,
    images: ImageReader,
    image_root: Path,
    seed: int = 0,
) -> Sample:
    """The tensors of one example. ``seed`` decides the crop; all frames of a video share it.

    Raises ValueError or OSError, naming the example's record, for an unreadable image and for a
    text with more image marks than the example has images.
    """
    paths = images.paths(example.images, image_root)  # F of them
    pixels = features = scales = None
    try:
        texts = tokens.tokenize(rendered, len(example.images))
        if images.features is not None:
            view = images.features.view(seed)
            if images.in_8_bits and images.features.store.kind == "int8":
                stored = [images.features.key(path, view, paths[0]) for path in paths]
                features, scales = zip(*map(images.features.store.stored, stored), strict=True)
            else:
                features = tuple(images.features(path, view, paths[0]) for path in paths)
            keys = tuple(f"{path}@{paths[0]}#{view}" for path in paths)
        else:
            flip = may_flip(example, rendered)
            pixels = tuple(  # F x [3, S, S]; every frame draws the same crop from the seed
                images.load(path, random.Random(seed), flip) for path in paths
            )
            scales = (images.transform.levels,) * len(paths) if images.in_8_bits else None
            # Two crops of one image are different images for the encoder.
            random_pixels = images.transform.is_random
            keys = tuple(f"{path}#{seed}" for path in paths) if random_pixels else paths
    except (ValueError, OSError) as error:
        raise type(error)(f"{example.dataset} {example.where}: {error}") from error
    return Sample(
        image_keys=keys,
        pixels=pixels,
        features=features,
        scales=scales,
        qformer_ids=texts.qformer_ids,
        prompt_ids=texts.prompt_ids,
        response_ids=texts.response_ids,
        image_places=images.select(texts.image_places),
        dataset=example.dataset,
        id=example.id,
    )


def collate(samples: list[Sample]) -> Batch:
    """A batch of B samples: equal images once, text padded on the right.

    Two samples with the image keys ("a", "b") and ("b",) give N = 2 images and ``image_index``
    [[0, 1], [1, -1]]. F is the largest number of images of a sample, and -1 fills up the others.

    Raises ValueError for pixels beside features, and for samples without images beside others.
    """
    if not samples:
        raise ValueError("a batch needs at least one sample")
    stored = [sample.features is not None for sample in samples]
    if any(stored) != all(stored):
        raise ValueError("some samples have pixels and some have features; expected one kind")
    num_frames = max(len(sample.image_keys) for sample in samples)  # F
    places: dict[str, int] = {}  # image key -> its place among the N distinct images
    images: list[Tensor] = []
    scales: list[Tensor] = []
    image_index = []
    for sample in samples:
        frames = sample.features if sample.features is not None else sample.pixels
        name = f"{sample.dataset} {sample.id}"
        count = len(sample.image_keys)
        if frames is None or len(frames) != count:
            raise ValueError(
                f"{name}: {count} image keys and {len(frames or ())} images; expected as many "
                "images as keys"
            )
        if num_frames and not frames:
            raise ValueError(
                f"{name}: no image, others in the batch have {num_frames}; expected at least one"
            )
        for i, (key, image) in enumerate(zip(sample.image_keys, frames, strict=True)):
            if key not in places:
                places[key] = len(images)
                images.append(image)
                scales += () if sample.scales is None else (sample.scales[i],)
        image_index.append([places[key] for key in sample.image_keys] + [-1] * (num_frames - count))
    stacked = torch.stack(images)  # [N, 3, S, S] or [N, P, V]
    scale = None
    if scales:
        scale = torch.stack(scales) if stored[0] else scales[0]  # [N, P], or the model's [3, 256]
    image_places = None
    if any(sample.image_places for sample in samples):
        empty = (0,) * num_frames
        rows = [(*sample.image_places, *empty)[:num_frames] for sample in samples]
        image_places = torch.tensor(rows, dtype=torch.int64)  # [B, F]
    qformer_ids, qformer_mask = pad([sample.qformer_ids for sample in samples])  # [B, I]
    prompt_ids, prompt_mask = pad([sample.prompt_ids for sample in samples])  # [B, T]
    response_ids, response_mask = pad([sample.response_ids for sample in samples])  # [B, R]
    return Batch(
        image_index=torch.tensor(image_index, dtype=torch.int64),  # [B, F]
        qformer_ids=qformer_ids,
        qformer_mask=qformer_mask,
        prompt_ids=prompt_ids,
        prompt_mask=prompt_mask,
        response_ids=response_ids,
        response_mask=response_mask,
        pixel_values=None if stored[0] else stacked,
        image_features=stacked if stored[0] else None,
        image_places=image_places,
        scale=scale,
        datasets=tuple(sample.dataset for sample in samples),
        ids=tuple(sample.id for sample in samples),
    )


def pad(rows: list[list[int]]) -> tuple[Int[Tensor, "B T"], Int[Tensor, "B T"]]:
    """Ids and mask, T the longest row: ``[[5, 6], [7]]`` gives ``[[5, 6], [7, 0]]`` and
    ``[[1, 1], [1, 0]]``."""
    longest = max(len(row) for row in rows)
    ids = [row + [PAD_ID] * (longest - len(row)) for row in rows]
    mask = [[1] * len(row) + [0] * (longest - len(row)) for row in rows]
    shape = (len(rows), longest)  # also when no row has an id
    return (
        torch.tensor(ids, dtype=torch.int64).view(shape),
        torch.tensor(mask, dtype=torch.int64).view(shape),
    )
