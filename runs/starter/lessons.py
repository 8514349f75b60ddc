"""What the models of the starter share: batches made in memory for the package's training loop."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from instructblip.core.batch import LossOutput
from instructblip.training.config import TrainingConfig
from instructblip.training.train import train


@dataclass(frozen=True)
class Lesson:
    """A batch for the training loop: ``content`` is for the model, the rest is for the loop."""

    content: Any
    response_mask: Tensor
    """[B, R], 1 where a token carries loss."""
    datasets: tuple[str, ...]
    ids: tuple[str, ...]

    @classmethod
    def of(cls, name: str, step: int, content: Any, response_mask: Tensor) -> "Lesson":
        number = len(response_mask)
        ids = tuple(f"{step}/{i}" for i in range(number))
        return cls(content, response_mask, (name,) * number, ids)

    def __len__(self) -> int:
        return len(self.response_mask)

    @property
    def num_response_tokens(self) -> int:
        return int(self.response_mask.sum())

    def to(self, device: Any) -> "Lesson":
        return self

    def mean_loss(self, mean: Tensor) -> LossOutput:
        """A mean over the batch as the loop expects it: sums, whose mean it takes again."""
        tokens = self.response_mask.long().sum(1)
        return LossOutput(mean * tokens.sum(), tokens.sum(), mean.detach() * tokens, tokens)


@dataclass(frozen=True)
class Lessons:
    """``make(step)`` is the batch of a step: nothing else decides it, so that a run resumes."""

    make: Callable[[int], Lesson]

    def iterate(self, step: int) -> Iterator[list[Lesson]]:
        return ([self.make(number)] for number in count(step))


def teach(
    model: nn.Module,
    make: Callable[[int], Lesson],
    out: Path,
    steps: int,
    learning_rate: float,
    export: Callable[[Path], Any],
) -> bool:
    """Train with the package's loop, Muon and checkpoints into ``out``; resumes a run that is
    there. Returns whether it finished, and not because it was terminated."""
    config = TrainingConfig(
        steps=steps,
        batch_size=1,  # a lesson is the batch of a step, whatever its size
        optimizer="muon",
        learning_rate=learning_rate,
        warmup_steps=min(50, steps - 1),
        betas=(0.9, 0.98),
        weight_decay=0.01,
        precision="fp32",
        device="cpu",
        workers=0,
        validate_every=None,
        save_every=100,
        keep_last=1,
        log_every=50,
    )
    torch.manual_seed(0)
    result = train(model, Lessons(make), None, config, out, resume=True, export=export)  # type: ignore[arg-type]
    return result.stopped == "finished"
