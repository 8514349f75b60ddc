"""The annotation files that data was read from: size, date and hash; whether they have changed.

Of a folder of small files there is one stamp for all, which knows each by name, size and date.
``without`` is where prepared data is written: it may lie inside such a folder and is none of it.
"""

import hashlib
from pathlib import Path
from typing import Any

from instructblip.data.reading.opened import FilesRead
from instructblip.data.reading.records import walk_files

ANNOTATION_FILES = (".json", ".jsonl", ".csv", ".txt", ".arrow")


def stamps_of(files: FilesRead, root: Path, without: Path) -> dict[str, Any]:
    """The files a reader took its rows from, and those it would have read had they been there."""
    return {
        "annotations": [_stamp(path, root, without) for path in files.present],
        "absent": [str(path.relative_to(root)) for path in files.absent],
    }


def same_files(noted: dict[str, Any], root: Path, without: Path, by_content: bool) -> bool:
    """Whether the files that rows were read from are as they were, and no other has come.

    ``by_content`` takes a file that was only touched for the same.
    """
    if any((root / name).exists() for name in noted.get("absent", ())):
        return False
    for known in noted.get("annotations", ()):
        path = root / known["file"]
        if not path.exists():
            return False
        now = _stamp(path, root, without)
        if now["bytes"] != known["bytes"]:
            return False
        touched = any(known.get(key) != value for key, value in now.items())
        if touched and not (by_content and sha256_of(path, without) == known["sha256"]):
            return False
    return True


def _files_of(folder: Path, without: Path) -> list[Path]:
    """The annotation files of a folder."""
    files = [file for file in walk_files(folder) if file.suffix.lower() in ANNOTATION_FILES]
    if folder not in without.parents:
        return files
    return [file for file in files if without not in file.parents]


def _stamp(path: Path, root: Path, without: Path) -> dict[str, Any]:
    file = str(path.relative_to(root))
    if not path.is_dir():
        status = path.stat()
        return {"file": file, "bytes": status.st_size, "modified_ns": status.st_mtime_ns}
    stats = {str(f.relative_to(path)): f.stat() for f in _files_of(path, without)}
    listed = [(name, status.st_size, status.st_mtime_ns) for name, status in stats.items()]
    return {
        "file": file,
        "bytes": sum(status.st_size for status in stats.values()),
        "listing": hashlib.sha256(repr(listed).encode()).hexdigest(),
    }


def sha256_of(path: Path, without: Path) -> str:
    """Of a file, or of the names and contents of a folder's annotation files."""
    digest = hashlib.sha256()
    for file in _files_of(path, without) if path.is_dir() else [path]:
        if file != path:
            digest.update(f"{file.relative_to(path)}\0{file.stat().st_size}\0".encode())
        with file.open("rb") as opened:
            while block := opened.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()
