"""Custom data, described in the recipe and read without code.

==============  ===========================================================================
llava_json      dialogues in .json or .jsonl, or in a .parquet that ``path`` names, in any form
                that `dialogues` reads
sharegpt        the same
openai_messages the same
table           .jsonl, .json, .csv, .tsv or .parquet with one example a row (``columns``)
imagefolder     images with ``metadata.csv`` / ``metadata.jsonl`` (column ``file_name``), with a
                ``.txt`` of the same name (one caption a line), or in folders that are the labels
hf_dataset      a data set that Hugging Face ``datasets`` saved with ``save_to_disk`` (``columns``)
webdataset      .tar shards of ``key.jpg`` with ``key.txt`` (captions) or ``key.json`` (``columns``)
==============  ===========================================================================

"""

import hashlib
import inspect
import itertools
import re
import warnings
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from instructblip.core.example import Example
from instructblip.core.user_code import find_function, is_function
from instructblip.data.custom.dialogues import dialogue
from instructblip.data.custom.rows import (
    ROLES,
    CustomSet,
    Row,
    examples_of,
    group_errors_once,
    rows_of_split,
    spelling,
)
from instructblip.data.reading.opened import note_file
from instructblip.data.reading.records import (
    IMAGE_SUFFIXES,
    Record,
    Source,
    check_object,
    list_folder,
    not_utf8,
    read_json,
    read_table,
    try_lines,
    walk_files,
)
from instructblip.data.reading.shards import read_parquet, read_saved, read_shard
from instructblip.data.reading.splits import SPLITS, files_of_split, first_folder, split_of_file
from instructblip.data.templates import language_of

TABLES: dict[str, Callable[[Path], Iterator[tuple[str, Record | ValueError]]]] = {
    ".jsonl": try_lines,
    ".json": read_json,
    ".csv": read_table,
    ".tsv": partial(read_table, delimiter="\t"),
    ".parquet": read_parquet,
}
"""What reads (key, record) of the rows of a table, or a row's error in its place, by suffix."""

_LANGUAGE = re.compile(r"([A-Za-z]{2,3}(?:[_@-]\w+)?)\.utf8=")
"""Begins a caption that names its language."""
_GROUP = re.compile(
    r"(patient|subject|participant|person|study|case|session|visit|recording|series|specimen|animal)"
    r"[ _-]?(id|uid|no|nr|number|name|key|code)?"
)
"""Headings of columns whose equal values may belong together."""
MOST_HINTED = 10_000
"""Rows that `group_column` reads."""
LABEL_QUESTION = {"en": "What is in this image?", "zh": "这张图片里是什么？"}
"""Question about an image whose folder is its label, by the language of the labels."""
MOST_LABELS = 20
"""Labels that are listed with the number of their images."""


def custom_source(custom: CustomSet) -> Source:
    """The source of a custom data set; ValueError for an unknown format or role."""
    if custom.format not in FORMATS and not is_function(custom.format):
        raise ValueError(f"format '{custom.format}'; expected one of {', '.join(FORMATS)}")
    if unknown := [role for role, _ in custom.columns if role not in ROLES]:
        raise ValueError(f"{custom.name}: columns {unknown}; expected some of {', '.join(ROLES)}")
    files = custom.path or f"the files of a {custom.format}"
    # Compared with the manifests of data prepared earlier, which name the class as it was then.
    settings = repr(custom).replace("CustomSet", "Own", 1) + ", by split"
    if custom.group is not None:
        settings += f" and group {custom.group!r}"
    if custom.format in ("imagefolder", "webdataset") and custom.language != "en":
        settings += f" language={custom.language}"
    if FORMATS.get(custom.format, (None, None))[1] is _dialogues and custom.task is None:
        settings += ", tasks by length"
    if is_function(custom.format):
        file = Path(inspect.getfile(find_function(custom.format)))
        settings += f" {hashlib.sha256(file.read_bytes()).hexdigest()}"
    read = partial(read_custom, custom)
    images = "." if custom.format == "webdataset" else custom.images
    return Source(read, custom.task or "", "your own", files, images, settings)


