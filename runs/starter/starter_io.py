"""Checkpoints of the starter's stages: written aside, then renamed; resumed when there is one."""

from collections.abc import Sequence
from pathlib import Path

import torch


def save_checkpoint(
    out: Path,
    model: torch.nn.Module,
    optimizers: Sequence[torch.optim.Optimizer],
    step: int,
    seconds: float,
) -> None:
    state = {
        "model": model.state_dict(),
        "optimizers": [o.state_dict() for o in optimizers],
        "step": step,
        "seconds": seconds,
    }
    out.mkdir(parents=True, exist_ok=True)
    aside = out / "checkpoint.tmp"
    torch.save(state, aside)
    aside.replace(out / "checkpoint.pt")


def take_checkpoint(
    out: Path, model: torch.nn.Module, optimizers: Sequence[torch.optim.Optimizer]
) -> tuple[int, float]:
    """(step, seconds spent) of the checkpoint in ``out``, loaded; (0, 0.0) without one."""
    path = out / "checkpoint.pt"
    if not path.exists():
        return 0, 0.0
    state = torch.load(path, weights_only=True)
    model.load_state_dict(state["model"])
    for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
        optimizer.load_state_dict(saved)
    return state["step"], state["seconds"]
