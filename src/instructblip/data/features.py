"""Image features of a frozen encoder, computed once and kept on disk.

A store is a folder of shards. A shard is one safetensors file: ``features`` [n, P, V], with int8
also ``scale`` [n, P], and in its metadata the key of each of the n pictures. A key is the sha256
of the picture file's bytes and the number of its view (0 alone unless pictures are augmented), from
which its crop is drawn; a later frame of a video also names the first one and has its crop. The
name of the folder is a hash of the transform, the encoder's weights and the number type. So a
picture that moves or changes, another encoder or another size can never give stale features, and
whatever shares bytes shares features.

Shards are written under a temporary name, flushed and renamed: a kill loses the shard in work and
nothing else, and what is missing is all that the next run computes. Any number of ranks write at
the same time, each its own shards. Reads go through memory maps.

Features are taken before the encoder's last LayerNorm, which trains (see ``Batch``).
"""

import hashlib
import json
import os
import random
import shutil
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.data import DataLoader

from instructblip.core import distributed
from instructblip.core.files import recover, replacing, set_aside
from instructblip.data.images import ImageTransform, load_image
from instructblip.data.prepared.images import (
    MISSING,
    ImageFact,
    gather_facts,
)

FeatureType = Literal["fp32", "bf16", "int8"]
TYPES: dict[FeatureType, torch.dtype] = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "int8": torch.int8,
}
SHARD_BYTES = 1 << 28

Encode = Callable[[Tensor], Tensor]
"""Pixels [N, 3, S, S] -> features [N, P, V] before the last LayerNorm, on any device."""


class FeatureStore:
    """Features by key in one folder. ``refresh`` sees what other processes have written since."""

    def __init__(self, folder: Path, kind: FeatureType) -> None:
        self.folder = folder
        self.kind: FeatureType = kind
        self._shards: list[Path] = []
        self._places: dict[str, tuple[int, int]] = {}  # key -> (shard, row)
        self._maps: dict[int, tuple[Tensor, Tensor | None]] = {}
        self.refresh()

    def __contains__(self, key: str) -> bool:
        return key in self._places

    def __len__(self) -> int:
        return len(self._places)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_maps": {}}  # a worker opens the files itself

    def refresh(self) -> None:
        """Look for new shards. A damaged one is set aside with a warning: its pictures are
        encoded again."""
        known = set(self._shards)
        for path in sorted(self.folder.glob("*.safetensors")):
            if path in known:
                continue
            try:
                with safe_open(path, "pt") as file:
                    keys = json.loads(file.metadata()["keys"])
            except (SafetensorError, OSError, TypeError, KeyError, ValueError) as error:
                warnings.warn(
                    f"{path} is damaged ({error}); its pictures will be encoded again",
                    RuntimeWarning,
                    stacklevel=2,
                )
                set_aside(path, ".damaged")
                continue
            self._shards.append(path)
            place = len(self._shards) - 1
            self._places |= {key: (place, row) for row, key in enumerate(keys)}

    def read(self, key: str) -> Float[Tensor, "P V"]:
        """Features of one key; fp32 or bf16, int8 comes back as bf16."""
        shard, row = self._places[key]
        if shard not in self._maps:
            with safe_open(self._shards[shard], "pt") as file:  # maps the file, reads nothing
                scale = file.get_tensor("scale") if "scale" in file.keys() else None  # noqa: SIM118
                self._maps[shard] = file.get_tensor("features"), scale
        features, scale = self._maps[shard]
        if scale is None:
            return features[row]
        return (features[row] * scale[row, :, None]).to(torch.bfloat16)

    def write(self, keys: Sequence[str], features: Float[Tensor, "n P V"]) -> None:
        """One shard of n pictures, in full or not at all.

        Raises:
            OSError: if it cannot be written; the shards before it are intact.
        """
        if self.kind == "int8":
            values, scale = quantize(features)
            tensors = {"features": values, "scale": scale}
        else:
            tensors = {"features": features.to(TYPES[self.kind])}
        name = hashlib.sha256("".join(keys).encode()).hexdigest()[:24]
        try:
            with replacing(self.folder / f"{name}.safetensors") as temporary:
                save_file(tensors, temporary, metadata={"keys": json.dumps(list(keys))})
        except (SafetensorError, OSError) as error:
            raise OSError(
                f"features could not be written to {self.folder}: {error}. Free some space, take "
                "features.dtype=int8, set features.root to another disk, or features.cache=off"
            ) from error