def read_custom(custom: CustomSet, root: Path, split: str) -> Iterator[Example | ValueError]:
    """The examples of a split of custom data, or the error of a row in their place."""
    read, to_examples = FORMATS.get(custom.format, (_user_rows, examples_of))
    rows = rows_of_split(custom, split, read(custom, root, split))
    return group_errors_once(custom, to_examples(custom, root, split, rows))


def _user_rows(custom: CustomSet, root: Path, split: str) -> Iterator[Row]:
    """The rows that a function of the user yields for (root, split): dicts with the columns of a
    table. Data are read again when its file or a file below the root that is no image changes."""
    for path in walk_files(root):
        if path.suffix.lower() not in IMAGE_SUFFIXES:
            note_file(path)
    for i, row in enumerate(find_function(custom.format)(root, split)):
        where = f"{custom.format}:row {i}"
        yield Row(str(i), Record(check_object(row, where), where))


class GroupColumn(NamedTuple):
    """A column that looks like a group, such as a patient: how many values it has in how many
    rows."""

    heading: str
    values: int
    rows: int

    def describe(self, name: str) -> str:
        """The line about it for the data set ``name``."""
        return (
            f"{name}: column {self.heading!r} looks like a group, with {self.values} values in "
            f"{self.rows} rows; `--group {self.heading}` of tune, or `group: {self.heading}` in a "
            "recipe, lets no value be on two sides of a split"
        )


def group_column(custom: CustomSet, root: Path, split: str) -> GroupColumn | None:
    """The column that looks like a group: by its heading, and since rows share values; None without
    one."""
    rows = itertools.islice(_rows_again(custom, root, split), MOST_HINTED)
    records = (row.record for row in rows if isinstance(row, Row))
    if (first := next(records, None)) is None:
        return None
    headings = [c for c in first.data if _GROUP.fullmatch(c.strip().casefold())]
    counts: dict[str, Counter[str]] = {heading: Counter() for heading in headings}
    for record in itertools.chain([first], records) if headings else ():
        for heading, count in counts.items():
            count[str(record.data.get(heading))] += 1
    for heading, count in counts.items():
        if 1 < len(count) < count.total():
            return GroupColumn(heading, len(count), count.total())
    return None


def _rows_again(custom: CustomSet, root: Path, split: str) -> Iterator[Row | ValueError]:
    """The rows of data that were read before, without the warnings that there were then."""
    read, _ = FORMATS.get(custom.format, (_user_rows, examples_of))
    rows = read(custom, root, split)
    while True:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            row = next(rows, None)
        if row is None:
            return
        yield row


def has_split_column(root: Path) -> bool:
    """Whether the table of an imagefolder has a column ``split``."""
    rows = _rows_again(CustomSet("own", "imagefolder"), root, "train")
    row = next((row for row in rows if isinstance(row, Row)), None)
    return row is not None and spelling("split", row.record) is not None


def _files_of(custom: CustomSet, root: Path, split: str, suffixes: Collection[str]) -> list[Path]:
    """The files that match ``custom.path``, or without it all of the split (``files_of_split``)
    that have one of the suffixes."""
    pattern = _below_root(custom.path or "*").replace("{split}", split)
    files = [path for path in _matching_files(root, pattern) if path.suffix.lower() in suffixes]
    if files and custom.path is None and not (files := files_of_split(files, split)):
        raise FileNotFoundError(
            f"{custom.name}: a file in {root} is named for training and none for the split "
            f"{split}; name one so, or set `path` of the recipe's entry"
        )
    if not files:
        raise FileNotFoundError(
            f"{custom.name}: no {' or '.join(suffixes)} file matches {pattern} in {root}; set "
            "`path` of the recipe's entry to the file, or to a pattern with * or {split}"
        )
    return files


def _below_root(pattern: str) -> str:
    """``pattern``; ValueError if it leaves the data root."""
    if PurePosixPath(pattern).is_absolute() or ".." in PurePosixPath(pattern).parts:
        raise ValueError(f"path {pattern!r} leaves the data root; expected a path below it")
    return pattern


