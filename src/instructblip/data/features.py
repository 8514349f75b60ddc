"""Image features of a frozen encoder, computed once and stored on disk.

A store is a folder of shards::

    <root>/<hash of transform, encoder weights and number type>/
        <hash of the shard's keys>.safetensors
            features  [n, P, V]     fp32, bf16 or int8
            scale     [n, P]        with int8: fp32, one for each token
            metadata  {"keys": JSON list of n keys, "crc32": JSON list of n checksums}

A key names an image and a view, that is, a crop; without augmentation there is only view 0::

    <sha256 of the image file>#<view>
    <sha256 of the frame>@<sha256 of the video's first frame>#<view>      frames of a cropped video

The key seeds the crop, for a later frame its part after the @, so all frames of a video share the
crop. Since names are hashes of content, an image that moved or changed, another encoder or another
size never give stale features, and files with equal bytes share features.

A shard appears whole or not at all: a kill loses the shard being written, and the next run computes
only what is missing. Reading verifies the checksum of an image's bytes; shards of earlier versions
have none. Each rank writes shards of its own. Shards are memory-mapped for reading.

Features are taken before the encoder's last LayerNorm, which is trainable (see ``Batch``).
"""

import hashlib
import itertools
import json
import os
import random
import time
import warnings
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float, Int8, Shaped
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from instructblip.core import distributed
from instructblip.core.files import (
    parse_json,
    recover,
    replacing,
    scratch_directory,
    set_aside,
)
from instructblip.core.progress import progress_bar
from instructblip.data.images import ImageTransform
from instructblip.data.prepared.images import MISSING, ImageFact, gather_facts
from instructblip.data.reading.decode import NARROW

FeatureType = Literal["fp32", "bf16", "int8"]
TYPES: dict[FeatureType, torch.dtype] = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "int8": torch.int8,
}
SHARD_BYTES = 1 << 28
LISTED_SECONDS = 120.0
"""Seconds after which a network disk has listed what other machines wrote."""

Encode = Callable[[Tensor], Tensor]
"""Pixels [N, 3, S, S] -> features [N, P, V] before the last LayerNorm, on any device."""


class FeatureStore:
    """The features in one folder, by key; ``refresh`` finds shards of other processes."""

    def __init__(self, folder: Path, kind: FeatureType) -> None:
        self.folder = folder
        self.kind: FeatureType = kind
        self._shards: list[Path] = []
        self._places: dict[str, tuple[int, int]] = {}  # key -> (shard, row)
        self._checksums: dict[int, list[int]] = {}  # of each row of a shard
        self._maps: dict[int, tuple[Tensor, Tensor | None]] = {}
        self.refresh()

    def __contains__(self, key: str) -> bool:
        return key in self._places

    def __len__(self) -> int:
        return len(self._places)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_maps": {}}  # a worker process maps the files itself

    def refresh(self) -> None:
        """Finds new shards. A damaged one is renamed with a warning; its images are then missing
        and are encoded again."""
        for path in sorted({*self.folder.glob("*.safetensors")} - {*self._shards}):
            try:
                with safe_open(path, "pt") as file:
                    metadata = file.metadata()
                    keys = parse_json(metadata["keys"])
                    checksums = parse_json(metadata.get("crc32", "null"))
            except (SafetensorError, OSError, TypeError, KeyError, ValueError) as error:
                warnings.warn(
                    f"{path} is damaged ({error}); its images will be encoded again",
                    RuntimeWarning,
                    stacklevel=2,
                )
                set_aside(path, ".damaged")
                continue
            if checksums is not None:
                self._checksums[len(self._shards)] = checksums
            self._places |= {key: (len(self._shards), row) for row, key in enumerate(keys)}
            self._shards.append(path)

    def wait_for(self, keys: Iterable[str]) -> None:
        """Finds the shards of these keys, which other processes have written: a network disk may
        list them late. OSError if they do not appear."""
        began = time.monotonic()
        self.refresh()
        while absent := sum(key not in self for key in keys):
            if time.monotonic() - began > LISTED_SECONDS:
                raise OSError(
                    f"{self.folder}: the features of {absent} images, which other ranks stored, "
                    "are not there; set features.root to a folder that all machines share"
                )
            time.sleep(LISTED_SECONDS / 120)
            self.refresh()

    def read(self, key: str) -> Float[Tensor, "P V"]:
        """The features of one key, in fp32 or bf16; those stored in int8 as bf16."""
        features, scale = self.stored(key)
        return features if scale is None else (features * scale[:, None]).to(torch.bfloat16)

    def stored(
        self, key: str
    ) -> tuple[Float[Tensor, "P V"] | Int8[Tensor, "P V"], Float[Tensor, " P"] | None]:
        """The features of one key as they are stored; with int8 the factor of each token.
        ValueError where a bit has changed since they were written."""
        shard, row = self._places[key]
        features, scale = self._mapped(shard)
        values, factors = features[row], None if scale is None else scale[row]
        checksums = self._checksums.get(shard)
        if checksums is not None and checksums[row] != _checksum(values, factors):
            raise ValueError(
                f"{self._shards[shard]}: the features of image {row} are not what was written; "
                "expected the checksum in the file. Delete the file, and its images are encoded "
                "again; check the disk"
            )
        return values, factors

    def _mapped(self, shard: int) -> tuple[Tensor, Tensor | None]:
        if shard not in self._maps:
            with safe_open(self._shards[shard], "pt") as file:  # maps, does not read
                scale = file.get_tensor("scale") if "scale" in file.keys() else None  # noqa: SIM118
                self._maps[shard] = file.get_tensor("features"), scale
        return self._maps[shard]

    def shards(self) -> list[Shaped[Tensor, "n P V"]]:
        """The features of all shards as they are stored, mapped from their files."""
        return [self._mapped(shard)[0] for shard in range(len(self._shards))]

    def rows(self, keys: Iterable[str]) -> list[int]:
        """The row of each key in the concatenation of all shards."""
        starts = [0, *itertools.accumulate(map(len, self.shards()))]
        return [starts[shard] + row for shard, row in map(self._places.__getitem__, keys)]

    def write(self, keys: Sequence[str], features: Float[Tensor, "n P V"]) -> None:
        """Writes one shard of n images, whole or not at all; OSError if it cannot be written."""
        if self.kind == "int8":
            values, scale = quantize(features)
            tensors = {"features": values, "scale": scale}
        else:
            tensors = {"features": features.to(TYPES[self.kind])}
        scales = tensors.get("scale")
        checksums = [
            _checksum(values, None if scales is None else scales[row])
            for row, values in enumerate(tensors["features"])
        ]
        metadata = {"keys": json.dumps(list(keys)), "crc32": json.dumps(checksums)}
        name = hashlib.sha256("".join(keys).encode()).hexdigest()[:24]
        try:
            with replacing(self.folder / f"{name}.safetensors") as temporary:
                save_file(tensors, temporary, metadata=metadata)
        except (SafetensorError, OSError) as error:
            raise OSError(
                f"features could not be written to {self.folder}: {error}. Free some space, take "
                "features.dtype=int8, set features.root to another disk, or features.cache=off"
            ) from error


