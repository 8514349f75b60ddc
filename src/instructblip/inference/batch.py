"""Many images at once: a folder or a JSONL of requests in, a JSONL of answers out.

A line of requests is ``{"image": "a.jpg", "instruction": "What is this?"}``; ``image`` may be a
video file, or a list (the frames of a video). Further keys are copied to the answer's line, except
the ``answer`` or ``error`` of an earlier run.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from instructblip.core.files import replacing
from instructblip.core.progress import progress_bar
from instructblip.data.reading.frames import VIDEO_SUFFIXES
from instructblip.data.reading.records import IMAGE_SUFFIXES, image_name
from instructblip.inference.engine import Engine
from instructblip.inference.inputs import ImageInput, open_images

RESULT_KEYS = ("answer", "error")


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
        record = json.loads(line)
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
    return Request(tuple(root / image_name(name, where) for name in names), text, kept)


def answer_requests(
    engine: Engine, requests: Sequence[Request], **decoding: Any
) -> Iterator[list[dict[str, Any]]]:
    """Yields the answered records, a batch at a time and in order. An unreadable image gives a
    record with ``error`` in place of ``answer``, so that the others are answered."""
    for start in range(0, len(requests), engine.batch_size):
        chunk = requests[start : start + engine.batch_size]
        opened = [_open_or_error(request) for request in chunk]
        readable = [i for i, each in enumerate(opened) if not isinstance(each, str)]
        answers: Iterator[str] = iter(())
        if readable:
            texts = [chunk[i].instruction for i in readable]
            answers = iter(engine.answer([opened[i] for i in readable], texts, **decoding))
        yield [
            {**request.record, "instruction": request.instruction}
            | ({"error": each} if isinstance(each, str) else {"answer": next(answers)})
            for request, each in zip(chunk, opened, strict=True)
        ]


def write_answers(engine: Engine, requests: Sequence[Request], out: Path, **decoding: Any) -> int:
    """Write the answered records to the JSONL ``out``; returns the number of those with an
    error."""
    errors = 0
    with (
        replacing(out) as temporary,
        temporary.open("w", encoding="utf-8") as file,
        progress_bar("answering", "images") as bar,
    ):
        for records in answer_requests(engine, requests, **decoding):
            file.writelines(json.dumps(r, ensure_ascii=False) + "\n" for r in records)
            errors += sum("error" in record for record in records)
            bar.advance(len(records), len(requests))
    return errors


def _open_or_error(request: Request) -> list[ImageInput] | str:
    try:
        return open_images(request.images)
    except (ValueError, FileNotFoundError) as error:
        return str(error)
