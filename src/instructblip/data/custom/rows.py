"""Rows of custom data -> examples: what each column means, and errors where that is unclear."""

import base64
import hashlib
import math
import os.path
import posixpath
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from instructblip.core.example import Example
from instructblip.core.files import parse_json, replacing
from instructblip.data.reading.frames import VIDEO_SUFFIXES, evenly_spaced, extract_frames
from instructblip.data.reading.records import (
    IMAGE_SUFFIXES,
    Record,
    image_name,
    list_folder,
    local_path,
)
from instructblip.data.reading.splits import SPLITS, split_named
from instructblip.data.templates import TEMPLATES

REMEDY = "Repair the row, or the entry of the recipe that says how it is read"
"""Ends the error messages about a record of custom data."""

ROLES: dict[str, tuple[str, ...]] = {
    "id": (),
    "image": ("file_name", "images", "video", "videos", "filename", "image_path"),
    "question": ("instruction", "query", "prompt"),
    "answer": ("caption", "text", "response", "output", "label"),
    "choices": (),
    "context": ("system", "system_prompt"),
    "ocr_tokens": (),
    "split": (),
    "task": (),
    "rejected": (),
}
"""What a column can hold, with the other names that are accepted for it."""

CAPTIONS = ("caption", "text")
"""Columns whose text may stand without a question."""
LONG_ANSWER, LONG_CAPTION = 12, 40
"""Words from which an answer to a question, or a text without one, is long: its task is then
``instruct``, whose templates ask for no short answer."""
DETAIL = {"en": "Describe the image in detail.", "zh": "请详细描述这张图片。"}
"""Question of a long text that has none, by its language."""
_CHINESE = re.compile("[\u3400-\u9fff]")
VIDEO_FRAMES = 4
"""Evenly spaced frames that stand for a video, as in the paper."""

_ASKING = re.compile(r"(?<![a-z])(questions?|query|prompt|ask|frage|pregunta)(?![a-z])|问题|提问")
"""Words of a heading that promise questions."""
_QUESTION_ENDS = ("?", "？", "=", "＝", ":", "：")
_BASE64 = re.compile(r"[\w+/-]{12,}={1,2}", re.ASCII)
"""An identifier or a digest, whose final ``=`` does not make it a question."""


@dataclass(frozen=True, slots=True)
class CustomSet:
    """One custom data set of the recipe: its files, their images, the meaning of their columns."""

    name: str
    format: str
    path: str | None = None
    images: str = "."
    columns: tuple[tuple[str, str], ...] = ()
    task: str | None = None
    group: str | None = field(default=None, repr=False)
    """A column, or a regular expression whose parentheses find the group in an image's path."""
    language: str = field(default="en", repr=False)
    """Of the captions that are read, where a text has several."""


class Row(NamedTuple):
    """One row; its image paths are relative to ``folder`` below the image root."""

    key: str
    record: Record
    folder: str = ""


def column_of(custom: CustomSet, role: str, record: Record) -> str:
    """The column of a role: the recipe's, else the first accepted name whose column is not empty.

    Where a row has a question, an ``answer`` column that is there but empty is not replaced by a
    caption.
    """
    named = dict(custom.columns).get(role)
    names = (named,) if named else (role, *ROLES[role])
    columns = [column for name in names if (column := spelling(name, record)) is not None]
    if role == "answer" and spelling(role, record):
        question = column_of(custom, "question", record)
        columns = columns[:1] if _filled(record, question) else columns
    return next((column for column in columns if _filled(record, column)), names[0])


def spelling(name: str, record: Record) -> str | None:
    """The row's spelling of the column ``name``, or None: case and white space around it do not
    matter. ValueError where two columns match."""
    if name in record.data:
        return name
    columns = [column for column in record.data if _folded(column) == _folded(name)]
    if len(columns) > 1:
        raise ValueError(f"{record.where}: columns {columns} have one name; rename all but one")
    return columns[0] if columns else None


def _folded(name: str) -> str:
    return name.strip().casefold()


def _filled(record: Record, column: str) -> bool:
    """Whether a column exists and is not empty. 0 and False are values."""
    value = record.data.get(column)
    return not (value is None or value == [] or (isinstance(value, str) and not value.strip()))