@dataclass
class Features:
    """Features by path, which ``ImageReader`` reads in place of pixels.

    ``digests`` maps paths to the sha256 of the images' bytes; each image has ``views`` crops.
    Where images are cropped, ``frames`` has (path, path of the first image of its example) of each
    image of each example.
    """

    store: FeatureStore
    digests: Mapping[str, str]
    views: int = 1
    frames: frozenset[tuple[str, str]] = frozenset()

    def __call__(self, path: str, view: int, first: str | None = None) -> Float[Tensor, "P V"]:
        """Features of crop ``view`` of the image at ``path``; ValueError if they are not stored."""
        return self.store.read(self.key(path, view, first))

    def key(self, path: str, view: int, first: str | None = None) -> str:
        """The key of these features; ValueError if they are not stored."""
        key = self._key(path, view, first or path)
        if key not in self.store:
            raise ValueError(
                f"image {path} has no stored features in {self.store.folder}; run "
                "`instructblip cache RECIPE`"
            )
        return key

    def view(self, seed: int) -> int:
        """The number of the stored crop that a sample with this seed sees."""
        return random.Random(seed).randrange(self.views)

    def missing(self) -> list[tuple[str, str]]:
        """(key, path) of each crop that is not stored yet; equal images once."""
        frames = self.frames or {(path, path) for path in self.digests}
        wanted = {
            self._key(path, view, first): path
            for path, first in frames
            for view in range(self.views)
        }
        return [(key, wanted[key]) for key in sorted(wanted) if key not in self.store]

    def _key(self, path: str, view: int, first: str) -> str:
        digest, leader = self.digests.get(path), self.digests.get(first)
        shares_crop = self.frames and digest != leader
        return f"{digest}@{leader}#{view}" if shares_crop else f"{digest}#{view}"


@dataclass(frozen=True, slots=True)
class Costs:
    """Measured seconds and bytes of one image."""

    load: float
    encode: float
    write: float
    read: float
    nbytes: int

    def saving(self, missing: int, reads: int) -> float:
        """Seconds saved by storing ``missing`` images and reading ``reads`` times, compared with
        encoding at every use, where images are in memory and need no loading."""
        return reads * (self.encode - self.read) - missing * (self.load + self.encode + self.write)


