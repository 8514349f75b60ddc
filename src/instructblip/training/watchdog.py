"""A rank that hangs reports what it was doing and ends.

A collective waits for its slowest rank, so that one worker that hangs on a dead disk silently stops
them all. Every rank watches itself: the one that reports "waiting for data" is the cause, those "in
the step" wait for it. Once it ends, ``torchrun --max-restarts`` can start the run again.
"""

import faulthandler
import os
import sys
import threading
import time
from collections.abc import Sequence
from typing import Any

from instructblip.core import distributed
from instructblip.core.batch import Batch

EXIT_CODE = 75
"""EX_TEMPFAIL: a temporary failure; try again."""


class Watchdog:
    """Ends the process when what it watches takes longer than ``seconds``; None watches nothing."""

    def __init__(self, seconds: float | None) -> None:
        self.seconds = seconds
        self._watched: tuple[float, int, str, Sequence[Batch]] | None = None
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._look, name="watchdog", daemon=True)

    def __enter__(self) -> "Watchdog":
        if self.seconds is not None:
            self._thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._closed.set()
        if self._thread.is_alive():  # alone it might free tensors while Python ends: an abort
            self._thread.join()

    def watch(self, step: int, doing: str, batches: Sequence[Batch] = ()) -> None:
        """Start the clock: the rank is now ``doing`` something that must end in time."""
        self._watched = time.monotonic(), step, doing, batches

    def rest(self) -> None:
        """Stop the clock: what follows has no limit, as validation and saving."""
        self._watched = None

    def _look(self) -> None:
        """Print rank, step, what the rank was doing and with which samples, once it is late."""
        assert self.seconds is not None
        while not self._closed.wait(min(5.0, self.seconds / 10)):
            watched = self._watched
            if watched is None or time.monotonic() - watched[0] <= self.seconds:
                continue
            _, step, doing, batches = watched
            names = [name for batch in batches for name in batch.sample_names]
            samples = f", samples {', '.join(names[:16])}" if names else ""
            print(
                f"rank {distributed.rank()} of {distributed.world_size()}: step {step}, {doing} "
                f"for more than {self.seconds:g} s{samples}. The last checkpoint is intact: "
                "continue with --resume, or raise training.watchdog_seconds if a step takes that "
                "long",
                file=sys.stderr,
                flush=True,
            )
            faulthandler.dump_traceback(sys.stderr)
            os._exit(EXIT_CODE)
