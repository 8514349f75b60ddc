"""SIGTERM, which spot machines and schedulers send: the run finishes the step, saves and ends."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Interrupted(BaseException):
    """Raised by SIGTERM inside `Termination.interruptible`. It is no ``Exception``, which code on
    the way might catch."""


class Termination:
    """A context in which SIGTERM sets ``requested`` instead of ending the process."""

    def __init__(self) -> None:
        self.requested = False
        self._raise = False

    def __enter__(self) -> "Termination":
        # Python delivers signals to the main thread only and refuses handlers elsewhere
        self._installed = threading.current_thread() is threading.main_thread()
        if self._installed:
            self._previous = signal.signal(signal.SIGTERM, self._receive)
        return self

    def __exit__(self, *_: object) -> None:
        if self._installed:
            signal.signal(signal.SIGTERM, self._previous)

    def _receive(self, _signal: int, _frame: FrameType | None) -> None:
        self.requested = True
        if self._raise:
            self._raise = False
            raise Interrupted

    @contextmanager
    def interruptible(self, enabled: bool = True) -> Iterator[None]:
        """Let SIGTERM interrupt the block, which loses nothing that matters: a validation."""
        self._raise = enabled
        try:
            if enabled and self.requested:
                raise Interrupted
            yield
        finally:
            self._raise = False