def store_name(transform: ImageTransform, encoder: str, kind: FeatureType) -> str:
    """The name of a store's folder: a hash of all that features depend on except the images.

    The values of earlier versions give the same names as these versions.
    """
    values = asdict(transform)
    values["train"] = values.pop("crop")
    defaults = {"mirror": values["mirror"], "filter": "pillow", "window": "auto"}
    for name, before in (defaults | {"resample": "bicubic", "crop_pct": None}).items():
        if values[name] == before:
            del values[name]
    text = json.dumps([values, encoder, kind], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def hash_images(paths: Iterable[str], known: Mapping[str, ImageFact]) -> dict[str, str]:
    """What identifies the pixels of each image, by path: the sha256 of its bytes, and a mark where
    earlier versions read other pixels from them. Each rank reads a share, all return the whole.

    An image that ``known`` (``PreparedDataset.facts``) has with the same size and date is not read.
    Raises FileNotFoundError or ValueError for an image that cannot be read any more.
    """
    share = sorted(set(paths))[distributed.rank() :: distributed.world_size()]
    facts = dict(gather_facts(share, Path(), known, workers=8))  # mostly waiting for the disk
    for path, fact in facts.items():
        if fact.fault == MISSING:
            raise FileNotFoundError(
                f"image {path} does not exist any more; put it back, or prepare the data again"
            )
        if not fact.sha256:
            raise ValueError(f"image {path} {fact.fault}; repair it, or prepare the data again")
    parts = distributed.gather_objects(
        {
            path: fact.sha256.hex() + ("~window" if (fact.note or "").startswith(NARROW) else "")
            for path, fact in facts.items()
        }
    )
    return {path: digest for part in parts for path, digest in part.items()}


def fill(
    features: Features, transform: ImageTransform, encode: Encode, batch_size: int, workers: int
) -> int:
    """Encodes and stores what is missing, shared among the ranks; returns how many images it is.

    Raises OSError when the disk is full or not the one of other ranks, and ValueError or
    FileNotFoundError for a broken image.
    """
    missing = features.missing()
    share = missing[distributed.rank() :: distributed.world_size()]
    loader = DataLoader(
        _Pixels(share, transform),
        batch_size=batch_size,
        num_workers=min(workers, len(share) // batch_size),
    )
    encoded: list[Tensor] = []  # not written yet
    stored = 0
    with progress_bar("image features", "images", shown=distributed.is_main()) as advance:
        for pixels in loader:  # [batch, 3, S, S]
            encoded.append(encode(pixels).cpu())  # [batch, P, V]
            done = stored + sum(map(len, encoded))
            advance(done, len(share))
            if sum(part.nbytes for part in encoded) >= SHARD_BYTES or done == len(share):
                features.store.write([key for key, _ in share[stored:done]], torch.cat(encoded))
                stored, encoded = done, []
    recover(features.store.folder)
    distributed.barrier()
    features.store.wait_for([key for key, _ in missing])
    return len(missing)


def measure(
    features: Features, transform: ImageTransform, encode: Encode, num_images: int
) -> Costs:
    """Measures the costs of one image on up to ``num_images`` missing ones (there must be one).

    They are stored in a temporary folder, since the caller may decide against storing. What is read
    comes from the disk, and on a GPU the time is that of a second call with as many images: the
    first one plans its kernels.
    """
    chosen = features.missing()[:num_images]
    pixels = _Pixels(chosen, transform)
    on_gpu = encode(pixels[0][None]).is_cuda  # the first call includes start-up
    keys = [key for key, _ in chosen]
    with scratch_directory(features.store.folder) as folder:
        trial = FeatureStore(folder, features.store.kind)
        loaded, load = _timed(lambda: torch.stack([pixels[i] for i in range(len(chosen))]))
        if on_gpu:
            encode(loaded).cpu()
        encoded, encode_all = _timed(lambda: encode(loaded).cpu())
        _, write = _timed(lambda: trial.write(keys, encoded))
        for path in folder.iterdir():
            _leave_the_page_cache(path)
        trial.refresh()
        trial.read(keys[0])
        _, read = _timed(lambda: torch.stack([trial.read(key) for key in keys]))
        nbytes = sum(path.stat().st_size for path in folder.iterdir())
    count = len(chosen)
    return Costs(load / count, encode_all / count, write / count, read / count, nbytes // count)


def quantize(
    features: Float[Tensor, "n P V"],
) -> tuple[Int8[Tensor, "n P V"], Float[Tensor, "n P"]]:
    """int8 values and a scale for each token: norms of ViT tokens differ by orders of magnitude."""
    values = features.float()
    scale = values.abs().amax(2).clamp(min=1e-12) / 127  # [n, P]: the largest entry becomes 127
    return (values / scale[:, :, None]).round().to(torch.int8), scale


def _checksum(features: Shaped[Tensor, "P V"], scale: Float[Tensor, " P"] | None) -> int:
    """CRC-32 of the bytes of one image."""
    value = zlib.crc32(features.contiguous().view(torch.uint8).numpy().data)
    return value if scale is None else zlib.crc32(scale.contiguous().numpy().data, value)


class _Pixels(Dataset[Tensor]):
    """(key, path) -> pixels. An augmented image is cropped as its key says, and never mirrored,
    since the text of its sample may name a side."""

    def __init__(self, items: Sequence[tuple[str, str]], transform: ImageTransform) -> None:
        self.items, self.transform = items, transform

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Float[Tensor, "3 S S"]:
        key, path = self.items[index]
        crop = random.Random(key.rpartition("@")[2])
        return self.transform(self.transform.read(path), crop, flip=False)


def _leave_the_page_cache(path: Path) -> None:
    """Let the next reader of a file wait for its disk, where the system offers it (Linux)."""
    if hasattr(os, "posix_fadvise"):
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _timed(work: Callable[[], Any]) -> tuple[Any, float]:
    began = time.perf_counter()
    return work(), time.perf_counter() - began
