"""Multiple choice: IconQA (choose a text) and ScienceQA (questions with a picture)."""

from collections.abc import Iterator
from pathlib import Path

from instructblip.core.batch import Example
from instructblip.data.reading.opened import note_file
from instructblip.data.reading.records import (
    Record,
    find_file,
    find_optional,
    list_folder,
    place,
    read_records,
)
from instructblip.data.reading.streaming import stream_values


def iconqa(root: Path, split: str) -> Iterator[Example]:
    """The owner's folders below ``images/``, else ``iconqa_{split}.json`` (LAVIS).

    ``iconqa_data/iconqa/test/choose_txt/<pid>/data.json`` (with or without the folders above
    ``test``) beside ``image.png``: ``{"question": "How many dots are there?",
    "choices": ["3", "4"], "answer": 1, "ques_type": "choose_txt", "grade": "grade1"}``.
    LAVIS: ``[{"image": "test/choose_txt/1/image.png", "question", "choices", "answer": 1}]``.
    """
    listed = find_optional(root, f"iconqa_{split}.json")
    if listed:
        yield from _listed(root, listed, "iconqa", split)
        return
    images = root / "images"
    for parent in ("iconqa_data/iconqa", "iconqa", "."):
        folder = images / parent / split / "choose_txt"
        if folder.is_dir():
            break
    else:
        raise FileNotFoundError(
            f"neither annotations/iconqa_{split}.json nor images/iconqa_data/iconqa/{split}/"
            f"choose_txt is in {root}; unpack the owner's archive in {images}"
        )
    note_file(folder)
    problems = [path for path in list_folder(folder) if path.is_dir()]
    for problem in sorted(problems, key=lambda path: (len(path.name), path.name)):
        where = f"{problem.relative_to(images)}/data.json"
        data = dict(stream_values(problem / "data.json"))
        name = (problem / "image.png").relative_to(images).as_posix()
        yield _choice(root, Record(data, where), "iconqa", split, problem.name, name)


def scienceqa(root: Path, split: str) -> Iterator[Example]:
    """``problems.json`` (all splits in one file), else ``scienceqa_{split}.json`` (LAVIS).

    ``{"17": {"question": "Which one is a solid?", "choices": ["rock", "juice"], "answer": 0,
    "hint": "Look at the picture.", "image": "image.png", "lecture": "...", "split": "train"}}``;
    problems without a picture are left out. The picture is ``images/{split}/17/image.png``.
    """
    path = find_file(root, "problems.json", f"scienceqa_{split}.json")
    if path.name != "problems.json":
        yield from _listed(root, path, "scienceqa", split)
        return
    for key, record in read_records(path):
        if record.text("split") == split and record.text("image", ""):
            name = f"{split}/{key}/{record.text('image')}"
            yield _choice(root, record, "scienceqa", split, key, name)


def _listed(root: Path, path: Path, dataset: str, split: str) -> Iterator[Example]:
    for key, record in read_records(path):
        identifier = record.identifier("question_id") if "question_id" in record else key
        yield _choice(root, record, dataset, split, identifier, record.text("image"))


def _choice(
    root: Path, record: Record, dataset: str, split: str, identifier: str, name: str
) -> Example:
    choices = record.texts("choices")
    return Example(
        dataset=dataset,
        split=split,
        id=identifier,
        images=(place(root, name, record.where, split),),
        task="multiple_choice",
        question=record.text("question"),
        choices=choices,
        answers=(record.pick("answer", choices),) if "answer" in record else (),
        context=record.text("hint", ""),
        where=record.where,
    )