@dataclass
class Features:
    """What `Pictures` reads instead of pixels: paths on top of a store.

    ``digests`` are the sha256 of the pictures' bytes, by path; ``views`` crops were stored of each.
    ``frames`` are all (picture, first frame of its example), where pictures are cropped: the frames
    of a video share each crop.
    """

    store: FeatureStore
    digests: Mapping[str, str]
    views: int = 1
    frames: frozenset[tuple[str, str]] = frozenset()

    def __call__(self, path: str, view: int, first: str | None = None) -> Float[Tensor, "P V"]:
        """Raises ValueError for a picture that was not stored."""
        key = self._key(path, view, first or path)
        if key not in self.store:
            raise ValueError(
                f"picture {path} has no stored features in {self.store.folder}; run "
                "`instructblip cache RECIPE`"
            )
        return self.store.read(key)

    def view(self, seed: int) -> int:
        """Which stored crop a sample with this seed sees."""
        return random.Random(seed).randrange(self.views)

    def missing(self) -> list[tuple[str, str, int]]:
        """(key, path, view) of all that is not stored yet; equal pictures once."""
        frames = self.frames or {(path, path) for path in self.digests}
        wanted = {
            self._key(path, view, first): (path, view)
            for path, first in frames
            for view in range(self.views)
        }
        return [(key, *wanted[key]) for key in sorted(wanted) if key not in self.store]

    def _key(self, path: str, view: int, first: str) -> str:
        own, leader = self.digests.get(path), self.digests.get(first)
        video = self.frames and own != leader
        return f"{own}@{leader}#{view}" if video else f"{own}#{view}"


@dataclass(frozen=True, slots=True)
class Costs:
    """Seconds and bytes of one picture, measured here and now."""

    load: float
    encode: float
    write: float
    read: float
    nbytes: int

    def saving(self, missing: int, reads: int) -> float:
        """Seconds that storing ``missing`` pictures and reading ``reads`` times saves over encoding
        at every use. Decoding is left out on that side: decoded pictures are kept in memory."""
        return reads * (self.encode - self.read) - missing * (self.load + self.encode + self.write)


