"""The annotation files that data was read from: size, date and hash; whether they have changed."""

import hashlib
from pathlib import Path
from typing import Any

from instructblip.data.sources.opened import FilesRead

ANNOTATION_FILES = (".json", ".jsonl", ".csv", ".txt", ".arrow")


def stamps_of(files: FilesRead, root: Path) -> dict[str, Any]:
    """The files a reader took its rows from, and those it would have read had they been there."""
    return {
        "annotations": [_stamp(path, root) for path in files.found],
        "absent": [str(path.relative_to(root)) for path in files.absent],
    }


def same_files(noted: dict[str, Any], root: Path, by_content: bool) -> bool:
    """Whether the files that rows were read from are as they were, and no other has come.

    ``by_content`` takes a file that was only touched for the same.
    """
    if any((root / name).exists() for name in noted.get("absent", ())):
        return False
    for known in noted.get("annotations", ()):
        path = root / known["file"]
        if not path.exists():
            return False
        now = _stamp(path, root)
        if now["bytes"] != known["bytes"]:
            return False
        touched = now["modified_ns"] != known["modified_ns"]
        if touched and not (by_content and sha256_of(path) == known["sha256"]):
            return False
    return True


def _files_of(path: Path) -> list[Path]:
    """The file itself, or the annotation files of a folder."""
    if not path.is_dir():
        return [path]
    return sorted(file for file in path.rglob("*") if file.suffix in ANNOTATION_FILES)


def _stamp(path: Path, root: Path) -> dict[str, Any]:
    stats = [file.stat() for file in _files_of(path)]
    return {
        "file": str(path.relative_to(root)),
        "bytes": sum(stat.st_size for stat in stats),
        "modified_ns": max((stat.st_mtime_ns for stat in stats), default=0),
    }


def sha256_of(path: Path) -> str:
    """Of a file, or of the annotation files of a folder one after the other."""
    digest = hashlib.sha256()
    for file in _files_of(path):
        with file.open("rb") as opened:
            while block := opened.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()
