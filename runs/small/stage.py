"""The training loop as all stages of `small` run it."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from instructblip.training.config import TrainingConfig
from instructblip.training.train import train


def run_stage(
    model: nn.Module,
    batches: Any,
    out: Path,
    export: Callable[[Path], object],
    steps: int,
    learning_rate: float,
    warmup: int = 40,
    weight_decay: float = 0.05,
) -> None:
    """Train ``model`` into the run directory ``out``, or go on there; exits when interrupted."""
    config = TrainingConfig(
        steps=steps,
        batch_size=1,  # a batch is that of a step, whatever its size
        learning_rate=learning_rate,
        warmup_steps=min(warmup, steps - 1),
        weight_decay=weight_decay,
        device="cpu",
        workers=0,
        validate_every=None,
        save_every=50,
        keep_last=1,
        log_every=10,
    )
    result = train(model, batches, None, config, out, resume=True, export=export)
    if result.stopped != "finished":
        sys.exit("stopped: run it again to resume")