def store_name(transform: ImageTransform, encoder: str, kind: FeatureType) -> str:
    """The folder of a store: everything but the pictures that the features depend on."""
    text = json.dumps([asdict(transform), encoder, kind], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def hash_pictures(paths: Iterable[str], known: Mapping[str, ImageFact]) -> dict[str, str]:
    """sha256 of the bytes of each picture, by path; every rank looks at a part, all get the whole.

    What is ``known`` of a picture by its path (``PreparedDataset.facts``) stands while its size and
    date do: the file is then not read. Raises FileNotFoundError or ValueError for a picture that
    cannot be read any more.
    """
    own = sorted(set(paths))[distributed.rank() :: distributed.world_size()]
    found = dict(gather_facts(own, Path(), known, workers=8))  # mostly waiting for the disk
    for path, fact in found.items():
        if fact.fault == MISSING:
            raise FileNotFoundError(
                f"picture {path} does not exist any more; put it back, or prepare the data again"
            )
        if not fact.sha256:
            raise ValueError(f"picture {path} {fact.fault}; repair it, or prepare the data again")
    shared = distributed.gather_objects({path: fact.sha256.hex() for path, fact in found.items()})
    return {path: digest for part in shared for path, digest in part.items()}


def fill(
    features: Features, transform: ImageTransform, encode: Encode, batch_size: int, workers: int
) -> int:
    """Encode and store what is missing, shared out among the ranks; returns the number of it.

    Raises OSError when the disk is full and ValueError or FileNotFoundError for a broken picture.
    """
    missing = features.missing()
    own = missing[distributed.rank() :: distributed.world_size()]
    waiting: list[Tensor] = []
    stored = 0
    for pixels in _pixel_batches(own, transform, batch_size, workers):
        waiting.append(encode(pixels).cpu())
        done = stored + sum(map(len, waiting))
        if sum(part.nbytes for part in waiting) >= SHARD_BYTES or done == len(own):
            features.store.write([key for key, _, _ in own[stored:done]], torch.cat(waiting))
            stored, waiting = done, []
    recover(features.store.folder)
    distributed.barrier()
    features.store.refresh()
    return len(missing)


def measure(
    features: Features, transform: ImageTransform, encode: Encode, num_pictures: int
) -> Costs:
    """What one picture costs, from up to ``num_pictures`` of those missing (there must be one).

    They are stored in a folder of their own, which is deleted: the caller has not decided yet.
    """
    chosen = features.missing()[:num_pictures]
    pixels = _Pixels(chosen, transform)
    encode(pixels[0][None])  # the first call pays for start-up
    trial = FeatureStore(features.store.folder / f".trial.{os.getpid()}", features.store.kind)
    keys = [key for key, _, _ in chosen]
    try:
        loaded, load = _timed(lambda: torch.stack([pixels[i] for i in range(len(chosen))]))
        encoded, encode_all = _timed(lambda: encode(loaded).cpu())
        _, write = _timed(lambda: trial.write(keys, encoded))
        trial.refresh()
        trial.read(keys[0])
        _, read = _timed(lambda: torch.stack([trial.read(key) for key in keys]))
        nbytes = sum(path.stat().st_size for path in trial.folder.iterdir())
    finally:
        shutil.rmtree(trial.folder, ignore_errors=True)
    count = len(chosen)
    return Costs(load / count, encode_all / count, write / count, read / count, nbytes // count)


def quantize(features: Float[Tensor, "n P V"]) -> tuple[Tensor, Float[Tensor, "n P"]]:
    """int8 with one scale per token: the norms of ViT tokens differ by orders of magnitude."""
    values = features.float()
    scale = values.abs().amax(2).clamp(min=1e-12) / 127
    return (values / scale[:, :, None]).round().to(torch.int8), scale


class _Pixels:
    """Pictures to encode as a map from number to pixels. A view is a crop drawn from its key
    (of a later frame from that of the first); never mirrored, since the text that will stand beside
    it may name a side."""

    def __init__(self, items: Sequence[tuple[str, str, int]], transform: ImageTransform) -> None:
        self.items, self.transform = items, transform

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Float[Tensor, "3 S S"]:
        key, path, _ = self.items[index]
        crop = random.Random(key.rpartition("@")[2])
        return self.transform(load_image(path), crop, flip=False)


def _pixel_batches(
    items: Sequence[tuple[str, str, int]], transform: ImageTransform, batch_size: int, workers: int
) -> Iterator[Float[Tensor, "N 3 S S"]]:
    """The pictures in order, decoded by ``workers`` processes, with a progress bar on terminals."""
    from rich.console import Console
    from rich.progress import track

    loader = DataLoader(
        _Pixels(items, transform),  # type: ignore[arg-type]
        batch_size=batch_size,
        num_workers=min(workers, len(items) // batch_size),
    )
    console = Console(stderr=True)
    quiet = not (console.is_terminal and distributed.is_main())
    yield from track(loader, "image features", console=console, disable=quiet, transient=True)


def _timed(work: Callable[[], Any]) -> tuple[Any, float]:
    began = time.perf_counter()
    return work(), time.perf_counter() - began
