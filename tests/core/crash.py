"""Processes that die at a chosen moment."""

import os
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator

CHANGES = {
    "os.chmod",
    "os.link",
    "os.mkdir",
    "os.remove",
    "os.rename",  # os.replace reports itself as this, too
    "os.rmdir",
    "os.symlink",
    "os.truncate",
    "os.utime",
    "shutil.copyfile",
}
"""Events of Python's audit that change the disk, besides opening a file to write it."""
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT


def in_child(work: Callable[[], object], kill_at: int | None = None) -> int | None:
    """Fork and run ``work``; SIGKILL it in front of its ``kill_at``-th change to the disk.

    Returns the number of changes it made, or None if it was killed. No ``finally`` runs in a killed
    process, as in a power cut or an out-of-memory kill.
    """
    reader, writer = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of forking with threads around
        process = os.fork()
    if process == 0:  # the child never returns into pytest
        _run(work, kill_at, writer)
    os.close(writer)
    _, status = os.waitpid(process, 0)
    answer = os.read(reader, 20)
    os.close(reader)
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL
        return None
    assert os.WEXITSTATUS(status) == 0, "the child failed: see its traceback above"
    return int(answer)


def crashes(work: Callable[[], object], every: int = 1) -> Iterator[int]:
    """Run ``work`` in children, killed in front of each change that it makes, one after the other.

    Yields the number of the change after each death; the caller puts the disk back in order.
    """
    moment = 0
    while in_child(work, moment) is None:
        yield moment
        moment += every
    assert moment > 1, "the writer was never interrupted"


def _run(work: Callable[[], object], kill_at: int | None, writer: int) -> None:
    changes = 0

    def change() -> None:
        nonlocal changes
        if changes == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        changes += 1

    def audit(event: str, arguments: tuple) -> None:
        opened = event == "open" and isinstance(arguments[2], int) and arguments[2] & WRITING
        if opened or event in CHANGES:
            change()

    fsync = os.fsync

    def counted_fsync(descriptor: int) -> None:  # which has no audit event
        change()
        fsync(descriptor)

    code = 1
    try:
        devnull = os.open(os.devnull, os.O_WRONLY)
        os.dup2(devnull, 1)
        os.fsync = counted_fsync
        sys.addaudithook(audit)
        work()
        os.write(writer, str(changes).encode())
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)
