"""Tensors in files, read without trusting whoever wrote them.

Reads ``model.safetensors``, sharded safetensors with their index, and ``pytorch_model.bin``
(sharded too) through ``torch.load(weights_only=True)``, which runs no code, and GGUF.

A run does not store its frozen parts again: ``changed.safetensors`` has the tensors that differ
from the model that the run started from, and ``start.json`` says where that is and the sha256 of
its files, or which version of `small` it is (`small.py` assembles it again where it is gone).
Without ``model.safetensors`` transformers refuses such a directory instead of drawing what is
missing at random; `instructblip export` makes it whole.
"""

import functools
import hashlib
import json
import os
import zipfile
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.overrides import TorchFunctionMode

from instructblip.core.files import cache_folder, current, read_json, replacing
from instructblip.core.gguf import find_gguf, gguf_weights

WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
START_FILE, CHANGED_FILE = "start.json", "changed.safetensors"
SMALL = "small"
"""The name of the model that is assembled from installed packages."""
WORTH_REFERRING = 64 * 2**20
"""Bytes below which equal weights are stored again: a small model stays whole."""


class NoRandomWeights(TorchFunctionMode):
    """Builds modules with zeros in place of random weights, for a model that is loaded right
    afterwards: drawing 7 billion numbers would take a minute for nothing."""

    DRAWS = ("normal_", "uniform_", "trunc_normal_", "kaiming_uniform_", "xavier_uniform_")

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__name__", "") not in self.DRAWS:
            return func(*args, **kwargs)
        tensor = args[0] if args else kwargs["tensor"]
        tensor.detach().zero_()  # defined values: sampling by rejection might not end on others
        return tensor


class NoStorage(TorchFunctionMode):
    """Builds modules whose large weights, those that layers allocate with ``torch.empty``, are on
    the meta device: they take no memory until they are loaded."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.empty and kwargs.get("device") is None:
            kwargs = kwargs | {"device": "meta"}
        return func(*args, **kwargs)


def read_weights(path: Path) -> dict[str, Tensor]:
    """All tensors of a model directory or of one weight file, by name, on the CPU. Those of a GGUF
    file are in fp32; all others are mapped from their file, and take memory once they are read.

    Raises FileNotFoundError when there are none, and ValueError for a file that is damaged, needs
    code to be unpickled, or is an index that points outside the directory.
    """
    if (file := find_gguf(path)) is not None:
        return gguf_weights(file)
    if path.is_file():
        return _dict_of_tensors(_load(path), path)
    if (path / START_FILE).is_file():
        return read_weights(start_of(path)) | read_weights(path / CHANGED_FILE)
    for name in WEIGHT_FILES:
        file = path / name
        if file.is_file():
            return _read_shards(file) if name.endswith(".json") else read_weights(file)
    raise FileNotFoundError(f"{path} holds no weights; expected one of {', '.join(WEIGHT_FILES)}")


def small_place(version: str) -> Path:
    """Where a version of `small` is kept once it was assembled."""
    return cache_folder() / f"{SMALL}-{version}"


def small_start(directory: Path) -> str | None:
    """The version of `small` that the run in ``directory`` refers to; None for another start."""
    if not (file := directory / START_FILE).is_file():
        return None
    return read_json(file)["sha256"].get(SMALL)


def start_of(directory: Path) -> Path:
    """Where the weights are that ``directory`` leaves out.

    Raises FileNotFoundError where they are gone, ValueError where they have changed.
    """
    if (version := small_start(directory)) is not None:
        return small_place(version)
    noted = read_json(directory / START_FILE)
    places = [current(directory / place) for place in noted["start"]]
    start = next((place for place in places if place.is_dir()), places[-1])
    for name, expected in noted["sha256"].items():
        if not (file := start / name).is_file():
            raise FileNotFoundError(
                f"{directory} holds only what training changed, and {start / name}, from which it "
                f"started, is not there: put it back, or correct the path in {START_FILE} there "
                "(`instructblip export` makes a model that needs no other)"
            )
        if sha256(file) != expected:
            raise ValueError(
                f"{directory} holds only what training changed, and {file}, from which it started, "
                f"is another file now: restore it, or correct the path in {START_FILE} there"
            )
    return start


def sha256(file: Path) -> str:
    """The hash of a file's content, computed once."""
    return _sha256(file, file.stat().st_mtime_ns)


