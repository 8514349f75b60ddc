"""A preparation under way: what an interrupted one had written is kept, and the next goes on there.

``.<split>.part/`` beside the prepared split holds ``data.arrow`` as far as it is written, and
``state.json``, which says how far that is and from which files it was read.
"""

import fcntl
import json
import os
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from instructblip.core.batch import Example
from instructblip.core.files import flush, write_json
from instructblip.data.prepared.dataset import (
    DATA_FILE,
    SCHEMA,
    to_batch,
)

STATE_FILE = "state.json"
LOCK_FILE = "lock"
SAVE_SECONDS = 10.0
END_OF_STREAM = b"\xff\xff\xff\xff\0\0\0\0"


@contextmanager
def claim(folder: Path) -> Iterator[None]:
    """Creates ``folder`` and keeps other processes out of it; waits while another is inside.

    The folder may be renamed or removed inside the block. ValueError where nothing can be locked.
    """
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / LOCK_FILE
        with path.open("a") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX)
            except OSError as error:
                raise ValueError(
                    f"{folder}: files cannot be locked there ({error.strerror}); set data.prepared "
                    "to a folder of another file system"
                ) from None
            try:
                ours = os.path.samestat(path.stat(), os.fstat(lock.fileno()))
            except FileNotFoundError:
                ours = False
            # Otherwise the process that was waited for has finished, and taken the folder away.
            if ours:
                yield
                return


class Partial:
    """The rows written so far. ``files`` are those they were read from, as ``prepare`` notes them.

    Starts with what an earlier preparation with the same ``key`` left in ``folder``.
    """

    def __init__(self, folder: Path, key: dict[str, Any]) -> None:
        self.folder, self.key = folder, key
        try:
            state = json.loads((folder / STATE_FILE).read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError):
            state = {}
        self._start(state if state.get("key") == key else {})

    def _start(self, state: dict[str, Any]) -> None:
        self.tasks: Counter[str] = Counter(state.get("tasks", {}))
        self.bad: list[dict[str, str]] = state.get("bad", [])
        self.missing: list[str] = state.get("missing", [])
        self.files: dict[str, Any] = state.get("files", {})
        self.ended: bool = state.get("ended", False)
        self._data = (self.folder / DATA_FILE).open("a+b")
        self._data.truncate(state.get("bytes", 0))
        if not state:
            self._data.write(SCHEMA.serialize())
        self._saved = time.monotonic()

    def restart(self) -> None:
        """Forgets all rows."""
        self.close()
        self._start({})

    @property
    def seen(self) -> int:
        """Examples that were read, good and bad."""
        return sum(self.tasks.values()) + len(self.bad)

    def append(self, examples: list[Example]) -> None:
        self._data.write(to_batch(examples).serialize())
        self.tasks.update(example.task for example in examples)

    def due(self) -> bool:
        """Whether it is time to save."""
        return time.monotonic() - self._saved > SAVE_SECONDS

    def save(self, files: dict[str, Any], ended: bool = False) -> None:
        """Everything until now will be found by the next preparation."""
        self.files, self.ended = files, ended
        if ended:
            self._data.write(END_OF_STREAM)
        flush(self._data)
        state = {
            "key": self.key,
            "tasks": dict(self.tasks),
            "bad": self.bad,
            "missing": self.missing,
            "files": files,
            "ended": ended,
            "bytes": self._data.seek(0, os.SEEK_END),
        }
        write_json(self.folder / STATE_FILE, state)
        self._saved = time.monotonic()

    def close(self) -> None:
        self._data.close()
