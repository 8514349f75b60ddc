"""Many pictures at once: a folder or a JSONL of requests in, a JSONL of answers out.

A line of requests is ``{"image": "a.jpg", "instruction": "What is this?"}``; ``image`` may be a
video file, or a list (the frames of a video); further keys are copied to the answer's line, but for
the ``answer`` or ``error`` of an earlier one.
"""

import json
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from instructblip.data.images import load_image
from instructblip.data.reading.frames import VIDEO_SUFFIXES, extract_frames
from instructblip.data.reading.records import IMAGE_SUFFIXES, image_name
from instructblip.inference.engine import Engine
from instructblip.inference.inputs import Picture

RESULT_KEYS = ("answer", "error")
FRAMES = 4
"""Frames that stand for a video, evenly spaced, as in the paper."""


@dataclass(frozen=True, slots=True)
class Request:
    """One question about one picture or video; ``record`` is what its answer's line repeats."""

    images: tuple[Path, ...]
    instruction: str
    record: dict[str, Any]


def read_requests(path: Path, instruction: str | None = None) -> list[Request]:
    """The requests of a JSONL, or one for each picture of a folder (in the order of names).

    ``instruction`` is asked where a line has none. Pictures are given relative to the file's
    folder. Raises FileNotFoundError, or ValueError naming the file and the line.
    """
    if path.is_dir():
        return _of_folder(path, instruction)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: expected a folder of pictures or a JSONL of requests")
    try:  # a line ends at "\n" alone: a text may hold other ends of lines
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        number = error.object[: error.start].count(b"\n") + 1
        raise ValueError(f"{path}, line {number}: not UTF-8; save the file as UTF-8") from error
    found = [
        _of_line(line, path.parent, instruction, f"{path}, line {number}")
        for number, line in enumerate(lines, start=1)
        if line.strip()
    ]
    if not found:
        raise ValueError(f"{path} holds no requests")
    return found


def _of_folder(folder: Path, instruction: str | None) -> list[Request]:
    if instruction is None:
        raise ValueError(f"{folder} is a folder: say with --instruction what to ask its pictures")
    files = sorted(
        p for p in folder.iterdir() if p.suffix.lower() in (*IMAGE_SUFFIXES, *VIDEO_SUFFIXES)
    )
    if not files:
        raise ValueError(
            f"{folder} holds no pictures; expected {', '.join(IMAGE_SUFFIXES)}, or videos"
        )
    return [Request((p,), instruction, {"image": p.name}) for p in files]


def _of_line(line: str, root: Path, instruction: str | None, where: str) -> Request:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where} is not JSON: {error}") from error
    example = '{"image": "a.jpg", "instruction": "What is this?"}'
    if not isinstance(record, dict):
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
    """The answered records, a batch at a time and in order. An unreadable picture gives a record
    with ``error`` in place of ``answer``: one bad file does not cost the answers of the rest."""
    for start in range(0, len(requests), engine.batch_size):
        chunk = requests[start : start + engine.batch_size]
        seen = [_pictures_or_problem(request) for request in chunk]
        good = [i for i, found in enumerate(seen) if not isinstance(found, str)]
        answers = iter(())
        if good:
            texts = [chunk[i].instruction for i in good]
            answers = iter(engine.answer([seen[i] for i in good], texts, **decoding))
        yield [
            {**request.record, "instruction": request.instruction}
            | ({"error": found} if isinstance(found, str) else {"answer": next(answers)})
            for request, found in zip(chunk, seen, strict=True)
        ]


def _pictures_or_problem(request: Request) -> list[Picture] | str:
    try:
        return open_pictures(request.images)
    except (ValueError, FileNotFoundError) as error:
        return str(error)


def open_pictures(paths: Sequence[Path]) -> list[Picture]:
    """The pictures to look at together: of a video file its frames, else the paths themselves.

    Raises ValueError or FileNotFoundError, naming the file, for what cannot be decoded.
    """
    found: list[Picture] = []
    for path in paths:
        if path.is_dir():
            raise ValueError(f"{path} is a folder; give a picture or a video, or --batch FOLDER")
        if not path.is_file():
            raise FileNotFoundError(f"{path} does not exist")
        if path.suffix.lower() in VIDEO_SUFFIXES:
            found += _frames(path)
        else:
            load_image(path)
            found.append(path)
    return found


def _frames(video: Path) -> list[Picture]:
    with tempfile.TemporaryDirectory() as folder:
        files = extract_frames(video, Path(folder) / "frames", FRAMES)
        return [load_image(file) for file in sorted(files.iterdir())]
