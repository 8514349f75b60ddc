"""The folder of a studio: its images and their annotations, as `instructblip tune` reads them.

Annotations are rows of ``metadata.jsonl``, with all columns that they had; a folder that is split
into ``train/``, ``val/`` and ``test/`` has one in each of them. Rows without an answer, which
`tune` refuses, wait in ``.studio/unanswered.jsonl``. Before the first change of a folder that
has annotations in another form, the tables that `tune` would read as well are renamed to
``NAME.before``; other tables and texts are not read any more, and stay.
"""

import errno
import hashlib
import json
import re
import threading
import unicodedata
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from instructblip.core.files import (
    is_locked,
    locked,
    read_json_lines,
    recover,
    replacing,
    set_aside,
    write_text,
)
from instructblip.data.custom.formats import FORMATS, folder_of_split, is_metadata
from instructblip.data.custom.rows import CustomSet, Row, column_of, images_in_cell, spelling
from instructblip.data.reading.records import IMAGE_SUFFIXES, Record, image_name, walk_files
from instructblip.data.reading.splits import SPLITS, split_named

TABLE = "metadata.jsonl"
PRIVATE = ".studio"
"""Folder of what only the studio needs: locks, the log of a run, rows without an answer."""
OWN = CustomSet("own", "imagefolder")
SUFFIXES = {
    "JPEG": (".jpg", ".jpeg"),
    "PNG": (".png",),
    "WEBP": (".webp",),
    "GIF": (".gif",),
    "BMP": (".bmp",),
}
"""Of images that may be added, by format; the first one is for names with none of them."""
MAGIC = {b"\xff\xd8\xff": "JPEG", b"\x89PNG": "PNG", b"RIFF": "WEBP", b"GIF8": "GIF", b"BM": "BMP"}
_MOST_NAME = 120
"""Bytes of the name of an image that is added, without its suffix."""
_UNSAFE = re.compile(r'[<>:"/\\|?*\x00-\x1f\x7f]+')