def rows_of_split(
    custom: CustomSet, split: str, rows: Iterable[Row | ValueError]
) -> Iterator[Row | ValueError]:
    """The rows whose column ``split`` names ``split``; all rows, where they have no such column.

    Rows with any other name in it, and those without the column where the first row has it or the
    other way round, are errors in every split.
    """
    name = dict(custom.columns).get("split", "split")
    known = ", ".join(names for each in SPLITS.values() for names in each)
    has_column: bool | None = None
    for row in rows:
        if isinstance(row, ValueError):
            yield row
            continue
        key, record, folder = row
        record = replace(record, remedy=REMEDY)
        try:
            record = without_preference(record)
            column = spelling(name, record)
            has_column = bool(column) if has_column is None else has_column
            if has_column != bool(column):
                record.fail(name, "in every row or in none")
            value = str(record.data.get(column)) if column else split
            if (named := split_named(value)) is None:
                record.fail(column or name, f"one of {known}, or rename the column")
        except ValueError as error:
            yield error
            continue
        if named == split:
            yield Row(key, record, folder)


def without_preference(record: Record) -> Record:
    """A row of preference data as one whose answer is the chosen response, with the rejected one as
    the text ``rejected``; any other row as it is.

    TRL writes ``prompt``, ``chosen`` and ``rejected``, as texts or turns, where the prompt may also
    be the beginning of both; LLaMA-Factory a ``chosen`` and a ``rejected`` turn beside
    ``conversations``, or texts beside an ``instruction``; ms-swift ``rejected_response`` beside
    ``messages``.
    """
    data = dict(record.data)
    rejected = data.pop("rejected_response", None) or data.pop("rejected", None)
    if not isinstance(rejected, str | list | dict) or not rejected:
        return record  # perhaps a column of another meaning
    turns = next((n for n in ("messages", "conversations") if isinstance(data.get(n), list)), "")
    prompt, chosen = data.pop("prompt", None), data.pop("chosen", None)
    if isinstance(prompt, list) or (prompt is None and isinstance(chosen, list) and not turns):
        turns, data["messages"] = "messages", chosen[:-1] if prompt is None else prompt
    if turns and chosen:
        last = chosen[-1] if isinstance(chosen, list) else chosen
        last = {"role": "assistant", "content": last} if isinstance(last, str) else last
        data[turns] = [*data[turns], last]
    else:
        data |= {"query": prompt} if prompt else {}
        data |= {"response": chosen} if chosen else {}
    data["rejected"] = _text_of_turn(rejected[-1] if isinstance(rejected, list) else rejected)
    return replace(record, data=data)


def _text_of_turn(turn: Any) -> Any:
    """The text of a turn, or of its parts; what is none is for the reader to refuse."""
    if isinstance(turn, dict):
        turn = turn.get("content", turn.get("value"))
    if isinstance(turn, list):
        return " ".join(str(part.get("text", "")) for part in turn if isinstance(part, dict))
    return turn


class GroupColumnError(ValueError):
    """A row does not have the column that ``group`` names."""


def extra_of(custom: CustomSet, record: Record, images: tuple[str, ...]) -> dict[str, Any]:
    """``{"group": ...}`` where the entry of the recipe names one, else nothing.

    Raises GroupColumnError for a row without the column, and ValueError for one without a group
    in it, or with images of several.
    """
    if custom.group is None:
        return {}
    if column := spelling(custom.group, record):
        if not _filled(record, column):
            record.fail(column, "the group of the row, such as a patient")
        return {"group": str(record.data[column])}
    if "(" not in custom.group:
        listed = ", ".join(map(repr, list(record.data)[:20]))
        raise GroupColumnError(
            f"{record.where}: no column {custom.group!r} for `group`; the columns are {listed}. A "
            "regular expression over the image's path needs parentheses around the group"
        )
    found = [re.search(custom.group, name) for name in images]
    groups = {match[1] for match in found if match and match[1]}
    if len(groups) != 1 or not all(found):
        raise ValueError(
            f"{record.where}: `group` {custom.group!r} finds {sorted(groups) or 'nothing'} in "
            f"{', '.join(images)}; expected one group"
        )
    return {"group": groups.pop()}


def group_errors_once(
    custom: CustomSet, examples: Iterable[Example | ValueError]
) -> Iterator[Example | ValueError]:
    """``examples``, with the errors of rows without the column of ``group`` as one if no row has
    it; raised if there is no other error."""
    lacking: list[GroupColumnError] | None = []  # None once a row has the column
    failed = False
    for each in examples:
        if lacking is not None and isinstance(each, GroupColumnError):
            lacking.append(each)
            continue
        if lacking is not None and isinstance(each, Example):
            yield from lacking
            lacking = None
        failed = failed or isinstance(each, ValueError)
        yield each
    if lacking:
        _, _, reason = str(lacking[0]).partition(": ")
        fault = ValueError(f"{custom.name}: {len(lacking)} rows have {reason}")
        if not failed:
            raise fault
        yield fault