def rows_of(path: Path, folder: str = "") -> Iterator[Row | ValueError]:
    """Each row of a table or value of a JSON file, whose image paths are relative to ``folder``
    below the image root; or its error in its place."""
    note_file(path)
    for key, record in TABLES[path.suffix.lower()](path):
        yield record if isinstance(record, ValueError) else Row(key, record, folder)


def _matching_files(folder: Path, pattern: str) -> list[Path]:
    """The files below ``folder`` that match a pattern, sorted; ValueError for a folder on the way
    that cannot be read."""
    parts = pattern.split("/")
    for depth in range(len(parts)):
        for parent in folder.glob("/".join(parts[:depth])) if depth else [folder]:
            if parent.is_dir():
                list_folder(parent)
    return sorted(path for path in folder.glob(pattern) if path.is_file())


def _dialogues(
    custom: CustomSet, root: Path, split: str, rows: Iterable[Row | ValueError]
) -> Iterator[Example | ValueError]:
    """The examples of each dialogue; answers that see no image are counted in a warning."""
    blind = []
    for row in rows:
        if isinstance(row, ValueError):
            yield row
            continue
        try:
            for example in dialogue(custom, root / custom.images, split, row.key, row.record):
                if example.images:
                    yield example
                else:
                    blind.append(example.where)
        except ValueError as error:
            yield error
    if blind:
        warnings.warn(
            f"{custom.name}: answers without an image before them: {len(blind)}, skipped: "
            f"{', '.join(blind[:5])}",
            stacklevel=2,
        )


def _json_rows(custom: CustomSet, root: Path, split: str) -> Iterator[Row | ValueError]:
    suffixes = (".json", ".jsonl", ".parquet") if custom.path else (".json", ".jsonl")
    for path in _files_of(custom, root, split, suffixes):
        yield from rows_of(path)


def _table_rows(custom: CustomSet, root: Path, split: str) -> Iterator[Row | ValueError]:
    for path in _files_of(custom, root, split, TABLES):
        yield from rows_of(path)


def _imagefolder(custom: CustomSet, root: Path, split: str) -> Iterator[Row | ValueError]:
    """Below ``root/<split>`` or ``root/images/<split>`` if there is such a folder, else below
    ``root``: the rows of tables, and captions where no table is in the folder or in one above it. A
    table is called metadata or as its split, or is the only one.
    Where there are tables, an image that none of them covers counts only with a caption. Nothing,
    where only another split has a folder or a table named for it; folders of val and test are no
    training data where training has none."""
    base = root / custom.images
    folder = folder_of_split(base, split)
    if folder is None:
        return
    note_file(folder)
    if folder_of_split(base, "train") != base and any(map(is_metadata, list_folder(base))):
        warnings.warn(
            f"{base}: its table is not read, since its images are in folders of splits; move the "
            "table into them",
            stacklevel=2,
        )
    held_back = _held_back(base) if folder == base and split == "train" else []
    paths = [p for p in walk_files(folder) if not any(map(p.is_relative_to, held_back))]
    listed = [path for path in paths if is_metadata(path)]
    if not listed:  # train.csv, val.csv
        by_name = [p for p in paths if p.suffix.lower() in TABLES and split_of_file(p)]
        if by_name and not (listed := files_of_split(by_name, split)):
            return
    if not listed:
        listed = only_table(folder, paths)
    tables = {path.parent: path for path in listed}
    if len(tables) < len(listed):
        raise ValueError(f"{', '.join(map(str, listed))}: expected one in a folder; remove others")
    for parent, path in tables.items():
        yield from rows_of(path, parent.relative_to(base).as_posix())
    uncovered = [path for path in paths if tables.keys().isdisjoint(path.parents)]
    texts = {path.with_suffix(""): path for path in uncovered if path.suffix.lower() == ".txt"}
    images = [path for path in uncovered if path.suffix.lower() in IMAGE_SUFFIXES]
    _warn_of_texts_alone(folder, texts, {path.with_suffix("") for path in images})
    labels = {} if tables or texts else _folder_labels(folder, images)
    training = folder_of_split(base, "train") or base
    if len(labels) > 1 or (training != folder and any((training / n).is_dir() for n in labels)):
        _state_labels(folder, labels)
        yield from _labelled(custom, base, labels)
        return
    captioner = _Captions(custom)
    for path in images:
        text = texts.get(path.with_suffix(""))
        if tables and text is None:
            continue
        captions = captioner.read(_read_caption(text)) if text else []
        if captions is None:
            continue
        name = str(path.relative_to(base))
        parent = path.parent.relative_to(base).as_posix()
        yield Row(name, _captioned(custom, (path.name,), captions, name), parent)
    captioner.warn(folder)