@functools.lru_cache(maxsize=64)
def _sha256(file: Path, _changed: int) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def write_changed(weights: dict[str, Tensor], start: Path, directory: Path) -> bool:
    """Write those of ``weights`` that the model directory ``start`` does not have, and where it is.

    Returns False, and writes nothing, where that would save too little or ``start`` is gone.
    """
    if not start.is_dir():
        return False
    if (start / START_FILE).is_file():  # no chains: the run in between may be removed
        start = start_of(start)
    stored = read_weights(start)
    equal: dict[tuple[int, torch.Size], int] = {}
    for name, value in weights.items():
        other = stored.get(name)
        if other is None or other.shape != value.shape:
            continue
        if torch.equal(other.to(value.dtype), value.detach().cpu()):
            equal[value.data_ptr(), value.shape] = other.nbytes
    if sum(equal.values()) < WORTH_REFERRING:
        return False
    changed = {
        # a copy, because tensors that share memory are written under one name, and those of
        # ``start`` must not show under another
        name: value.detach().clone() if name in stored else value
        for name, value in weights.items()
        if (value.data_ptr(), value.shape) not in equal
    }
    write_weights(changed, directory / CHANGED_FILE)
    version = start.name.removeprefix(f"{SMALL}-")
    if start == small_place(version):
        noted = {"start": [SMALL], "sha256": {SMALL: version}}
    else:
        start = start.resolve()
        noted = {
            "start": [os.path.relpath(start, directory.resolve()), str(start)],
            "sha256": {file.name: sha256(file) for file in _files(start)},
        }
    (directory / START_FILE).write_text(json.dumps(noted, indent=2) + "\n", encoding="utf-8")
    return True


def _files(directory: Path) -> list[Path]:
    """The files that `read_weights` reads of a directory."""
    first = next(directory / name for name in WEIGHT_FILES if (directory / name).is_file())
    names = {*read_json(first)["weight_map"].values()} if first.suffix == ".json" else ()
    return [first, *(directory / name for name in sorted(names))]


def read_nested(file: Path, key: str) -> dict[str, Tensor]:
    """The tensors of a file that may keep them under ``key``, as training checkpoints do."""
    weights = _load(file)
    weights = weights.get(key, weights) if isinstance(weights, dict) else weights
    return _dict_of_tensors(weights, file)


def _load(file: Path) -> Any:
    """The content of a file, read without running code from it."""
    if not file.is_file():
        raise FileNotFoundError(f"{file} does not exist")
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        mapped = zipfile.is_zipfile(file)  # what torch wrote before 1.6 cannot be
        return torch.load(file, map_location="cpu", weights_only=True, mmap=mapped)
    except (OSError, MemoryError):
        raise
    except Exception as error:  # torch's unpickler raises anything for bytes that are no pickle
        # torch's message advises to trust the pickle, so only the reason of safetensors is shown
        reason = f" ({error})" if isinstance(error, SafetensorError) else ""
        raise ValueError(
            f"{file} cannot be read as tensors alone{reason}: it is damaged, or it is a pickle "
            "that needs code to run, which is refused. Fetch it again or convert it to safetensors."
        ) from error


def _dict_of_tensors(weights: Any, file: Path) -> dict[str, Tensor]:
    if not isinstance(weights, dict) or not all(isinstance(v, Tensor) for v in weights.values()):
        raise ValueError(f"{file} must hold a dict of tensors")
    return weights


def _read_shards(index: Path) -> dict[str, Tensor]:
    """The tensors that an index names, each from the file that it names."""
    names = read_json(index).get("weight_map")
    if not isinstance(names, dict) or not all(isinstance(v, str) for v in names.values()):
        raise ValueError(f"{index} must have a weight_map of tensor names to file names")
    weights: dict[str, Tensor] = {}
    for file in sorted(set(names.values())):
        if file in ("", ".", "..") or any(c in file for c in "/\\\0"):
            raise ValueError(
                f"{index} points to {file!r}; shards must be plain names in the same directory"
            )
        shard = _dict_of_tensors(_load(index.parent / file), index.parent / file)
        listed = {name for name, where in names.items() if where == file}
        if absent := sorted(listed - shard.keys()):
            raise ValueError(f"{index} promises {absent[:5]} in {file}, which lacks them")
        weights.update({name: shard[name] for name in listed})
    return weights


def write_weights(weights: dict[str, Tensor], file: Path) -> None:
    """Write one safetensors file. Tensors that share memory are written once, by the first name."""
    seen: set[tuple[int, torch.Size]] = set()
    distinct = {}
    for name, tensor in weights.items():
        place = (tensor.data_ptr(), tensor.shape)
        if place not in seen:
            seen.add(place)
            distinct[name] = tensor.detach().contiguous().cpu()
    try:
        file.touch()
        mode = file.stat().st_mode  # as the umask says; safetensors itself leaves 0600
        save_file(distinct, file, metadata={"format": "pt"})
        file.chmod(mode)
    except (OSError, SafetensorError) as error:
        raise OSError(f"{file} could not be written: {error}. Is the disk full?") from error


def write_pickle(content: dict[str, Any], file: Path) -> None:
    """Write one ``torch.save`` file, whole or not at all."""
    try:
        with replacing(file) as temporary:
            torch.save(content, temporary)
    except (OSError, RuntimeError) as error:
        raise OSError(f"{file} could not be written: {error}. Is the disk full?") from error
