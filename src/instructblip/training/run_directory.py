"""The run directory: checkpoints/ to resume from, best/ and last/ to load, and the progress."""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from torch import nn

from instructblip.core import distributed
from instructblip.core.files import locked, recover, write_text
from instructblip.training.checkpoint import (
    Checkpoint,
    load_latest,
    prune,
    save_checkpoint,
    saved_steps,
    write_directory,
)

LOCK_FILE = ".lock"
Export = Callable[[Path], Any]
"""Fills an empty directory with the model as users load it."""


@dataclass(slots=True)
class Progress:
    """How far a run is: what a checkpoint holds besides weights and optimiser state."""

    step: int = 0
    best_score: float | None = None
    best_step: int | None = None
    validated_step: int = 0
    validations_without_best: int = 0
    window: dict[str, list[float | int]] = field(default_factory=dict)
    """Per data set: sum of the loss and number of response tokens since the last logged line."""
    terms: dict[str, list[float | int]] = field(default_factory=dict)
    """The same for each term of a loss that has several."""


@dataclass(slots=True)
class RunFiles:
    """Reads and writes the run directory ``folder``; only the first rank writes."""

    folder: Path
    keep_last: int
    export: Export | None = None
    notes: Mapping[str, str] = field(default_factory=dict)
    saved_step: int = 0
    """Step of the newest checkpoint."""

    @property
    def checkpoints(self) -> Path:
        return self.folder / "checkpoints"

    def restore(
        self,
        parameters: dict[str, nn.Parameter],
        optimizer: torch.optim.Optimizer,
        resume: bool,
    ) -> Progress:
        """Load the newest complete checkpoint into the arguments, if ``resume`` and there is one.

        Raises ValueError if the folder holds a run and ``resume`` is off, or if the checkpoint has
        other parameters than the model.
        """
        if distributed.is_main():
            for folder in (self.folder, self.checkpoints):
                recover(folder)
        distributed.barrier()
        if not resume:
            refuse_existing(self.folder)
            return Progress()
        checkpoint = load_latest(self.checkpoints)
        if checkpoint is None:
            return Progress()
        self.saved_step = checkpoint.step
        progress = _load(checkpoint, parameters, optimizer)
        distributed.barrier()
        if distributed.is_main():  # a kill may have prevented it after the save
            prune(self.checkpoints, self.keep_last, progress.best_step)
        return progress

    def write_notes(self) -> None:
        """Write the notes into the run directory, once the run is known to start.

        A run that is refused leaves the notes of the one before.
        """
        if distributed.is_main():
            for name, text in self.notes.items():
                write_text(self.folder / name, text)

    def save(
        self,
        parameters: dict[str, nn.Parameter],
        optimizer: torch.optim.Optimizer,
        progress: Progress,
    ) -> None:
        """Write a checkpoint of ``progress.step``, then delete those no longer needed."""
        merge_windows(progress)
        if distributed.is_main():
            state = {"optimizer": optimizer.state_dict(), "rng": torch.get_rng_state()}
            save_checkpoint(
                self.checkpoints, progress.step, parameters, state, asdict(progress), self.notes
            )
            prune(self.checkpoints, self.keep_last, progress.best_step)
        self.saved_step = progress.step
        distributed.barrier()

    def export_to(self, name: str) -> None:
        """Write the model and the notes into ``folder/name``, replacing what was there."""
        if self.export is None:
            return
        if distributed.is_main():
            with write_directory(self.folder / name) as path:
                self.export(path)
                for note, text in self.notes.items():
                    (path / note).write_text(text, encoding="utf-8")
        distributed.barrier()


@contextlib.contextmanager
def claim(folder: Path) -> Iterator[None]:
    """Keep other processes out of a run directory, since of two runs in one only one is kept.

    A block that wrote nothing leaves nothing, not even the folder. Raises ValueError if another
    process is in it. A process that dies leaves it free.
    """
    if not distributed.is_main():
        yield
        return
    new = [path for path in (folder, *folder.parents) if not path.exists()]
    with locked(folder / LOCK_FILE, wait=False):
        try:
            yield
        finally:
            (folder / LOCK_FILE).unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # the first that is not empty ends it
                for path in new:
                    path.rmdir()


def refuse_existing(folder: Path) -> None:
    """Raise ValueError if ``folder`` holds a run that a new one would overwrite."""
    if steps := saved_steps(folder / "checkpoints"):
        raise ValueError(
            f"{folder} already holds a run up to step {steps[-1]}: continue it with --resume, or "
            "choose another folder with --out"
        )


def merge_windows(progress: Progress) -> None:
    """Move the loss windows of all ranks to the first rank."""
    windows = distributed.gather_objects((progress.window, progress.terms))
    progress.window, progress.terms = {}, {}
    if distributed.is_main():
        for of_rank in windows:
            for window, merged in zip(of_rank, (progress.window, progress.terms), strict=True):
                for name, (loss, tokens) in window.items():
                    total = merged.setdefault(name, [0.0, 0])
                    total[0] += loss
                    total[1] += tokens


def _load(
    checkpoint: Checkpoint,
    parameters: dict[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
) -> Progress:
    """Copy a checkpoint into parameters, optimiser and random state; returns its progress."""
    saved = checkpoint.parameters
    before, now = ({(name, p.shape) for name, p in each.items()} for each in (saved, parameters))
    if different := sorted({name for name, _ in before ^ now}):
        raise ValueError(
            f"checkpoint {checkpoint.path} trained other parameters than this recipe: "
            f"{len(different)} differ, such as {', '.join(different[:3])}; resume with the recipe "
            "stored beside it"
        )
    state = checkpoint.optimizer["optimizer"]
    before, now = (
        [len(group["params"]) for group in groups]
        for groups in (state["param_groups"], optimizer.param_groups)
    )
    if before != now:
        raise ValueError(
            f"checkpoint {checkpoint.path} was written by another training.optimizer than "
            f"{type(optimizer).__name__}; resume with the recipe stored beside it"
        )
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(saved[name])
    # moments come from the checkpoint, settings such as the weight decay from the recipe
    settings = [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
    optimizer.load_state_dict(state)
    for group, values in zip(optimizer.param_groups, settings, strict=True):
        group.update(values)
    torch.set_rng_state(checkpoint.optimizer["rng"])
    known = {f.name for f in fields(Progress)}
    progress = Progress(**{k: v for k, v in checkpoint.progress.items() if k in known})
    if not distributed.is_main():
        progress.window, progress.terms = {}, {}  # the first rank has the sum over all ranks
    return progress