def examples_of(
    custom: CustomSet, root: Path, split: str, rows: Iterable[Row | ValueError]
) -> Iterator[Example | ValueError]:
    """The example of each row, or its error. ValueError for columns that no row has, raised if
    it is the only error."""
    absent = [column for _, column in custom.columns]
    present: dict[str, None] = {}
    digits: dict[str, str] = {}
    failed = False
    for row in rows:
        if isinstance(row, ValueError):
            failed = True
            yield row
            continue
        if absent:
            present |= dict.fromkeys(row.record.data)
            absent = [name for name in absent if spelling(name, row.record) is None]
        try:
            yield _example(custom, root, split, row, digits)
        except ValueError as error:
            failed = True
            yield error
    if absent and present:
        fault = ValueError(
            f"{custom.name}: no row of {custom.path or split} has the columns "
            f"{', '.join(map(repr, absent))} that `columns` names; it has "
            f"{', '.join(map(repr, list(present)[:20]))}"
        )
        if not failed:
            raise fault
        yield fault


def _example(
    custom: CustomSet, root: Path, split: str, row: Row, digits: dict[str, str]
) -> Example:
    record = row.record
    columns = {role: column_of(custom, role, record) for role in ROLES}
    if columns["image"] not in record:
        named = "beside this file" if row.folder else "(see `columns` of the recipe)"
        missing = "file_name" if row.folder else columns["image"]
        record.fail(missing, f"the path of an image {named}")
    question = _text(record, columns["question"])
    choices = _texts(record, columns["choices"], separator="|")
    answers = _answers(record, columns, choices, digits)
    task = custom.task or _task_column(custom, record, columns["task"])
    if task is None and choices:
        task = "multiple_choice"
    elif task is None and question:
        instructs = _folded(columns["question"]) in ROLES["question"]
        task = "instruct" if instructs else asked_task(answers)
    elif task is None:
        if answers:
            _refuse_unread(record, {**columns, "group": custom.group or ""})
        task = "instruct" if _longest(answers) > LONG_CAPTION else "caption"
    if task == "instruct" and not question:
        question = DETAIL["zh" if any(map(_CHINESE.search, answers)) else "en"]
    _refuse_other_forms(record, columns)
    values = images_in_cell(record.data[columns["image"]], root / custom.images / row.folder)
    images = images_of(root / custom.images, values, record.where, row.folder)
    return Example(
        dataset=custom.name,
        split=split,
        id=_text(record, columns["id"]) or row.key,
        images=images,
        task=task,
        question=question,
        answers=answers,
        choices=choices,
        context=_text(record, columns["context"]),
        ocr_tokens=_texts(record, columns["ocr_tokens"], separator="|"),
        where=record.where,
        extra=extra_of(custom, record, images)
        | _system(record, columns["context"])
        | rejected_of(record, columns["rejected"]),
    )


def rejected_of(record: Record, column: str = "rejected") -> dict[str, str]:
    """The rejected response of a row, in the form of ``Example.extra``; nothing without one."""
    filled = isinstance(record.data.get(column), str) and _filled(record, column)
    return {"rejected": record.text(column)} if filled else {}


def asked_task(answers: tuple[str, ...]) -> str:
    """The task of a question: "vqa" where its answers are short, else "instruct"."""
    return "instruct" if _longest(answers) > LONG_ANSWER else "vqa"


def _longest(answers: tuple[str, ...]) -> int:
    """Words of the longest answer."""
    return max(map(_words, answers), default=0)


def _system(record: Record, column: str) -> dict[str, bool]:
    """Whether the context is a system text, in the form of ``Example.extra``."""
    named = _folded(column) in ROLES["context"]
    return {"system": True} if named and _filled(record, column) else {}


def _task_column(custom: CustomSet, record: Record, column: str) -> str | None:
    """The task that a row names. A column ``task`` may have another meaning, so a name that is none
    of the tasks is an error only in the column that the recipe names."""
    task = _folded(_text(record, column)) if column in record else ""
    if task in TEMPLATES:
        return task
    if task and "task" in dict(custom.columns):
        record.fail(column, f"one of {', '.join(TEMPLATES)}")
    return None


def _words(text: str) -> int:
    """Words of a text; two Chinese characters count as one."""
    return len(_CHINESE.sub(" ", text).split()) + len(_CHINESE.findall(text)) // 2


