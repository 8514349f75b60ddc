"""Questions about videos, as a folder of frames each or as video files: MSVD-QA, MSRVTT-QA, iVQA.

``images/<video>/`` holds the frames as images, in the order of their names; ``<video>`` is the
identifier in the file, the same after ``video`` or ``vid``, or without its extension. Without such
a folder the frames are extracted from ``images/<video>.mp4`` or the like (``frames.py``).
"""

import re
from collections.abc import Iterator
from pathlib import Path

from instructblip.core.example import Example
from instructblip.data.reading.frames import VIDEO_SUFFIXES, evenly_spaced, extract_frames
from instructblip.data.reading.records import (
    IMAGE_SUFFIXES,
    image_name,
    list_folder,
    read_records,
    read_table,
    read_text,
)
from instructblip.data.sources.split import Split

MAX_FRAMES = 64
"""Frames that an example lists; in a longer folder, this many evenly spaced ones."""
EXTRACTED_FRAMES = 16
"""Frames that are extracted from a video file."""


def msvdqa(split: Split) -> Iterator[Example]:
    """``{split}_qa.json``, ``msvd_qa_{split}.json`` or ``qa_{split}.json``.

    ``[{"id": 0, "video_id": 1, "question": "what is a man doing?", "answer": "cook"}]``; LAVIS
    writes ``video`` instead of ``video_id``. The videos may have the names of the owner's archive,
    with ``youtube_mapping.txt`` beside the questions: ``-4wsuPCjDBc_5_15 vid1`` a line.
    """
    path = _find(split, "msvd")
    names: dict[str, str] = {}
    if mapping := split.find_optional("youtube_mapping.txt"):
        for line, where in read_text(mapping):
            name, _, number = line.strip().partition(" ")
            names[number.strip()] = image_name(name, where)
    yield from _questions(split, path, names)


def msrvttqa(split: Split) -> Iterator[Example]:
    """``{split}_qa.json``, ``msrvtt_qa_{split}.json`` or ``qa_{split}.json``, as MSVD-QA."""
    yield from _questions(split, _find(split, "msrvtt"))


def _find(split: Split, name: str) -> Path:
    return split.find(
        f"{split.name}_qa.json", f"{name}_qa_{split.name}.json", f"qa_{split.name}.json"
    )


def _questions(split: Split, path: Path, names: dict[str, str] | None = None) -> Iterator[Example]:
    frames = _Frames(split.root, names)
    for key, record in read_records(path):
        video = record.identifier("video_id" if "video_id" in record else "video")
        images = frames.of(video, record.where)
        yield split.example(
            record.where,
            record.identifier("question_id", record.identifier("id", key)),
            *images,
            extra={} if images else {"video": video},
            question=record.text("question"),
            answers=(record.text("answer"),) if "answer" in record else (),
        )


def ivqa(split: Split) -> Iterator[Example | ValueError]:
    """``{split}.csv`` or ``ivqa_{split}.csv``; five annotators answered each question.

    ``video_id,question,answer1,answer2,answer3,answer4,answer5,start,end``
    ``a1B2,What is poured?,milk,milk,cream,milk,white milk,12,24``. A clip's frames are in
    ``images/<video_id>_<start>_<end>/`` or in ``images/<video_id>/``.
    """
    frames = _Frames(split.root)
    path = split.find(f"{split.name}.csv", f"ivqa_{split.name}.csv")
    for key, record in read_table(path):
        if isinstance(record, ValueError):
            yield record
            continue
        video = record.text("video_id")
        clip = f"{video}_{record.text('start', '')}_{record.text('end', '')}"
        answers = (record.text(f"answer{k}", "") for k in range(1, 6))
        images = frames.of(clip, record.where) or frames.of(video, record.where)
        yield split.example(
            record.where,
            key,
            *images,
            extra={} if images else {"video": video},
            question=record.text("question"),
            answers=tuple(answer for answer in answers if answer),
        )


class _Frames:
    """The frames of each video, listed once; none for a video without frames.

    ``names`` maps ``vid`` and a video's number to the name of the owner's file.
    """

    def __init__(self, root: Path, names: dict[str, str] | None = None) -> None:
        self.root, self.names = root / "images", names or {}
        self.listed: dict[str, tuple[str, ...]] = {}

    def of(self, video: str, where: str) -> tuple[str, ...]:
        if video not in self.listed:
            self.listed[video] = self._list(image_name(video, where))
        return self.listed[video]

    def _list(self, video: str) -> tuple[str, ...]:
        usual = [video, f"video{video}", f"vid{video}"]
        usual += [self.names[name] for name in usual if name in self.names]
        for name in (*usual, str(Path(video).with_suffix(""))):
            if (self.root / name).is_dir():
                return self._images(name)
        for name in usual:
            for suffix in ("", *VIDEO_SUFFIXES):
                path = self.root / f"{name}{suffix}"
                if path.suffix in VIDEO_SUFFIXES and path.is_file():
                    folder = f"extracted/{path.name}"
                    extract_frames(path, self.root / folder, EXTRACTED_FRAMES)
                    return self._images(folder)
        return ()

    def _images(self, folder: str) -> tuple[str, ...]:
        entries = list_folder(self.root / folder)
        files = [f.name for f in entries if f.name.lower().endswith(IMAGE_SUFFIXES)]
        files.sort(key=_natural)
        return tuple(f"{folder}/{files[i]}" for i in evenly_spaced(len(files), MAX_FRAMES))


def _natural(name: str) -> list[tuple[int, str]]:
    """Sorts frame_2 before frame_10."""
    return [
        (int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", name)
    ]
