"""Which files a reader opens: noted for the manifest, measured for the progress bar."""

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, TextIO


@dataclass(slots=True)
class FilesRead:
    """The files that a reader opened, and those that it looked for in vain."""

    present: dict[Path, None] = field(default_factory=dict)
    absent: dict[Path, None] = field(default_factory=dict)
    streams: list[tuple[Any, int]] = field(default_factory=list)
    """Raw files and their sizes in bytes, in the order in which they were opened."""

    def position(self) -> tuple[int, int]:
        """Bytes read so far and bytes in all, of the files opened until now."""
        done = sum(size if raw.closed else min(raw.tell(), size) for raw, size in self.streams)
        return done, sum(size for _, size in self.streams)


_noted: ContextVar[FilesRead | None] = ContextVar("files_read", default=None)


@contextmanager
def note_files() -> Iterator[FilesRead]:
    """Collects the files that readers open inside the block."""
    noted = FilesRead()
    token = _noted.set(noted)
    try:
        yield noted
    finally:
        _noted.reset(token)


def note_file(path: Path, present: bool = True) -> None:
    """Notes a file, or a folder of small files, that a reader takes its annotations from."""
    if (noted := _noted.get()) is not None:
        (noted.present if present else noted.absent)[path] = None


MAX_FILE_BYTES = 1 << 38
"""Bytes of an annotation file; more is a file of holes."""


def is_special(status: os.stat_result) -> bool:
    """Whether it is a pipe, where a reader waits for ever, a device or a socket."""
    return not (stat.S_ISREG(status.st_mode) or stat.S_ISDIR(status.st_mode))


def check_file(path: Path) -> None:
    """ValueError for what is no file, also behind a link, and for one too large to be read."""
    status = path.stat()
    if is_special(status):
        raise ValueError(f"{path} is a pipe, a device or a socket; expected a file. Remove it")
    if status.st_size > MAX_FILE_BYTES:
        raise ValueError(
            f"{path} has {status.st_size} bytes; expected at most {MAX_FILE_BYTES}. Is it a file "
            "of holes? Remove or split it"
        )


def open_text(path: Path, encoding: str = "utf-8-sig", newline: str | None = None) -> TextIO:
    """Opens an annotation file; ``FilesRead.position`` counts what is read of it.
    ValueError as `check_file`."""
    check_file(path)
    file = path.open(encoding=encoding, newline=newline)
    _note_stream(file.buffer.raw, path)  # type: ignore[attr-defined]
    return file


def open_bytes(path: Path) -> BinaryIO:
    """Opens a file that is not text, as `open_text`."""
    check_file(path)
    file = path.open("rb")
    _note_stream(file.raw, path)
    return file


def _note_stream(raw: Any, path: Path) -> None:
    if (noted := _noted.get()) is not None:
        noted.streams.append((raw, path.stat().st_size))