def _refuse_unread(record: Record, columns: dict[str, str]) -> None:
    """ValueError for an answer that would be learnt as a caption while a text beside it, perhaps
    its question, has no role."""
    answer = columns["answer"]
    if any(spelling(name, record) for name in (columns["question"], *ROLES["question"])):
        return
    remedy = f"call {answer!r} `caption`, or set `task: caption`"
    may_ask = _may_ask
    if _folded(answer) in CAPTIONS:
        remedy, may_ask = "set `task: caption`", _asks
    read = (*columns.values(), *ROLES["image"])
    for column, value in record.data.items():
        if column in read or not isinstance(value, str) or not value.strip():
            continue
        if may_ask(value) or _ASKING.search(_folded(column)):
            raise ValueError(
                f"{record.where}: {answer!r} would be learnt as a caption, and column "
                f"{column[:80]!r} is not read. If it is the question, call it `question`, or set "
                f"`columns: {{question: {column[:80]}}}` in the recipe; if not, {remedy}"
            )


def _refuse_other_forms(record: Record, columns: dict[str, str]) -> None:
    """ValueError for fields that only a dialogue has, and for a video beside an image."""
    dialogue = ("history", "messages", "conversations", "conversation")
    if _folded(columns["question"]) in ROLES["question"]:
        dialogue += ("input",)
    for name in dialogue:
        if _filled(record, name):
            record.fail(name, "no such column in a table; `format: sharegpt` reads it")
    for name in ("video", "videos"):
        column = spelling(name, record)
        if column not in (None, columns["image"]) and _filled(record, column):
            record.fail(column, "no video beside an image; `format: sharegpt` reads both")


def images_in_cell(value: Any, folder: Path) -> Any:
    """The images of a cell of text: a JSON list, or paths with ``|`` between them."""
    if not isinstance(value, str):
        return value
    if value.lstrip().startswith("["):
        try:
            return parse_json(value)
        except ValueError:  # a name may begin with a bracket
            return value
    several = "|" in value and not os.path.isfile(folder / value)  # noqa: PTH113
    return [part.strip() for part in value.split("|")] if several else value


def _asks(text: str) -> bool:
    return text.rstrip().endswith(("?", "？"))


def _may_ask(text: str) -> bool:
    """Whether a text could be a question, rather than an address, numbers or one word."""
    if "://" in text or _BASE64.fullmatch(text):
        return False
    if text.rstrip().endswith(_QUESTION_ENDS):
        return True
    words = not text.isascii() or len(text.split()) > 1
    return words and any(map(str.isalpha, text))


def _note_digits(
    places: dict[str, str], meaning: str, other: str, record: Record, column: str
) -> None:
    """Notes in ``places`` where digits first have a meaning; ValueError where they had the other:
    data with an index, and with a choice that could be one, is ambiguous."""
    places.setdefault(meaning, record.where)
    if other in places:
        value = repr(record.data[column])[:80]
        raise ValueError(
            f"{record.where}: field '{column}' is {value}, {meaning}, but digits are {other} in "
            f"{places[other]}; write the choice itself in every row"
        )


def _answers(
    record: Record, columns: dict[str, str], choices: tuple[str, ...], digits: dict[str, str]
) -> tuple[str, ...]:
    """The answers. Where there are choices, each is one of them or its index, counted from 0.

    A number beside choices that are texts is an index. Other digits are the choice that equals
    them, else an index; ValueError for data that has both.
    """
    column = columns["answer"]
    answers = _texts(record, column)
    if not choices:
        return answers
    values = record.data.get(column)
    values = values if isinstance(values, list) else [values]
    offered = record.data[columns["choices"]]
    all_texts = not isinstance(offered, list) or all(isinstance(one, str) for one in offered)
    chosen = []
    for answer, value in zip(answers, values, strict=False):
        index = int(answer) if answer.isdecimal() and len(answer) < 9 else len(choices)
        choice = choices[index] if index < len(choices) else None
        is_index = all_texts and isinstance(value, int)
        if answer in choices and not is_index:
            if choice not in (None, answer):
                _note_digits(digits, "the choice itself", "an index", record, column)
            choice = answer
        elif choice is not None and not is_index:
            _note_digits(digits, "an index", "the choice itself", record, column)
        if choice is None:
            record.fail(column, f"one of the choices, or an index from 0 to {len(choices) - 1}")
        chosen.append(choice)
    return tuple(chosen)


