"""Many images at once: a folder or a JSONL of requests in; out a JSONL or CSV of answers, and on
request a ``.txt`` beside each image.

A line of requests is ``{"image": "a.jpg", "instruction": "What is this?"}``; ``image`` may be a
video file, or a list (the frames of a video). Further keys are copied to the answer's line, except
the results of an earlier run.
"""

import csv
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from instructblip.core.files import parse_json, replacing, write_text
from instructblip.core.progress import progress_bar
from instructblip.data.reading.frames import VIDEO_SUFFIXES
from instructblip.data.reading.records import IMAGE_SUFFIXES, image_name, local_path
from instructblip.inference.details import DetailedAnswer
from instructblip.inference.engine import Engine
from instructblip.inference.inputs import ImageInput, open_images

DETAIL_KEYS = ("log_prob", "confidence")
RESULT_KEYS = ("answer", *DETAIL_KEYS, "error")
# also in full width, which programs in East Asia take for the same
_FORMULA = re.compile("[\\s\ufeff]*[=+\\-@\uff1d\uff0b\uff0d\uff20]|[\t\r]")
_NUMBER = re.compile(r"[+-]?\d+(?:[.,]\d+)*%?")


@dataclass(frozen=True, slots=True)
class Request:
    """One question about one image or video; ``record`` is what its answer's line repeats."""

    images: tuple[Path, ...]
    instruction: str
    record: dict[str, Any]


def read_requests(path: Path, instruction: str | None = None) -> list[Request]:
    """The requests of a JSONL, or one for each image of a folder, in the order of names.

    ``instruction`` is used where a line has none. Image paths are relative to the file's folder.
    Raises FileNotFoundError, or ValueError naming the file and the line.
    """
    if path.is_dir():
        return _read_folder(path, instruction)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: expected a folder of images or a JSONL of requests")
    try:  # a line ends at "\n" alone: a text may contain other line separators
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        number = error.object[: error.start].count(b"\n") + 1
        raise ValueError(f"{path}, line {number}: not UTF-8; save the file as UTF-8") from error
    requests = [
        _read_line(line, path.parent, instruction, f"{path}, line {number}")
        for number, line in enumerate(lines, start=1)
        if line.strip()
    ]
    if not requests:
        raise ValueError(f"{path} holds no requests")
    return requests


def _read_folder(folder: Path, instruction: str | None) -> list[Request]:
    if instruction is None:
        raise ValueError(f"{folder} is a folder: give its question with --instruction")
    suffixes = (*IMAGE_SUFFIXES, *VIDEO_SUFFIXES)
    files = sorted(p for p in folder.iterdir() if p.suffix.lower() in suffixes)
    if not files:
        raise ValueError(
            f"{folder} holds no images; expected {', '.join(IMAGE_SUFFIXES)}, or videos"
        )
    return [Request((p,), instruction, {"image": p.name}) for p in files]


def _read_line(line: str, root: Path, instruction: str | None, where: str) -> Request:
    try:
        record = parse_json(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where} is not JSON: {error}") from error
    if not isinstance(record, dict):
        example = '{"image": "a.jpg", "instruction": "What is this?"}'
        raise ValueError(f"{where}: expected an object such as {example}")
    images = record.get("image")
    names = [images] if isinstance(images, str) else images
    if not isinstance(names, list) or not names or not all(isinstance(n, str) for n in names):
        raise ValueError(f"{where}: 'image' is {images!r}; expected a path or a list of paths")
    text = record.get("instruction", instruction)
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f"{where}: no 'instruction'; give one there or with --instruction")
    kept = {key: value for key, value in record.items() if key not in RESULT_KEYS}
    return Request(
        tuple(root / image_name(local_path(name, where), where) for name in names), text, kept
    )


