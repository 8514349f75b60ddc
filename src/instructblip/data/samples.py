"""Example and rendered texts -> Sample: frames chosen, pictures loaded, text tokenised."""

import random
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from instructblip.core.batch import Batch, Example, Sample
from instructblip.data.images import (
    ImageTransform,
    load_image,
    may_flip,
)
from instructblip.data.reading.frames import evenly_spaced, repeated
from instructblip.data.templates import Rendered
from instructblip.data.tokens import Tokens


class StoredFeatures(Protocol):
    """What is read in place of pixels (``features.Features``)."""

    def __call__(self, path: str, view: int, first: str, /) -> Tensor:
        """[P, V] of one stored crop of the picture at ``path``, a frame of a video that begins with
        ``first`` or that itself."""
        ...

    def view(self, seed: int) -> int:
        """Which of the stored crops a sample with this seed sees."""
        ...


class Examples(Protocol):
    """What a loader needs of a data set (``PreparedDataset``, ``DatasetView``, a test's list)."""

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
    """Loads the frames of examples as pixels or stored features, keeping recent ones in memory.

    The cache holds uint8 arrays: resized ones when the transform is fixed, whole pictures when it
    augments. A fresh process (a worker) starts with an empty cache.
    """

    transform: ImageTransform
    num_frames: int = 4
    cache_images_mb: int = 256
    features: StoredFeatures | None = None
    _cache: "OrderedDict[str, np.ndarray]" = field(default_factory=OrderedDict, repr=False)
    _bytes: int = 0

    def keys(self, example: Example, image_root: Path) -> tuple[str, ...]:
        """The path of each picture that the model sees: at most ``num_frames``."""
        return self.paths(example.images, image_root)

    def paths(self, names: tuple[str, ...], image_root: Path) -> tuple[str, ...]:
        """The same for ``Example.images`` alone."""
        return tuple(str(image_root / name) for name in self.seen(names))

    def seen(self, names: tuple[str, ...]) -> tuple[str, ...]:
        """All of them in order; of more than ``num_frames``, so many evenly spaced ones."""
        return tuple(names[i] for i in evenly_spaced(len(names), self.num_frames))

    def load(self, key: str, rng: random.Random | None, flip: bool) -> Tensor:
        """[3, S, S] of the picture at path ``key``."""
        if not self.transform.train:
            pixels = self._cached(key, lambda: self.transform.resize(load_image(key)))
            return self.transform.normalise(pixels)
        whole = self._cached(key, lambda: np.asarray(load_image(key)))
        return self.transform(Image.fromarray(whole), rng, flip)

    def _cached(self, key: str, make: Callable[[], np.ndarray]) -> np.ndarray:
        if key in self._cache:
            self._cache.move_to_end(key)
            return self._cache[key]
        pixels = make()
        limit = self.cache_images_mb << 20
        if pixels.nbytes <= limit:
            self._cache[key] = pixels
            self._bytes += pixels.nbytes
            while self._bytes > limit:
                self._bytes -= self._cache.popitem(last=False)[1].nbytes
        return pixels

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_cache": OrderedDict(), "_bytes": 0}


def make_sample(
    example: Example,
    rendered: Rendered,
    tokens: Tokens,
    images: ImageReader,
    image_root: Path,
    seed: int = 0,
) -> Sample:
    """Example and texts -> Sample. ``seed`` decides the crop, one for all frames of a video."""
    keys = images.keys(example, image_root)
    qformer_ids, prompt_ids, response_ids = tokens.tokenize(rendered)
    features = pixels = None
    try:
        if images.features is not None:
            view = images.features.view(seed)
            features = tuple(images.features(key, view, keys[0]) for key in keys)
            keys = tuple(f"{key}@{keys[0]}#{view}" for key in keys)
        else:
            flip = may_flip(example, rendered)
            pixels = tuple(images.load(key, random.Random(seed), flip) for key in keys)
    except (ValueError, OSError) as error:
        raise type(error)(f"{example.dataset} {example.where}: {error}") from error
    if pixels is not None and images.transform.train:
        # Two crops of one picture are two images.
        keys = tuple(f"{key}#{seed}" for key in keys)
    return Sample(
        image_keys=keys,
        pixels=pixels,
        features=features,
        qformer_ids=qformer_ids,
        prompt_ids=prompt_ids,
        response_ids=response_ids,
        dataset=example.dataset,
        id=example.id,
    )


PAD_ID = 0
"""Written where the mask is 0. Any valid id would do: no one reads it."""


def collate(samples: list[Sample]) -> Batch:
    """B samples with F frames each; ValueError when they cannot stand in one batch.

    Two samples with the keys ("a", "b") and ("b", "c") give N = 3 pictures and
    ``image_index`` [[0, 1], [1, 2]]. F is the most that a sample has; one with fewer repeats its
    own in order. Each is still encoded once, but the language model then reads F * Q query tokens
    where it would read fewer for that sample alone.
    """
    if not samples:
        raise ValueError("a batch needs at least one sample")
    cached = [sample.features is not None for sample in samples]
    if any(cached) != all(cached):
        raise ValueError("some samples bring pixels and some features; expected all alike")
    most = max(len(sample.image_keys) for sample in samples)
    slots: dict[str, int] = {}
    pictures: list[Tensor] = []
    index = []
    for sample in samples:
        frames = sample.features if sample.features is not None else sample.pixels
        if frames is None or len(frames) != len(sample.image_keys):
            raise ValueError(
                f"{sample.dataset} {sample.id}: {len(sample.image_keys)} image keys and "
                f"{len(frames or ())} pictures; expected as many of one as of the other"
            )
        if most and not frames:
            raise ValueError(
                f"{sample.dataset} {sample.id}: no picture, others in the batch have {most}; "
                "expected one at least"
            )
        for key, picture in zip(sample.image_keys, frames, strict=True):
            if key not in slots:
                slots[key] = len(pictures)
                pictures.append(picture)
        own = [slots[key] for key in sample.image_keys]
        index.append([own[i] for i in repeated(len(own), most)])
    stacked = torch.stack(pictures)
    qformer_ids, qformer_mask = pad([sample.qformer_ids for sample in samples])
    prompt_ids, prompt_mask = pad([sample.prompt_ids for sample in samples])
    response_ids, response_mask = pad([sample.response_ids for sample in samples])
    return Batch(
        image_index=torch.tensor(index, dtype=torch.int64),
        qformer_ids=qformer_ids,
        qformer_mask=qformer_mask,
        prompt_ids=prompt_ids,
        prompt_mask=prompt_mask,
        response_ids=response_ids,
        response_mask=response_mask,
        pixel_values=None if cached[0] else stacked,
        image_features=stacked if cached[0] else None,
        datasets=tuple(sample.dataset for sample in samples),
        ids=tuple(sample.id for sample in samples),
    )


def pad(rows: list[list[int]]) -> tuple[Tensor, Tensor]:
    """Ids and mask, int64 [B, longest]: ``[[5, 6], [7]]`` -> ``[[5, 6], [7, 0]]``."""
    longest = max(len(row) for row in rows)
    ids = torch.tensor([row + [PAD_ID] * (longest - len(row)) for row in rows], dtype=torch.int64)
    mask = torch.tensor(
        [[1] * len(row) + [0] * (longest - len(row)) for row in rows], dtype=torch.int64
    )
    return ids.view(len(rows), longest), mask.view(len(rows), longest)
