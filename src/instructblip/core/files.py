"""THE writer: a file or a directory appears whole or not at all.

Nothing else in the package renames, replaces or syncs. A write goes to a hidden temporary name in
the same folder, is flushed to the disk, and is then renamed to its place:

    with replacing(path) as temporary:              a file
    with replacing_directory(path) as temporary:    a directory
    put_directory(filled, path)                     a directory that was filled over several runs
    with scratch_directory(folder) as temporary:    a directory that nobody keeps
    with locked(path):                              one process at a time

The system replaces a file in one rename, but a directory in two: the old one moves aside, the new
one moves in. A process that dies between the two leaves only the one that is aside.

**The rule of recovery.** What stands at ``path`` counts; where nothing stands there, what was moved
aside from it counts. `current` applies the rule for readers, `recover` makes it true on the disk
for the next writer and removes everything else that dead writers left. A temporary name carries the
process that wrote it, so that nothing of a live one is touched: ``.NAME.HOST-PROCESS-NUMBER.new``
and ``.old``. Leftovers of another machine count as dead once they are a day old.

Files that grow line by line (``metrics.jsonl``, ``predictions.jsonl``) are not replaced. Their
writers append whole lines and call `flush` where something else relies on them; a kill can only cut
the last line, which `whole_lines` ignores and `cut_last_line` removes before more is appended.
"""

import contextlib
import errno
import fcntl
import functools
import itertools
import json
import os
import platform
import re
import shutil
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, NamedTuple

DEAD_SECONDS = 86_400
"""Age after which a leftover counts as dead even if its process cannot be asked."""
_NAME = re.compile(r"\.(?P<name>.+)\.(?P<host>[0-9a-f]{8})-(?P<process>\d+)-\d+\.(?P<kind>new|old)")
_EARLIER = (
    re.compile(r"\.(?P<name>.+)\.(?P<process>\d+)\.(?P<kind>tmp|old|part)"),
    re.compile(r"\.(?P<name>.+)\.(?P<kind>new|old)"),
    re.compile(r"\.(?P<name>.+\.\w+)\.(?P<kind>part)"),  # unlike .train.part, which is resumed
    re.compile(r"\.(?P<kind>new|old)-(?P<name>.+)"),
    re.compile(r"\.(?P<name>trial)(?P<kind>)\.(?P<process>\d+)"),
)
"""Temporary names that earlier versions gave."""
_TAKEN = (errno.ENOTEMPTY, errno.EEXIST)
"""Errors of a rename to a place where a directory stands."""
_numbers = itertools.count()
_live: set[str] = set()  # temporary names that this process is writing
_locks: set[IO[Any]] = set()  # what this process has locked


@contextmanager
def replacing(path: Path, *, synced: bool = True) -> Iterator[Path]:
    """Yield a name to write a file to; it replaces ``path`` if the block ends without an error.

    Creates missing parent folders. Without ``synced`` the content may be lost in a power failure
    (not in a kill): for many small files that are verified before they are used.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    _recover_once(path.parent.absolute())
    with _temporary(path, "new") as temporary:
        yield temporary
        if synced:
            sync(temporary)
        temporary.replace(path)


def cache_folder() -> Path:
    """Where the package keeps what it can compute again."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "instructblip"


def write_text(path: Path, text: str) -> None:
    """Write one UTF-8 file, whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises FileNotFoundError, or ValueError naming the file and the line, also for
    a key that is there twice, of which JSON does not say which counts."""
    try:
        value = parse_json(path.read_text(encoding="utf-8"), unique_keys)
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} must hold a JSON object; got {type(value).__name__}")
    return value


def parse_json(
    text: str | bytes, pairs: Callable[[list[tuple[str, Any]]], Any] | None = None
) -> Any:
    """A JSON value, ``pairs`` being the hook for objects. Raises JSONDecodeError also for one that
    is nested too deeply."""
    try:
        return json.loads(text, object_pairs_hook=pairs)
    except RecursionError:
        raise json.JSONDecodeError("it is nested too deeply", "", 0) from None


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """For ``json``: an object, whose keys are there once."""
    value = dict(pairs)
    if len(value) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"the key {twice[:80]!r} is there twice")
    return value


def write_json(path: Path, content: Any, indent: int = 1) -> None:
    """Write one JSON file, whole or not at all. Raises ValueError for NaN and infinity."""
    text = json.dumps(content, indent=indent, ensure_ascii=False, allow_nan=False) + "\n"
    write_text(path, text)


