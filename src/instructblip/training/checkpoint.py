"""Checkpoints that survive a kill at any moment.

A checkpoint is a folder ``step_000100/``: trained parameters, optimiser state, progress, and a
manifest with the size and sha256 of each file. It is written whole or not at all, so that a folder
of that name was complete once. If the manifest shows that it was damaged later, the checkpoint
before it is used.
"""

import errno
import hashlib
import json
import os
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from instructblip.core.files import parse_json, remove_directory, replacing_directory

MANIFEST = "manifest.json"
PARAMETERS = "parameters.safetensors"
OPTIMIZER = "optimizer.pt"
PROGRESS = "progress.json"
FULL = {
    errno.ENOSPC: ("the disk is full", "Free some space there"),
    errno.EDQUOT: ("the disk quota is used up", "Free some space there"),
    errno.EFBIG: ("a file is larger than the disk or `ulimit -f` allows", "Raise the limit"),
}
"""Errors of a write for which there is no room: what each means, and the remedy."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """Everything that a run needs to continue after ``step`` updates."""

    step: int
    path: Path
    parameters: dict[str, Tensor]
    optimizer: dict[str, Any]
    progress: dict[str, Any]


class DamagedCheckpointError(ValueError):
    """A checkpoint folder whose files are not those that were written."""


def checkpoint_path(folder: Path, step: int) -> Path:
    return folder / f"step_{step:06d}"


def saved_steps(folder: Path) -> list[int]:
    """The steps of the checkpoints in ``folder``, oldest first, complete or not."""
    names = (p.name.removeprefix("step_") for p in folder.glob("step_*") if p.is_dir())
    return sorted(int(name) for name in names if name.isdigit())


def complete_steps(folder: Path) -> list[int]:
    """The steps of the checkpoints in ``folder`` whose files have the sizes that were written,
    oldest first."""
    return [step for step in saved_steps(folder) if _is_complete(checkpoint_path(folder, step))]


def save_checkpoint(
    folder: Path,
    step: int,
    parameters: Mapping[str, Tensor],
    optimizer: dict[str, Any],
    progress: dict[str, Any],
    notes: Mapping[str, str] | None = None,
) -> Path:
    """Write ``folder/step_NNNNNN``, whole or not at all, and return its path.

    ``notes`` are further text files to store with it, by name. Raises OSError if there is no room;
    older checkpoints are then intact.
    """
    with write_directory(checkpoint_path(folder, step)) as path:
        # safetensors refuses tensors that share memory, hence the clones
        tensors = {name: p.detach().cpu().contiguous().clone() for name, p in parameters.items()}
        save_file(tensors, path / PARAMETERS)
        with (path / OPTIMIZER).open("wb") as file:  # torch's own writer hides the errno
            torch.save(optimizer, file)
        (path / PROGRESS).write_text(json.dumps({"step": step, **progress}, indent=1))
        for name, text in (notes or {}).items():
            (path / name).write_text(text, encoding="utf-8")
        files = {p.name: _fingerprint(p) for p in sorted(path.iterdir())}
        (path / MANIFEST).write_text(json.dumps({"step": step, "files": files}, indent=1))
    return checkpoint_path(folder, step)


def load_checkpoint(path: Path) -> Checkpoint:
    """Read one checkpoint to the CPU. Raises DamagedCheckpointError if a file is missing, cut
    short or changed."""
    verify(path)
    try:
        progress = parse_json((path / PROGRESS).read_text())
        return Checkpoint(
            step=progress["step"],
            path=path,
            parameters=load_file(path / PARAMETERS),
            optimizer=torch.load(path / OPTIMIZER, map_location="cpu", weights_only=True),
            progress=progress,
        )
    except (OSError, SafetensorError, KeyError, ValueError, RuntimeError) as error:
        raise DamagedCheckpointError(f"checkpoint {path} cannot be read: {error}") from error


def load_latest(folder: Path) -> Checkpoint | None:
    """The newest complete checkpoint, or None if there is none; a damaged one causes a warning.

    Raises DamagedCheckpointError if there are checkpoints and none of them is complete.
    """
    steps = saved_steps(folder)
    for step in reversed(steps):
        try:
            return load_checkpoint(checkpoint_path(folder, step))
        except DamagedCheckpointError as error:
            warnings.warn(f"{error}; looking for the one before it", RuntimeWarning, stacklevel=2)
    if steps:
        raise DamagedCheckpointError(
            f"no checkpoint in {folder} is complete (steps {steps}): "
            "delete the folder to start over"
        )
    return None


def verify(path: Path, *, content: bool = True) -> None:
    """Compare a checkpoint with its manifest: sizes, and with ``content`` the bytes themselves.

    Raises DamagedCheckpointError naming the first file that differs.
    """
    try:
        files: dict[str, dict[str, Any]] = parse_json((path / MANIFEST).read_text())["files"]
    except (OSError, ValueError, KeyError) as error:
        raise DamagedCheckpointError(f"checkpoint {path} has no readable {MANIFEST}") from error
    for name, expected in files.items():
        file = path / name
        size = file.stat().st_size if file.is_file() else None
        if size != expected["bytes"]:
            raise DamagedCheckpointError(
                f"checkpoint {path} is damaged: {name} has {size} bytes, "
                f"{expected['bytes']} were written"
            )
        if content and _fingerprint(file) != expected:
            raise DamagedCheckpointError(
                f"checkpoint {path} is damaged: {name} changed on the disk"
            )


def prune(folder: Path, keep_last: int, best_step: int | None) -> None:
    """Delete all but the newest ``keep_last`` complete checkpoints and the best one.

    Damaged checkpoints do not count, so that the only good one is never deleted.
    """
    steps, complete = saved_steps(folder), complete_steps(folder)
    kept = {*complete[-keep_last:], best_step}
    for step in steps:
        if complete and step not in kept:
            remove_directory(checkpoint_path(folder, step))


@contextmanager
def write_directory(path: Path) -> Iterator[Path]:
    """`replacing_directory`, with an OSError that states the remedy if there is no room."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # around and inside: what fills the disk may be the temporary directory, which is gone outside
    with _remedy(path), replacing_directory(path) as temporary, _remedy(path):
        yield temporary


@contextmanager
def _remedy(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        number = _why_full(error, path.parent)
        if number is None:
            raise
        what, remedy = FULL[number]
        raise OSError(
            number,
            f"{what}: could not write {path}; what was saved before is intact. "
            f"{remedy} and continue with --resume",
        ) from error


def _why_full(error: Exception, folder: Path) -> int | None:
    """The number of ``FULL`` that made a write fail, or None."""
    # torch and safetensors wrap the system's error in their own; else ask the disk itself
    met = {getattr(one, "errno", None) for one in (error, error.__context__)}
    for number in FULL:
        if number in met or os.strerror(number) in str(error):
            return number
    return errno.ENOSPC if shutil.disk_usage(folder).free < 2**20 else None


def _fingerprint(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"bytes": path.stat().st_size, "sha256": digest}


def _is_complete(path: Path) -> bool:
    try:
        verify(path, content=False)
    except DamagedCheckpointError:
        return False
    return True
