"""Reads annotation files record by record, with errors that name file, record and field.

Files of hundreds of megabytes are streamed, never in memory whole. Readers open files only through
the functions below, so that ``prepare`` knows which files a data set was read from.
"""

import csv
import json
import os
import posixpath
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, TextIO
from urllib.parse import unquote, urlsplit

from instructblip.core.example import Example
from instructblip.core.files import unique_keys
from instructblip.data.reading.opened import check_file, open_text
from instructblip.data.reading.streaming import refuse_constant, stream_values

MAX_TEXT = 100_000
"""Characters of one text field; more is a broken file, not an annotation."""
MAX_LINE = 1 << 26
"""Characters of one line; a longer one is an error, so memory stays bounded."""
MAX_NAME = 255
"""Bytes of one part of an image's path: what file systems allow."""

IMAGE_SUFFIXES = (
    ".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif", ".heic", ".heif",
    ".dcm", ".dicom",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Source:
    """One data set: ``read(root, split)`` yields its examples in the order of the file.

    In place of an example of custom data, or of a tar shard, that cannot be read it yields the
    error, which begins with the place: ``file:record: ``. Of another published set it raises the
    first, for the file is not whole.
    ``split`` is one of ``splits``. ``files`` describes which files belong into ``root``.
    """

    read: Callable[[Path, str], Iterator[Example | ValueError]]
    task: str
    licence: str
    files: str
    images: str = "images"
    """Folder below the root that image paths are relative to."""
    settings: str = ""
    """What else decides how files are read; data prepared with another value is prepared again."""
    splits: tuple[str, ...] = ("train", "val", "test")


def list_folder(folder: Path) -> list[Path]:
    """The entries of a folder, sorted; ValueError for one that cannot be read."""
    try:
        return sorted(folder.iterdir())
    except OSError as error:
        raise _unreadable(error) from None


def image_stem(name: str) -> str:
    """What a file name has in common with that of the same image in another format or case."""
    return posixpath.splitext(posixpath.basename(name))[0].casefold()


def images_by_stem(names: Iterable[str]) -> dict[str, str]:
    """The image files among ``names``, each under its ``image_stem``."""
    return {
        image_stem(name): name
        for name in names
        if posixpath.splitext(name)[1].lower() in IMAGE_SUFFIXES
    }


RUN_FILES = ("recipe.yaml", "metrics.jsonl")
"""What distinguishes the directory of a run from a folder of data."""


def walk_files(folder: Path) -> list[Path]:
    """All files below a folder, sorted; ValueError for a folder that cannot be read. The files of
    runs in it are left out: their curves are no data.

    Links to folders are followed, and no folder is entered twice: links may form a circle.
    """

    def stop(error: OSError) -> None:
        # Path.rglob skips such a folder, so its files would be lost silently.
        raise _unreadable(error)

    entered: set[tuple[int, int]] = set()
    files = []
    for top, folders, names in os.walk(folder, onerror=stop, followlinks=True):
        status = Path(top).stat()
        is_run = {*RUN_FILES} <= {*names} and Path(top) != folder
        if (identity := (status.st_dev, status.st_ino)) in entered or is_run:
            folders.clear()
            continue
        entered.add(identity)
        folders.sort()  # of two links to one folder, always follow the same
        files += [Path(top, name) for name in names]
    return sorted(files)


def _unreadable(error: OSError) -> ValueError:
    return ValueError(
        f"folder {error.filename} cannot be read ({error.strerror}); allow reading it, or move it "
        "away"
    )


@dataclass(frozen=True, slots=True)
class Record:
    """One object of a file and its place there; the accessors check presence and type."""

    data: dict[str, Any]
    where: str
    remedy: str = "Check that this is the owner's original file, downloaded whole"

    def __contains__(self, name: str) -> bool:
        return self.data.get(name) is not None

    def fail(self, name: str, expected: str) -> NoReturn:
        if name in self.data:
            got = f"is {repr(self.data[name])[:80]}"
        else:
            got = f"is missing (fields present: {', '.join(map(str, list(self.data)[:20]))})"
        raise ValueError(f"{self.where}: field '{name}' {got}; expected {expected}. {self.remedy}")

    def text(self, name: str, default: str | None = None) -> str:
        """A string without surrounding white space; ``default`` when absent or null."""
        value = self.data.get(name)
        if value is None and default is not None:
            return default
        if not isinstance(value, str):
            self.fail(name, "a string")
        return _bounded(value, name, self.where)

    def identifier(self, name: str, default: str | None = None) -> str:
        """An identifier, which files write as a number or as a string; ``default`` as in `text`."""
        value = self.data.get(name)
        if value is None and default is not None:
            return default
        if isinstance(value, bool) or not isinstance(value, int | str):
            self.fail(name, "a number or a string")
        return _bounded(str(value), name, self.where)

    def integer(self, name: str) -> int:
        value = self.data.get(name)
        if isinstance(value, str) and re.fullmatch(r"-?\d{1,18}", value):
            return int(value)
        if isinstance(value, bool) or not isinstance(value, int) or abs(value) >= 1 << 63:
            self.fail(name, "a whole number of at most 18 digits")
        return value

    def texts(self, name: str, default: tuple[str, ...] | None = None) -> tuple[str, ...]:
        """A list of strings; ``default`` as in `text`. Numbers become strings, since some files do
        not quote them."""
        value = self.data.get(name)
        if value is None and default is not None:
            return default
        if not isinstance(value, list) or not all(
            isinstance(item, str | int | float) and not isinstance(item, bool) for item in value
        ):
            self.fail(name, "a list of strings")
        return tuple(_bounded(str(item), name, self.where) for item in value)

    def one_or_more(self, name: str) -> tuple[str, ...]:
        """A string, or a list of strings."""
        return self.texts(name) if isinstance(self.data.get(name), list) else (self.text(name),)

    def numbers(self, name: str) -> list[float]:
        """A list of numbers."""
        value = self.data.get(name)
        if not isinstance(value, list) or not all(type(item) in (int, float) for item in value):
            self.fail(name, "a list of numbers")
        return [float(item) for item in value]

    def records(self, name: str) -> list["Record"]:
        """A list of objects."""
        value = self.data.get(name)
        if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
            self.fail(name, "a list of objects")
        return [
            Record(item, f"{self.where}, {name} {i}", self.remedy) for i, item in enumerate(value)
        ]

    def pick(self, name: str, options: Sequence[str]) -> str:
        """The option that the index in field ``name`` points at."""
        index = self.integer(name)
        if not 0 <= index < len(options):
            self.fail(name, f"an index from 0 to {len(options) - 1}")
        return options[index]


def _bounded(text: str, name: str, where: str) -> str:
    if len(text) > MAX_TEXT:
        raise ValueError(
            f"{where}: field '{name}' has {len(text)} characters; expected at most {MAX_TEXT}. "
            "Check the file, or cut the text"
        )
    _check_encodable(text, name, where)
    return text.strip()


def _check_encodable(text: str, name: str, where: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError(
            f"{where}: field '{name}' holds half of a character (a lone surrogate): "
            f"{ascii(text)[:80]}; repair the text"
        ) from None


def check_object(value: Any, where: str) -> dict[str, Any]:
    """Returns ``value`` if it is a JSON object, else raises ValueError."""
    if not isinstance(value, dict):
        raise ValueError(f"{where}: is {repr(value)[:80]}; expected an object with fields")
    return value


def read_records(path: Path, *fields: str) -> Iterator[tuple[str, Record]]:
    """(key, record) of a JSON array or object at ``fields``; the key is the index in an array."""
    for key, value in stream_values(path, *fields):
        where = f"{path.name}:record {key}"
        yield key, Record(check_object(value, where), where)


def read_json(path: Path) -> Iterator[tuple[str, Record | ValueError]]:
    """(key, record) of a JSON array or object, or `try_lines` where it is named ``.json``."""
    return try_lines(path) if _has_lines(path) else read_records(path)


def _has_lines(path: Path) -> bool:
    """Whether the first line is an object, and another line or a value that is no object follows:
    then it is a record, and not an object of records."""
    check_file(path)
    with path.open("rb") as file:
        first = file.readline(MAX_LINE)
        if not first.lstrip(b"\xef\xbb\xbf \t").startswith(b"{"):
            return False
        try:
            value = json.loads(first.decode("utf-8-sig"))
        except (ValueError, RecursionError):
            return False
        more = any(line.strip() for line in file)
    return more or not all(isinstance(item, dict) for item in value.values())


def read_texts(path: Path, *fields: str) -> list[str]:
    """A JSON array of strings at ``fields``."""
    texts = []
    for key, value in stream_values(path, *fields):
        where = f"{path.name}:{'.'.join(fields)} {key}"
        if not isinstance(value, str):
            raise ValueError(f"{where}: expected a string")
        texts.append(_bounded(value, fields[-1], where))
    return texts


def read_lines(path: Path) -> Iterator[tuple[str, Record]]:
    """(index, record) of the objects of a JSON-lines file."""
    for key, record in try_lines(path):
        if isinstance(record, ValueError):
            raise record
        yield key, record


def try_lines(path: Path) -> Iterator[tuple[str, Record | ValueError]]:
    """(index, record) of each line of a JSON-lines file, or the error of a line in its place."""
    lines = ((line, where) for line, where in read_text(path) if line.strip())
    for i, (line, where) in enumerate(lines):
        try:
            yield str(i), Record(_object(line, where), where)
        except ValueError as error:
            yield str(i), error


def _object(line: str, where: str) -> dict[str, Any]:
    try:
        value = json.loads(line, parse_constant=refuse_constant, object_pairs_hook=unique_keys)
    except RecursionError:
        raise ValueError(f"{where}: is nested too deeply; repair the line") from None
    except ValueError as error:
        raise ValueError(f"{where}: is not JSON ({error}); repair the line") from None
    return check_object(value, where)


def read_text(path: Path) -> Iterator[tuple[str, str]]:
    """(line, its place) of a text file. Only ``\\n`` ends a line (not U+2028 and the like)."""
    number = 0
    with open_text(path, newline="\n") as file:
        try:
            while line := file.readline(MAX_LINE + 1):
                number += 1
                where = f"{path.name}:line {number}"
                if len(line) > MAX_LINE:
                    raise ValueError(
                        f"{where}: has more than {MAX_LINE} characters; is this a file of lines?"
                    )
                yield line.rstrip("\r\n"), where
        except UnicodeDecodeError as error:
            raise ValueError(f"{path.name}:line {number + 1} {not_utf8(path, error)}") from None


def not_utf8(path: Path, error: UnicodeDecodeError) -> str:
    """What is wrong with a text file that ``error`` came from, and the remedy."""
    with path.open("rb") as file:
        utf16 = file.read(2) in (b"\xff\xfe", b"\xfe\xff")
    got = "is UTF-16" if utf16 else f"is not UTF-8 ({error.reason})"
    return f"{got}; save it as UTF-8 (a spreadsheet as CSV UTF-8)"


def read_table(path: Path, delimiter: str = ",") -> Iterator[tuple[str, Record | ValueError]]:
    """(index, record) of the rows of a table with a header, or the error of a row in its place.

    The separator is that of the header, since spreadsheets write another one in each language, or
    that of a first line ``sep=;``; ``delimiter`` where the header has one column.
    """
    number = before = 0
    with open_text(path, newline="") as file:
        try:
            first = file.readline(MAX_LINE).rstrip("\r\n")
            before = int(re.fullmatch("sep=.", first) is not None)
            if before:
                delimiter = first[-1]
            else:
                delimiter = _separator(first, delimiter)
                file.seek(0)
            rows = csv.DictReader(_bounded_lines(file), delimiter=delimiter, strict=True)
            _check_header(rows.fieldnames or (), f"{path.name}:line {before + 1}")
            number = before + 1
            for i, row in enumerate(rows):
                number = before + rows.line_num
                where = f"{path.name}:line {number}"
                if None in row or None in row.values():
                    yield (
                        str(i),
                        ValueError(
                            f"{where}: has more or fewer columns than the header "
                            f"({len(rows.fieldnames or ())}); put texts with commas in quotes"
                        ),
                    )
                else:
                    yield str(i), Record(dict(row), where)
        except csv.Error as error:
            number = max(number + 1, before + rows.line_num)
            raise ValueError(
                f"{path.name}:line {number} is not readable as CSV ({error}); repair the line"
            ) from None
        except UnicodeDecodeError as error:
            raise ValueError(f"{path.name}:line {number + 1} {not_utf8(path, error)}") from None


def _bounded_lines(file: TextIO) -> Iterator[str]:
    while line := file.readline(MAX_LINE + 1):
        if len(line) > MAX_LINE:
            raise csv.Error(f"more than {MAX_LINE} characters")
        yield line


def _check_header(header: Sequence[str], where: str) -> None:
    names = [name.strip().casefold() for name in header]
    if repeated := {name for name in names if name and names.count(name) > 1}:
        raise ValueError(
            f"{where}: the header names {', '.join(map(repr, sorted(repeated)))} more than once; "
            "rename or remove all but one"
        )


def _separator(header: str, delimiter: str) -> str:
    """What is between the columns of a header: ``delimiter`` if it is there, outside of quotes."""
    for separator in (delimiter, ";", "\t", ","):
        try:
            if len(next(csv.reader([header], delimiter=separator))) > 1:
                return separator
        except (csv.Error, StopIteration):
            break
    return delimiter


def local_path(name: str, where: str) -> str:
    """``name``, and for ``file:///a%20b`` the path ``/a b``. ValueError for a file of another
    machine."""
    if not name.startswith("file:/"):
        return name
    parts = urlsplit(name)
    if parts.netloc not in ("", "localhost"):
        raise ValueError(f"{where}: {name[:200]!r} is a file of another machine; give its path")
    return unquote(parts.path)


def image_name(name: str, where: str) -> str:
    """``name``, normalised; ValueError if it leaves the image root.

    Works on strings, since this runs once per sample and pathlib would take half a reader's time.
    """
    normal = posixpath.normpath(name) if name else "."
    if name[:1] == "/" or normal == "." or "\0" in name or "\\" in name or ".." in name.split("/"):
        slash = "; write / for \\" if "\\" in name else ""
        raise ValueError(
            f"{where}: image name {name[:200]!r} is empty or leaves the image root; expected a "
            f"relative path below it{slash}"
        )
    _check_encodable(name, "image", where)
    if len(name) > MAX_NAME // 4 and max(map(len, normal.encode().split(b"/"))) > MAX_NAME:
        raise ValueError(
            f"{where}: image name {name[:80]!r}... has {len(name)} characters; expected at most "
            f"{MAX_NAME} bytes between two slashes"
        )
    return normal