@dataclass(frozen=True)
class Annotation:
    """One row: its columns, of which ``file_name`` is relative to the folder."""

    id: str
    data: Mapping[str, Any]

    @cached_property
    def version(self) -> str:
        """Differs between two contents of a row."""
        known = {key: value for key, value in self.data.items() if key != "id"}
        text = json.dumps(known, sort_keys=True, ensure_ascii=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    def column(self, role: str) -> str:
        """The column that has the role."""
        return column_of(OWN, role, Record(dict(self.data), self.id))

    def text(self, role: str) -> str:
        """The text of a role; several answers are lines. Empty without any."""
        value = self.data.get(self.column(role))
        if isinstance(value, list):
            return "\n".join(map(str, value))
        return "" if value is None else str(value).strip()

    @property
    def images(self) -> tuple[str, ...]:
        """The images that the row is about."""
        value = self.data.get(self.column("image"))
        names = value if isinstance(value, list) else [value or ""]
        return tuple(map(str, names)) or ("",)


class Conflict(ValueError):
    """The row was changed by others; ``current`` is what it is now, None if it was removed."""

    def __init__(self, current: Annotation | None) -> None:
        super().__init__("this text was changed elsewhere meanwhile; choose which one to keep")
        self.current = current


class Project:
    """The folder ``root``, which exists and is writable; ``out`` and ``out-2``, ... are those that
    runs write, and may be in it. Methods may be called from several threads."""

    def __init__(self, root: Path, out: Path) -> None:
        self.root, self.out = root.resolve(), out.resolve()
        self._working = threading.RLock()
        self._seen: Any = None
        self._rows: list[Annotation] = []
        for folder in self._table_folders:
            recover(folder, earlier=False)
        self.annotations()  # raises what is wrong with the folder

    @property
    def private(self) -> Path:
        return self.root / PRIVATE

    @cached_property
    def split_folders(self) -> dict[str, Path]:
        """The folders of the splits, as `tune` reads them; empty for a folder that is not split
        into such."""
        return self._find_split_folders()

    def _find_split_folders(self) -> dict[str, Path]:
        folders = {split: folder_of_split(self.root, split) for split in SPLITS}
        if folders["train"] == self.root:
            return {}
        return {split: folder for split, folder in folders.items() if folder is not None}

    @property
    def _table_folders(self) -> list[Path]:
        return [*self.split_folders.values()] or [self.root]

    def images(self) -> list[str]:
        """The images below the folder, without those that runs wrote."""
        files = (path for folder in self._table_folders for path in walk_files(folder))
        paths = (path.relative_to(self.root) for path in files)
        return [
            path.as_posix()
            for path in paths
            if path.suffix.lower() in IMAGE_SUFFIXES
            and not any(part.startswith(".") for part in path.parts)
            and not self._is_of_run(self.root / path)
        ]

    def _is_of_run(self, path: Path) -> bool:
        if not path.is_relative_to(self.out.parent):
            return False
        name = path.relative_to(self.out.parent).parts[0]
        return re.fullmatch(rf"{re.escape(self.out.name)}(-\d+)?", name) is not None

    def path_of(self, name: str) -> Path:
        """The file of an image. FileNotFoundError if there is none; ValueError if it is not below
        the folder."""
        path = self.root / image_name(name, "picture")
        if path.suffix.lower() not in IMAGE_SUFFIXES or not path.is_file():
            raise FileNotFoundError(f"there is no picture {name[:200]!r}")
        if not path.resolve().is_relative_to(self.root):
            raise ValueError(f"{name[:200]!r} leads out of the folder")
        return path

    def annotations(self) -> list[Annotation]:
        """All rows, as the files are now. Raises ValueError, naming the place, for files that
        `tune` cannot read."""
        with self._working:
            seen = [_state(path) for path in self._tables()]
            if seen != self._seen:
                self._rows, self._seen = self._read(), seen
            return list(self._rows)

    def _tables(self) -> list[Path]:
        folders = self._table_folders
        found = [path for folder in folders for path in walk_files(folder) if is_metadata(path)]
        return [self._unanswered, *({path: None for path in (*self._own_tables(), *found)})]

    def _own_tables(self) -> list[Path]:
        """The tables that are written."""
        return [folder / TABLE for folder in self._table_folders]

    @property
    def _unanswered(self) -> Path:
        return self.private / "unanswered.jsonl"

    def _read(self) -> list[Annotation]:
        rows = [*self._answered_rows(), *read_json_lines(self._unanswered)]
        ids = Counter(str(row.get("id", "")) for row in rows)
        names = [f"{row.get('id')} {Annotation('', row).images[0]}" for row in rows]
        named = Counter(names)
        made: dict[str, Annotation] = {}
        for number, row in enumerate(rows):
            known = str(row.get("id", ""))
            if ids[known] > 1:  # each table of a split may count from 0
                known = names[number] if known and named[names[number]] == 1 else ""
            one = Annotation(known or f"row {number}", row)
            if one.text("answer") or one.text("question"):
                made.setdefault(one.id, one)
        return list(made.values())

    def _answered_rows(self) -> list[dict[str, Any]]:
        folders = self.split_folders
        if folders != self._find_split_folders():
            raise ValueError(
                f"folders of splits were added to {self.root}, or removed; end the studio with "
                "Ctrl-C, and start it again"
            )
        self._refuse_half_split()
        read, _ = FORMATS["imagefolder"]
        parts = {split: list(read(OWN, self.root, split)) for split in SPLITS}
        places = [[_place(row) for row in part] for part in parts.values()]
        given = not folders and any(each != places[0] for each in places)  # by the names of tables
        rows = []
        for split, part in parts.items() if given or folders else [("train", parts["train"])]:
            for row in part:
                if isinstance(row, ValueError):
                    raise row
                data = self._below_root(row)
                if folders:
                    self._refuse_elsewhere(row, data, folders[split])
                elif given and spelling("split", row.record) is None:
                    data["split"] = split
                rows.append(data)
        return rows

    def _refuse_half_split(self) -> None:
        others = [folder_of_split(self.root, split) for split in ("val", "test")]
        held = next((one for one in others if one not in (None, self.root)), None)
        if held is not None and not self.split_folders:
            raise ValueError(
                f"{self.root} has a folder {held.name} and none called train; move the other "
                f"pictures into a folder train beside it, or rename {held.name}"
            )

    def _refuse_elsewhere(self, row: Row, data: Mapping[str, Any], folder: Path) -> None:
        """ValueError for a row of a split that is not about an image below its folder."""
        names = Annotation("", data).images
        if not all((self.root / name).is_relative_to(folder) for name in names):
            raise ValueError(
                f"{row.record.where}: the image is {', '.join(names)!r}; expected one below "
                f"{folder}, where the row is; repair the row"
            )

    def _below_root(self, row: Row) -> dict[str, Any]:
        data = dict(row.record.data)
        column = column_of(OWN, "image", row.record)
        value = images_in_cell(data.get(column), self.root / row.folder)
        names = [str(name) for name in value] if isinstance(value, list | tuple) else [value]
        named = [self._name_below_root(str(name), row.folder) for name in names if name]
        if named:
            data[column] = named[0] if len(named) == 1 else named
        return data

    def _name_below_root(self, name: str, folder: str) -> str:
        if Path(name).is_relative_to(self.root):  # an absolute path
            return Path(name).relative_to(self.root).as_posix()
        return name if folder in ("", ".") else f"{folder}/{name}"

    def folder_of(self, image: str) -> Path:
        """The folder whose table has the rows about an image. ValueError for an image that is in no
        folder of a split, where there are such."""
        split = self._split_by_folder(image)
        if self.split_folders and not split:
            names = ", ".join(str(folder) for folder in self.split_folders.values())
            raise ValueError(f"{image[:200]!r} is in none of the folders {names}")
        return self.split_folders.get(split, self.root)

    def _split_by_folder(self, image: str) -> str:
        path, folders = self.root / image, self.split_folders.items()
        return next((split for split, folder in folders if path.is_relative_to(folder)), "")

    def split_of(self, image: str, rows: Sequence[Annotation]) -> str:
        """The split of an image, by its folder or the column of its rows; empty without one."""
        named = (split_named(row.text("split")) for row in rows)
        return self._split_by_folder(image) or next(filter(None, named), "")

    def answered_lines(self) -> list[str]:
        """The lines of the tables that `tune` reads."""
        lines = self._lines(self.annotations())
        return [line for path in self._own_tables() for line in lines[path]]

    def save(
        self, image: str, question: str, answer: str, id: str = "", version: str = ""
    ) -> Annotation | None:
        """Write the texts of a row, on the disk when this returns; a new row without an ``id``.

        Returns the row, None if both texts are empty, which removes it. Raises Conflict if the row
        has another ``version``, which is empty for a new one, or if a new one asks what another row
        answers differently; and what `path_of` raises for a new row, while the image of a known row
        may be missing.
        """
        with self._working:
            rows = self.annotations()
            question, answer = _clean(question), _clean(answer)
            asked = (image,), question
            at = next(
                (i for i, r in enumerate(rows) if r.id == id or (not id and _asks(r) == asked)),
                None,
            )
            current = None if at is None else rows[at]
            if id and version != ("" if current is None else current.version):
                raise Conflict(current)
            if not id and current and current.text("answer") not in ("", answer):
                raise Conflict(current)
            if current is None:
                self.path_of(image)
            row = current or self._new_row(rows, image)
            row = _with_texts(row, question, answer)
            made = row if question or answer else None
            if at is None:
                rows += [made] if made else []
            else:
                rows[at : at + 1] = [made] if made else []
            self._write(rows, bool(answer))
            return made

    def _new_row(self, rows: list[Annotation], image: str) -> Annotation:
        known = {row.id for row in rows}
        number = next(n for n in range(len(rows) + 1, 2 * len(rows) + 3) if f"s{n}" not in known)
        data: dict[str, Any] = {"id": f"s{number}", "file_name": image}
        self.folder_of(image)  # raises
        split = self._split_by_folder(image)
        first = next((row for row in rows if self._split_by_folder(row.images[0]) == split), None)
        if first and (column := spelling("split", Record(dict(first.data), first.id))):
            data[column] = split or "train"  # in every row or in none
        return Annotation(f"s{number}", data)

    def settle(self) -> None:
        """Make ``metadata.jsonl`` what `tune` reads, also of a folder that nobody has changed."""
        with self._working:
            self._write(self.annotations(), True)

    def _write(self, rows: list[Annotation], answered_first: bool) -> None:
        texts = {path: "".join(lines) for path, lines in self._lines(rows).items()}
        waiting, tables = self._unanswered, self._own_tables()
        for table in tables:
            if table.is_file() and not waiting.is_file():  # the user's, before the first change
                write_text(table.with_name(f"{TABLE}.before"), table.read_text(encoding="utf-8"))
        # a row that a crash finds on its way is in both files, and never in none
        for path in [*tables, waiting] if answered_first else [waiting, *tables]:
            if not path.is_file() or path.read_text(encoding="utf-8") != texts[path]:
                write_text(path, texts[path])
        for path in self._tables()[1:]:
            if path not in tables:
                set_aside(path, f"{path.suffix}.before")

    def _lines(self, rows: Sequence[Annotation]) -> dict[Path, list[str]]:
        lines: dict[Path, list[str]] = {
            path: [] for path in (*self._own_tables(), self._unanswered)
        }
        for row in rows:
            data, path = {"id": row.id, **row.data}, self._unanswered
            if row.text("answer"):
                folder = self.folder_of(row.images[0])
                path = folder / TABLE
                if folder != self.root:
                    data = _below(data, row, f"{folder.relative_to(self.root).as_posix()}/")
            lines[path].append(json.dumps(data, ensure_ascii=False) + "\n")
        return lines

    def add_image(self, name: str, data: bytes) -> tuple[str, bool]:
        """Store an image that was decoded before. Returns its name, and whether it is new: an image
        with the same bytes is not stored twice. The name keeps a suffix that fits the format, and
        gets a number if it is taken."""
        kind = next((MAGIC[start] for start in MAGIC if data.startswith(start)), None)
        if kind is None:
            raise ValueError(f"not an image; expected one of {', '.join(SUFFIXES)}")
        with self._working:
            for other in self.images():
                path = self.root / other
                if path.stat().st_size == len(data) and path.read_bytes() == data:
                    return other, False
            stem, given = safe_name(name), Path(name).suffix
            suffix = given if given.lower() in SUFFIXES[kind] else SUFFIXES[kind][0]
            folder = self._table_folders[0]
            taken = {path.name.casefold() for path in folder.iterdir()}
            stems = (stem if n == 1 else f"{stem}-{n}" for n in range(1, len(taken) + 2))
            free = next(f"{s}{suffix}" for s in stems if f"{s}{suffix}".casefold() not in taken)
            with replacing(folder / free) as temporary:
                temporary.write_bytes(data)
            return (folder / free).relative_to(self.root).as_posix(), True


def safe_name(name: str) -> str:
    """The name of a file without its folders and its suffix, of characters that every system and
    `tune` take."""
    last = unicodedata.normalize("NFC", name).replace("\\", "/").rsplit("/", 1)[-1]
    stem = last.rpartition(".")[0] or last
    plain = _UNSAFE.sub("_", "".join(c for c in stem if unicodedata.category(c)[0] != "C"))
    short = plain.encode(errors="ignore")[:_MOST_NAME].decode(errors="ignore")
    return short.strip(" .") or "picture"


@contextmanager
def opened(root: Path, out: Path) -> Iterator[Project]:
    """The project of a folder, which is created, for one studio at a time. Raises ValueError, in
    plain words, where another one is open, files cannot be written or cannot be read."""
    lock = root / PRIVATE / "lock"
    with ExitStack() as stack:
        try:
            root.mkdir(exist_ok=True)
            if is_locked(lock):
                raise ValueError(
                    f"another studio is open on {root}: use its page, or end it with Ctrl-C first"
                )
            stack.enter_context(locked(lock, wait=False))
            project = Project(root, out)
        except (FileNotFoundError, FileExistsError, NotADirectoryError):
            raise ValueError(
                f"{root} is not a folder, nor can one be made there; give the folder of your "
                "pictures"
            ) from None
        except PermissionError as error:
            raise _not_writable(root, error) from None
        except OSError as error:
            if error.errno != errno.EROFS:
                raise
            raise _not_writable(root, error) from None
        yield project


def _not_writable(root: Path, error: OSError) -> ValueError:
    return ValueError(
        f"{root} may not be written by you ({error.strerror}), and the studio keeps pictures and "
        "answers there: choose another folder, or change its permissions"
    )


def _below(data: dict[str, Any], row: Annotation, prefix: str) -> dict[str, Any]:
    """The columns of a row with its images relative to the folder of its table."""
    names = [name.removeprefix(prefix) for name in row.images]
    return {**data, row.column("image"): names[0] if len(names) == 1 else names}


def _with_texts(row: Annotation, question: str, answer: str) -> Annotation:
    """The row with other texts, in the columns that had them."""
    data = dict(row.data)
    if question or row.text("question"):
        data[row.column("question")] = question
    asked = Annotation(row.id, data)
    column = asked.column("answer")
    if spelling(column, Record(data, row.id)) is None and not question:
        column = "caption"
    several = isinstance(data.get(column), list)
    data[column] = answer.split("\n") if several and "\n" in answer else answer
    return replace(row, data={key: value for key, value in data.items() if value != ""})


def _asks(row: Annotation) -> tuple[tuple[str, ...], str]:
    return row.images, row.text("question")


def _clean(text: str) -> str:
    """Without control characters and halves of surrogate pairs, which JSON lets pass."""
    kept = (c for c in text if c == "\n" or unicodedata.category(c) not in ("Cc", "Cs"))
    return "".join(kept).strip()


def _place(row: Row | ValueError) -> str:
    return str(row) if isinstance(row, ValueError) else row.record.where


def _state(path: Path) -> Any:
    try:
        status = path.stat()
    except FileNotFoundError:
        return None
    return status.st_ino, status.st_mtime_ns, status.st_size