def _text(record: Record, column: str) -> str:
    """A text or a number, written out; "" without the column."""
    if column not in record:
        return ""
    value = record.data[column]
    if isinstance(value, str):
        return record.text(column)
    if isinstance(value, float) and math.isfinite(value):
        return str(value)
    return record.identifier(column)


def _texts(record: Record, column: str, separator: str = "") -> tuple[str, ...]:
    """A list; one text or number; or, with ``separator``, the parts of a text."""
    if column not in record:
        return ()
    if isinstance(record.data[column], list):
        return record.texts(column)
    text = _text(record, column)
    parts = text.split(separator) if separator else [text]
    return tuple(part.strip() for part in parts if part.strip())


def images_of(image_root: Path, value: Any, where: str, folder: str = "") -> tuple[str, ...]:
    """Paths below ``image_root`` of one image or video, or of a list of them.

    Paths in ``value`` are relative to ``folder`` below the image root. Images that come as bytes
    or as ``data:`` URLs, and frames of video files, are written below the image root. A folder
    is a video whose frames it holds. Raises ValueError for anything else.
    """
    values = value if isinstance(value, list | tuple) else [value]
    names = (_image(image_root, one, where, folder) for one in values)
    return tuple(frame for name in names for frame in _frames(image_root, name, where))


def _frames(image_root: Path, name: str, where: str) -> tuple[str, ...]:
    """``name``, or the frames of the video that it names.

    os.path returns False for a name that is too long, where pathlib raises an error.
    """
    suffix, folder = posixpath.splitext(name)[1].lower(), name
    if suffix and suffix not in VIDEO_SUFFIXES:
        return (name,)
    if not os.path.isdir(image_root / name):  # noqa: PTH112
        if not suffix:
            return (name,)
        if not os.path.isfile(image_root / name):  # noqa: PTH113
            raise ValueError(f"{where}: video {name!r} does not exist in {image_root}")
        folder = f"extracted/{name}"
        try:
            extract_frames(image_root / name, image_root / folder, VIDEO_FRAMES)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
    paths = list_folder(image_root / folder)
    frames = [path.name for path in paths if path.suffix.lower() in IMAGE_SUFFIXES]
    if not frames:
        raise ValueError(f"{where}: {name!r} has no frame; expected images in it")
    return tuple(f"{folder}/{frames[i]}" for i in evenly_spaced(len(frames), VIDEO_FRAMES))


def _image(image_root: Path, value: Any, where: str, folder: str) -> str:
    if isinstance(value, bytes):
        return keep_image(image_root, value)
    if isinstance(value, dict):
        if isinstance(data := value.get("bytes"), bytes):
            return keep_image(image_root, data)
        value = value.get("path")
    if not isinstance(value, str):
        raise ValueError(f"{where}: an image is {repr(value)[:80]}; expected a path")
    if value.startswith("data:"):
        try:
            data = base64.b64decode(value.partition(",")[2], validate=True)
        except ValueError:  # binascii.Error is one; a letter beyond ASCII raises another
            raise ValueError(f"{where}: the image is not base64; repair the line") from None
        return keep_image(image_root, data)
    value = local_path(value, where)
    if "://" in value:
        raise ValueError(
            f"{where}: image {value[:80]!r} is on the network, and images are not downloaded; "
            "save it below the image root and write its path"
        )
    # ms-swift recommends absolute paths; os.path, since this runs once per image
    if value[:1] == "/" and value.startswith(root := f"{os.path.abspath(image_root)}/"):  # noqa: PTH100
        return image_name(value.removeprefix(root), where)
    name = image_name(value, where)
    # ms-swift writes paths below the root, images/3.png beside the folder images/
    if image_root.name == "images" and name.startswith("images/"):
        below_root = os.path.exists(image_root.parent / name)  # noqa: PTH110
        return name.removeprefix("images/") if below_root else name
    return image_name(f"{folder}/{name}", where) if folder else name


def keep_image(image_root: Path, data: bytes) -> str:
    """Writes an image that is stored inside another file, under its hash; returns its name."""
    digest = hashlib.sha256(data).hexdigest()
    name = f"extracted/{digest[:2]}/{digest}{_suffix(data)}"
    path = image_root / name
    if not path.is_file():
        with replacing(path, synced=False) as temporary:
            temporary.write_bytes(data)
    return name


def _suffix(data: bytes) -> str:
    if data.startswith(b"\x89PNG"):
        return ".png"
    return ".webp" if data[8:12] == b"WEBP" else ".gif" if data[:3] == b"GIF" else ".jpg"