def answer_requests(
    engine: Engine, requests: Sequence[Request], details: bool = False, **decoding: Any
) -> Iterator[list[dict[str, Any]]]:
    """Yields the answered records, a batch at a time and in order. An unreadable image gives a
    record with ``error`` in place of ``answer``, so that the others are answered. With ``details``
    records have the log-probability of the answer and, of a calibrated model, its confidence."""
    for start in range(0, len(requests), engine.batch_size):
        chunk = requests[start : start + engine.batch_size]
        opened = [_open_or_error(request) for request in chunk]
        readable = [i for i, each in enumerate(opened) if not isinstance(each, str)]
        answers: Iterator[dict[str, Any]] = iter(())
        if readable:
            texts = [chunk[i].instruction for i in readable]
            images = [opened[i] for i in readable]
            if details:
                known = engine.answer(images, texts, details=True, **decoding)
                answers = ({"answer": each.text} | _details(each) for each in known)
            else:
                answers = ({"answer": t} for t in engine.answer(images, texts, **decoding))
        yield [
            {**request.record, "instruction": request.instruction}
            | ({"error": each} if isinstance(each, str) else next(answers))
            for request, each in zip(chunk, opened, strict=True)
        ]


def text_files(requests: Sequence[Request]) -> list[Path]:
    """The ``.txt`` beside the first image of each request.

    Raises ValueError for files that exist, which may be the user's captions, and where requests
    share one.
    """
    files = [request.images[0].with_suffix(".txt") for request in requests]
    if there := [file for file in files if file.exists()]:
        raise ValueError(
            f"--txt: {there[0]} exists, as do {len(there) - 1} others of {len(files)}: move them "
            "away first, since nothing is overwritten"
        )
    file, count = Counter(files).most_common(1)[0]
    if count > 1:
        raise ValueError(
            f"--txt: {count} requests would share {file}: rename the images, or leave out --txt"
        )
    return files


def write_answers(
    engine: Engine,
    requests: Sequence[Request],
    out: Path,
    texts: Sequence[Path] | None = None,
    details: bool = False,
    **decoding: Any,
) -> int:
    """Write the answered records to ``out``, a CSV by its suffix, else JSON lines; returns the
    number of those with an error. ``texts`` are files that get the answers, each in one line."""
    errors = done = 0
    with (
        replacing(out) as temporary,
        temporary.open("w", encoding="utf-8", newline="") as file,
        progress_bar("answering", "images") as bar,
    ):
        keys = dict.fromkeys(key for request in requests for key in request.record)
        results = [key for key in RESULT_KEYS if details or key not in DETAIL_KEYS]
        write = row_writer(file, out, [*dict.fromkeys([*keys, "instruction", *results])])
        for records in answer_requests(engine, requests, details, **decoding):
            for number, record in enumerate(records, start=done):
                write(record)
                errors += "error" in record
                if texts is not None and "error" not in record:
                    write_text(texts[number], " ".join(record["answer"].split()) + "\n")
            done += len(records)
            bar(done, len(requests))
    return errors


def _details(answer: DetailedAnswer) -> dict[str, Any]:
    return {key: getattr(answer, key) for key in DETAIL_KEYS}


def row_writer(
    file: TextIO, path: Path, columns: Sequence[str]
) -> Callable[[dict[str, Any]], object]:
    """What writes a record into the open file of ``path``: a CSV by its suffix, else JSON lines.

    A CSV has the columns in its first line; lists and objects are written as JSON, and an
    apostrophe precedes a text that a spreadsheet program would run as a formula.
    """
    if path.suffix.lower() != ".csv":
        return lambda record: file.write(json.dumps(record, ensure_ascii=False) + "\n")
    file.write("\ufeff")  # by which spreadsheet programs know UTF-8
    writer = csv.writer(file, lineterminator="\n")

    def cell(value: Any) -> Any:
        if isinstance(value, list | dict):
            return json.dumps(value, ensure_ascii=False)
        runs = isinstance(value, str) and _FORMULA.match(value) and not _NUMBER.fullmatch(value)
        return f"'{value}" if runs else value

    def write(record: dict[str, Any]) -> None:
        writer.writerow(cell(record.get(column)) for column in columns)

    write(dict(zip(columns, columns, strict=True)))
    return write


def _open_or_error(request: Request) -> list[ImageInput] | str:
    try:
        return open_images(request.images)
    except (ValueError, FileNotFoundError) as error:
        return str(error)
