"""How many samples are answered at a time: a number, or found out while answering."""

import time
from collections.abc import Callable, Sequence
from typing import Literal

import torch

START, MOST = 16, 512
GAIN = 1.05
"""A larger batch has to answer this much faster than the one before."""

BatchSize = int | Literal["auto"]


class Batches:
    """Runs a function over parts of a list and adapts their size.

    "auto" starts with 16 and doubles as long as that answers more samples a second. Whatever the
    setting, a batch for which the memory is too small is answered again in halves, and the size
    stays there. The size changes speed and memory, not the answers.
    """

    def __init__(self, size: BatchSize) -> None:
        if size != "auto" and size < 1:
            raise ValueError(f"batch_size must be at least 1, or auto; got {size}")
        self.size: int = START if size == "auto" else size
        self.growing = size == "auto"
        self._rate = 0.0

    def run(self, indices: Sequence[int], answer: Callable[[Sequence[int]], None]) -> None:
        """Call ``answer`` with every index once, in order, ``size`` at a time."""
        done = 0
        while done < len(indices):
            part = indices[done : done + self.size]
            began = time.perf_counter()
            try:
                answer(part)
            except torch.OutOfMemoryError:
                if len(part) == 1:
                    raise
                self._shrink(len(part))
                continue
            done += len(part)
            if self.growing and len(part) == self.size:
                self._grow(len(part) / max(time.perf_counter() - began, 1e-9))

    def _shrink(self, failed: int) -> None:
        self.size, self.growing = failed // 2, False
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _grow(self, rate: float) -> None:
        if rate < GAIN * self._rate or self.size >= MOST:
            self.growing = False
            return
        self._rate = rate
        self.size = min(MOST, 2 * self.size)