def _folder_labels(folder: Path, images: Iterable[Path]) -> dict[str, list[Path]]:
    """The images of each folder in ``folder``, whose name is their label, by this name. Empty where
    an image is in ``folder`` itself. Hidden folders have no images."""
    labels: dict[str, list[Path]] = {}
    for path in images:
        name, *inner = path.relative_to(folder).parts
        if inner and name.startswith((".", "__")):
            continue
        labels.setdefault(name if inner else "", []).append(path)
    return {} if "" in labels else labels


def _state_labels(folder: Path, labels: dict[str, list[Path]]) -> None:
    """Warns that folders are labels, with the images of each, and of folders without any."""
    counts = [f"{name} {len(paths)}" for name, paths in labels.items()]
    more = f" and {len(counts) - MOST_LABELS} more" if len(counts) > MOST_LABELS else ""
    inner = [path for path in list_folder(folder) if path.is_dir()]
    empty = [p.name for p in inner if p.name not in labels and not p.name.startswith((".", "__"))]
    skipped = f"; without an image, skipped: {', '.join(empty[:5])}" if empty else ""
    listed = f"{', '.join(counts[:MOST_LABELS])}{more}{skipped}"
    warnings.warn(f"{folder}: folders are read as labels: {listed}", stacklevel=2)


def _labelled(custom: CustomSet, base: Path, labels: dict[str, list[Path]]) -> Iterator[Row]:
    """A row of each image, with what it shows as its question and its folder's name as the answer,
    under the column names of the recipe's entry."""
    columns = dict(custom.columns)
    image, question, answer = (columns.get(n, n) for n in ("image", "question", "answer"))
    asked = LABEL_QUESTION[language_of(labels)]
    for label, paths in labels.items():
        text = " ".join(re.split(r"[_\-\s]+", label)).strip() or label
        for path in paths:
            note_file(path.parent)
            name = path.relative_to(base)
            record = Record({image: [path.name], question: asked, answer: text}, str(name))
            yield Row(str(name), record, name.parent.as_posix())


def is_metadata(path: Path) -> bool:
    """Whether a file is the table of an imagefolder."""
    return path.stem.lower() == "metadata" and path.suffix.lower() in TABLES


def only_table(folder: Path, paths: Sequence[Path]) -> list[Path]:
    """The one table of ``folder`` itself, whatever its name, where no image has a text beside it.

    Raises ValueError for several, since nothing says which one to read.
    """
    tables = [path for path in paths if path.parent == folder and path.suffix.lower() in TABLES]
    texts = {path.with_suffix("") for path in paths if path.suffix.lower() == ".txt"}
    if any(p.suffix.lower() in IMAGE_SUFFIXES and p.with_suffix("") in texts for p in paths):
        return []
    if len(tables) > 1:
        names = ", ".join(path.name for path in tables)
        raise ValueError(
            f"{folder} holds several tables ({names}) and none is called metadata; rename the one "
            f"that lists the images to metadata{tables[0].suffix}"
        )
    return tables


def folder_of_split(base: Path, split: str) -> Path | None:
    """Where the images of a split are, None if only other splits have a folder; training then has
    all other files. A table in ``base`` itself covers all below it."""
    has_table = base.is_dir() and any(map(is_metadata, list_folder(base)))
    parents = [base] if has_table else [base, base / "images"]
    others = (first_folder(other, parents) for other in SPLITS if other != split)
    return first_folder(split, parents) or (None if split != "train" and any(others) else base)


def _held_back(base: Path) -> list[Path]:
    """The folders of validation and test."""
    found = (first_folder(split, [base, base / "images"]) for split in ("val", "test"))
    return [path for path in found if path is not None]