@contextmanager
def replacing_directory(path: Path, *, synced: bool = True) -> Iterator[Path]:
    """Yield a new directory; it replaces ``path`` if the block ends without an error.

    Creates missing parent folders; ``synced`` as in `replacing`. Raises FileExistsError if ``path``
    is a file.
    """
    path = path.resolve()
    if path.is_file():
        raise FileExistsError(
            f"{path} is a file, and a directory is written there; choose another name, or remove it"
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    _recover_once(path.parent)
    with _temporary(path, "new") as temporary:
        temporary.mkdir()
        yield temporary
        put_directory(temporary, path, synced=synced)


def put_directory(filled: Path, path: Path, *, synced: bool = True) -> None:
    """Replace the directory ``path`` with ``filled``, a directory of the same file system."""
    for folder, _, names in os.walk(filled) if synced else ():
        for name in (*names, "."):
            sync(Path(folder) / name)
    while True:
        with _temporary(path, "old") as old:
            try:
                with contextlib.suppress(FileNotFoundError):
                    path.rename(old)
                filled.rename(path)
            except BaseException as error:
                if isinstance(error, OSError) and error.errno in _TAKEN:
                    continue  # another process put its own there in the meantime: replace that one
                if old.exists() and not path.exists():
                    old.rename(path)
                raise
            sync(path.parent)
            return


@contextmanager
def scratch_directory(folder: Path) -> Iterator[Path]:
    """Yield a new directory in ``folder``, which is created; it is removed at the end."""
    folder.mkdir(parents=True, exist_ok=True)
    _recover_once(folder.absolute())
    with _temporary(folder / "scratch", "new") as temporary:
        temporary.mkdir()
        yield temporary


@contextmanager
def locked(path: Path, *, wait: bool = True) -> Iterator[int]:
    """Run the block in one process at a time; the others wait, or are refused without ``wait``.

    ``path`` is an empty file, which stays; its folder is created, and may be renamed or removed
    inside the block. The system releases the lock of a process that dies, and processes that it
    forked do not keep it. Yields a descriptor: a program that is started with it (``pass_fds``)
    keeps the lock until it ends. ValueError where the lock is refused, or files cannot be locked.
    """
    lock = _lock(path, wait)
    _locks.add(lock)
    try:
        yield lock.fileno()
    finally:
        _locks.discard(lock)
        lock.close()


def is_locked(path: Path) -> bool:
    """Whether a process has the lock ``path``. False where there is no such file."""
    if not path.is_file():
        return False
    try:
        with locked(path, wait=False):
            return False
    except ValueError:
        return True


def _lock(path: Path, wait: bool) -> IO[Any]:
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = path.open("a")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            # The process that had the lock may have removed the file. Then this lock is of a file
            # that is gone, and a new one has to be locked.
            if os.path.samestat(path.stat(), os.fstat(lock.fileno())):
                return lock
        except FileNotFoundError:
            pass
        except BlockingIOError:
            raise ValueError(
                f"another process is at work in {path.parent}: wait until it ends, or choose "
                "another folder"
            ) from None
        except OSError as error:
            raise ValueError(
                f"{path.parent}: files cannot be locked there ({error.strerror}); choose a folder "
                "of another file system"
            ) from None
        lock.close()


def _close_locks() -> None:
    """In a forked process, which would keep the locks of its parent beyond its death."""
    while _locks:
        _locks.pop().close()


os.register_at_fork(after_in_child=_close_locks)


def remove_directory(path: Path) -> None:
    """Remove ``path``, if it is there, so that no reader sees a part of it."""
    with _temporary(path, "new") as doomed, contextlib.suppress(FileNotFoundError):
        path.rename(doomed)


def set_aside(path: Path, suffix: str) -> None:
    """Rename a damaged file so that readers, which go by its suffix, do not meet it again."""
    path.replace(path.with_suffix(suffix))


def current(path: Path) -> Path:
    """The directory to read for ``path``: itself, or what a crash left moved aside from it."""
    if path.exists():
        return path
    target = path.resolve()
    for leftover in _leftovers(target.parent, earlier=True):
        if leftover.is_old and leftover.target == target and leftover.path.is_dir():
            return leftover.path
    return path


def recover(folder: Path, *, earlier: bool = True) -> None:
    """Clear ``folder`` of what dead writers left: put back what was moved aside from a place that
    is now empty, and remove the rest.

    ``earlier`` includes the temporary names of earlier versions, which are less distinctive: for
    folders that hold nothing but our files.
    """
    for leftover in _leftovers(folder, earlier):
        if leftover.is_old and leftover.is_dead() and not leftover.target.exists():
            try:
                leftover.path.rename(leftover.target)
            except OSError as error:  # another process recovers as well
                if error.errno not in (*_TAKEN, errno.ENOENT):
                    raise
    for leftover in _leftovers(folder, earlier):
        if leftover.is_dead():
            _remove(leftover.path)


def sync(path: Path) -> None:
    """Flush a file, or the names in a directory, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def flush(file: IO[Any]) -> None:
    """Flush what was written to an open file to the disk."""
    file.flush()
    os.fsync(file.fileno())


def whole_lines(path: Path) -> list[bytes]:
    """The whole lines of a file that grows by lines, without line feeds; none if it is missing."""
    return path.read_bytes().split(b"\n")[:-1] if path.is_file() else []


def read_json_lines(path: Path) -> list[Any]:
    """The values of the whole lines of a file; none if it is missing. Raises ValueError naming the
    file and the line."""
    values = []
    for number, line in enumerate(whole_lines(path), start=1):
        try:
            values.append(parse_json(line))
        except ValueError as error:
            raise ValueError(
                f"{path}: line {number} is not valid JSON: {error}; remove it"
            ) from None
    return values


def cut_last_line(path: Path) -> None:
    """Cut off a last line that lacks its line feed, since a kill interrupted it."""
    if not path.is_file():
        return
    with path.open("r+b") as file:
        content = file.read()
        if not content.endswith(b"\n"):
            file.truncate(content.rfind(b"\n") + 1)


class _Leftover(NamedTuple):
    """A temporary file or directory that is there; its writer may still be at work."""

    path: Path
    target: Path
    is_old: bool
    host: str | None
    process: int | None
    changed: float

    def is_dead(self) -> bool:
        """Whether no process is writing it any more."""
        if self.path.name in _live:
            return False
        if self.process is None or time.time() - self.changed > DEAD_SECONDS:
            return True
        return self.host == _host() and (self.process == os.getpid() or not _runs(self.process))


def _leftovers(folder: Path, earlier: bool) -> list[_Leftover]:
    """The temporary files and directories in ``folder``, newest first."""
    found = []
    with contextlib.suppress(FileNotFoundError, NotADirectoryError, PermissionError):
        for path in folder.iterdir():
            patterns = (_NAME, *_EARLIER) if earlier else (_NAME,)
            match = next(filter(None, (p.fullmatch(path.name) for p in patterns)), None)
            if match is None:
                continue
            parts = match.groupdict()
            with contextlib.suppress(FileNotFoundError):
                stat = path.lstat()
                process = parts.get("process")
                leftover = _Leftover(
                    path,
                    folder / parts["name"],
                    parts["kind"] == "old",
                    parts.get("host"),
                    int(process) if process else None,
                    max(stat.st_mtime, stat.st_ctime),  # a rename changes the latter alone
                )
                found.append(leftover)
    return sorted(found, key=lambda leftover: leftover.changed, reverse=True)


@functools.cache
def _recover_once(folder: Path) -> None:
    """`recover` once per process, since a folder may hold a great many files."""
    recover(folder, earlier=False)


@contextmanager
def _temporary(path: Path, kind: str) -> Iterator[Path]:
    """Yield a temporary name for ``path``; what still has that name at the end is removed."""
    temporary = _beside(path, kind)
    _live.add(temporary.name)
    try:
        yield temporary
    finally:
        _live.discard(temporary.name)
        _remove(temporary)


def _beside(path: Path, kind: str) -> Path:
    return path.with_name(f".{path.name}.{_host()}-{os.getpid()}-{next(_numbers)}.{kind}")


def _remove(path: Path) -> None:
    """Remove a temporary file or directory, unless another process did."""
    with contextlib.suppress(FileNotFoundError):
        if path.is_dir() and not path.is_symlink():
            doomed = path if path.suffix == ".new" else _beside(path, "new")
            path.rename(doomed)  # what is removed in part must never be put back
            shutil.rmtree(doomed, ignore_errors=True)
        else:
            path.unlink()


def _runs(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # it runs as another user
    return True


@functools.cache
def _host() -> str:
    """This machine, or container, within which process numbers are unique: 8 hex digits."""
    try:
        space = Path("/proc/self/ns/pid").stat().st_ino
    except OSError:
        space = 0
    return f"{zlib.crc32(f'{platform.node()}/{space}'.encode()):08x}"
