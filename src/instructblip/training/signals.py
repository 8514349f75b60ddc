"""SIGTERM, which spot machines and schedulers send, and SIGINT, which Ctrl-C sends.

The run finishes its step, saves and ends.
"""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGINT)
HINT = (
    b"\ninterrupted: finishing the step and saving; Ctrl-C again stops at once and saves nothing\n"
)


class Interrupted(BaseException):
    """Raised by a signal inside `Termination.interruptible`. It is no ``Exception``, which code on
    the way might catch."""


class Termination:
    """A context in which SIGTERM and SIGINT set ``requested`` instead of ending the process.

    A second SIGINT ends it at once.
    """

    def __init__(self) -> None:
        self.requested = False
        self.by_hand = False
        """Whether Ctrl-C asked for it."""
        self._raise = False

    def __enter__(self) -> "Termination":
        # Python delivers signals to the main thread only and refuses handlers elsewhere
        self._installed = threading.current_thread() is threading.main_thread()
        if self._installed:
            self._previous = {name: signal.signal(name, self._receive) for name in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        if self._installed:
            for name, handler in self._previous.items():
                signal.signal(name, handler)

    def _receive(self, name: int, _frame: FrameType | None) -> None:
        if name == signal.SIGINT:
            if self.requested:
                raise KeyboardInterrupt
            self.by_hand = True
            os.write(2, HINT)  # print is not safe in a handler
        self.requested = True
        if self._raise:
            self._raise = False
            raise Interrupted

    @contextmanager
    def interruptible(self, enabled: bool = True) -> Iterator[None]:
        """Let the signals interrupt the block, which loses nothing that matters: a validation."""
        self._raise = enabled
        try:
            if enabled and self.requested:
                raise Interrupted
            yield
        finally:
            self._raise = False