def _warn_of_texts_alone(folder: Path, texts: dict[Path, Path], images: set[Path]) -> None:
    """Texts without an image of the same name, which may be there in another format."""
    alone = [str(path.relative_to(folder)) for name, path in texts.items() if name not in images]
    if alone:
        warnings.warn(
            f"{folder}: {len(alone)} .txt files have no image of that name beside them that can "
            f"be read, and are skipped: {', '.join(alone[:5])}; if they are captions, save "
            "their images as .png or .jpg",
            stacklevel=2,
        )


def _hf_dataset(custom: CustomSet, root: Path, split: str) -> Iterator[Row]:
    """The split of that name in a saved ``DatasetDict``, or a saved ``Dataset``."""
    folder = root / _below_root(custom.path or ".")
    note_file(folder)
    return itertools.starmap(Row, read_saved(folder, split))


def _webdataset(custom: CustomSet, root: Path, split: str) -> Iterator[Row]:
    """Every .tar that ``path`` names (``train-*.tar``)."""
    captioner = _Captions(custom)
    for path in _files_of(custom, root, split, (".tar",)):
        note_file(path)
        for key, parts, where in read_shard(path, path.relative_to(root).as_posix()):
            images = tuple(parts[suffix] for suffix in IMAGE_SUFFIXES if suffix in parts)[:1]
            if ".json" in parts and ".txt" not in parts:
                column = dict(custom.columns).get("image", "image")
                record = Record({**parts[".json"], column: images}, where)
            else:
                captions = captioner.read(parts.get(".txt", ""))
                if captions is None:
                    continue
                record = _captioned(custom, images, captions, where)
            yield Row(key, record)
    captioner.warn(root)


def _captioned(
    custom: CustomSet, images: tuple[str, ...], captions: list[str], where: str
) -> Record:
    """A row of an image with its captions, under the column names of the recipe's entry."""
    columns = dict(custom.columns)
    image, answer = columns.get("image", "image"), columns.get("answer", "answer")
    return Record({image: list(images), answer: captions}, where)


def _read_caption(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path.name} {not_utf8(path, error)}") from None


class _Captions:
    """Captions in one language of texts that may have several.

    A line ``de.utf8=Ein Frosch.`` is German; where there is such a line, those without are English
    (the form of Tux Paint's stamps).
    """

    def __init__(self, custom: CustomSet) -> None:
        self.name, self.language = custom.name, custom.language
        self.others: set[str] = set()
        self.missing = 0

    def read(self, text: str) -> list[str] | None:
        """The captions, one a line; None where all are in other languages."""
        lines = [line.strip() for line in text.split("\n") if line.strip()]
        marked = {
            match[1]: line[match.end() :].strip()
            for line in lines
            if (match := _LANGUAGE.match(line))
        }
        if not marked:
            return lines
        plain = [line for line in lines if not _LANGUAGE.match(line)]
        codes = [code for code in sorted(marked) if re.split("[_@-]", code)[0] == self.language]
        chosen = plain if self.language == "en" and plain else [marked[c] for c in codes[:1]]
        self.others |= marked.keys() - set(codes)
        self.missing += not any(chosen)
        return [caption for caption in chosen if caption] or None

    def warn(self, folder: Path) -> None:
        """States which language was read, once all texts are."""
        if self.others:
            others = ", ".join(sorted(self.others)[:9])
            skipped = f", and {self.missing} images have none" if self.missing else ""
            warnings.warn(
                f"{folder}: captions in several languages (also {others}): those in "
                f"{self.language!r} are read{skipped}; data.sets.{self.name}.language=zh or en "
                "chooses",
                stacklevel=2,
            )


FORMATS = {
    "llava_json": (_json_rows, _dialogues),
    "sharegpt": (_json_rows, _dialogues),
    "openai_messages": (_json_rows, _dialogues),
    "table": (_table_rows, examples_of),
    "imagefolder": (_imagefolder, examples_of),
    "hf_dataset": (_hf_dataset, examples_of),
    "webdataset": (_webdataset, examples_of),
}
"""By format: what reads rows of (entry, root, split), and what makes examples of them."""
