"""Questions about videos, as a folder of frames each or as video files: MSVD-QA, MSRVTT-QA, iVQA.

``images/<video>/`` holds the frames as pictures, in the order of their names; ``<video>`` is the
identifier of the file, with ``video`` or ``vid`` in front of it, or without its extension. Without
such a folder the frames are taken out of ``images/<video>.mp4`` or its kin (``frames.py``).
"""

import re
from collections.abc import Iterator
from pathlib import Path

from instructblip.core.batch import Example
from instructblip.data.reading.frames import (
    VIDEO_SUFFIXES,
    evenly_spaced,
    extract_frames,
)
from instructblip.data.reading.records import (
    IMAGE_SUFFIXES,
    find_file,
    find_optional,
    image_name,
    list_folder,
    read_records,
    read_table,
    read_text,
)

MAX_FRAMES = 64
"""Frames that an example lists; of a longer folder, this many evenly spaced ones."""
FRAMES_OF_A_FILE = 16
"""Frames that are taken out of a video file."""


def msvdqa(root: Path, split: str) -> Iterator[Example]:
    """``{split}_qa.json``, ``msvd_qa_{split}.json`` or ``qa_{split}.json``.

    ``[{"id": 0, "video_id": 1, "question": "what is a man doing?", "answer": "cook"}]``; LAVIS
    writes ``video`` instead of ``video_id``. The videos may have the names of the owner's archive,
    with ``youtube_mapping.txt`` beside the questions: ``-4wsuPCjDBc_5_15 vid1`` a line.
    """
    path = find_file(root, f"{split}_qa.json", f"msvd_qa_{split}.json", f"qa_{split}.json")
    names: dict[str, str] = {}
    if mapping := find_optional(root, "youtube_mapping.txt"):
        for line, where in read_text(mapping):
            name, _, number = line.strip().partition(" ")
            names[number.strip()] = image_name(name, where)
    yield from _questions(root, path, "msvdqa", split, names)


def msrvttqa(root: Path, split: str) -> Iterator[Example]:
    """``{split}_qa.json``, ``msrvtt_qa_{split}.json`` or ``qa_{split}.json``, as MSVD-QA."""
    path = find_file(root, f"{split}_qa.json", f"msrvtt_qa_{split}.json", f"qa_{split}.json")
    yield from _questions(root, path, "msrvttqa", split)


def _questions(
    root: Path, path: Path, dataset: str, split: str, names: dict[str, str] | None = None
) -> Iterator[Example]:
    frames = _Frames(root, names)
    for key, record in read_records(path):
        video = record.identifier("video_id" if "video_id" in record else "video")
        for name in ("id", "question_id"):
            key = record.identifier(name) if name in record else key
        yield Example(
            dataset=dataset,
            split=split,
            id=key,
            images=frames.of(video, record.where),
            task="vqa",
            question=record.text("question"),
            answers=(record.text("answer"),) if "answer" in record else (),
            where=record.where,
        )


def ivqa(root: Path, split: str) -> Iterator[Example]:
    """``{split}.csv`` or ``ivqa_{split}.csv``; five annotators answered each question.

    ``video_id,question,answer1,answer2,answer3,answer4,answer5,start,end``
    ``a1B2,What is poured?,milk,milk,cream,milk,white milk,12,24``. A clip's frames are in
    ``images/<video_id>_<start>_<end>/`` or in ``images/<video_id>/``.
    """
    frames = _Frames(root)
    for i, record in enumerate(read_table(find_file(root, f"{split}.csv", f"ivqa_{split}.csv"))):
        video = record.text("video_id")
        clip = f"{video}_{record.text('start', '')}_{record.text('end', '')}"
        answers = (record.text(f"answer{k}", "") for k in range(1, 6))
        yield Example(
            dataset="ivqa",
            split=split,
            id=str(i),
            images=frames.of(clip, record.where) or frames.of(video, record.where),
            task="vqa",
            question=record.text("question"),
            answers=tuple(answer for answer in answers if answer),
            where=record.where,
        )


class _Frames:
    """The frames of each video, listed once. A video without frames gives no images.

    ``names`` gives the name of the owner's file for ``vid`` and the number of a video.
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
            folder = self.root / name
            if not folder.is_dir():
                continue
            return self._pictures(name)
        for name in usual:
            for suffix in ("", *VIDEO_SUFFIXES):
                path = self.root / f"{name}{suffix}"
                if path.suffix in VIDEO_SUFFIXES and path.is_file():
                    taken = f"extracted/{path.name}"
                    extract_frames(path, self.root / taken, FRAMES_OF_A_FILE)
                    return self._pictures(taken)
        return ()

    def _pictures(self, folder: str) -> tuple[str, ...]:
        entries = list_folder(self.root / folder)
        files = [f.name for f in entries if f.name.lower().endswith(IMAGE_SUFFIXES)]
        files.sort(key=_natural)
        return tuple(f"{folder}/{files[i]}" for i in evenly_spaced(len(files), MAX_FRAMES))


def _natural(name: str) -> list[tuple[int, str]]:
    """Sorts frame_2 before frame_10."""
    return [
        (int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", name)
    ]
