"""A choice among given texts: IconQA, ScienceQA, VSR (true, false), HatefulMemes (yes, no)."""

from collections.abc import Iterator
from pathlib import Path

from instructblip.core.batch import Example
from instructblip.data.reading.opened import note_file
from instructblip.data.reading.records import (
    Record,
    find_file,
    find_optional,
    list_folder,
    place_image,
    read_lines,
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
        images=(place_image(root, name, record.where, split),),
        task="multiple_choice",
        question=record.text("question"),
        choices=choices,
        answers=(record.pick("answer", choices),) if "answer" in record else (),
        context=record.text("hint", ""),
        where=record.where,
    )


def vsr(root: Path, split: str) -> Iterator[Example]:
    """``{split}.jsonl``, or the owner's ``zeroshot/{split}.jsonl``, the paper's split; val is dev.

    ``{"image": "000000085637.jpg", "caption": "The cat is under the bed.", "label": 1,
    "relation": "under", "subj": "cat", "obj": "bed"}``
    """
    parts = ("val", "dev") if split == "val" else (split,)
    path = find_file(root, *(f"{f}{part}.jsonl" for f in ("", "zeroshot/") for part in parts))
    for i, record in enumerate(read_lines(path)):
        yield Example(
            dataset="vsr",
            split=split,
            id=str(i),
            images=(
                place_image(root, record.text("image"), record.where, "trainval2017", "images"),
            ),
            task="statement",
            question=record.text("caption"),
            choices=("true", "false"),
            answers=(("false", "true")[_label(record)],),
            where=record.where,
            extra={"question_type": record.text("relation", "")},
        )


def hatefulmemes(root: Path, split: str) -> Iterator[Example]:
    """``{split}.jsonl``, val also as ``dev.jsonl`` or ``dev_seen.jsonl``, test ``test_seen.jsonl``.

    ``{"id": 42953, "img": "img/42953.png", "label": 0, "text": "it is a nice day"}``; the test
    file has no label.
    """
    others = {"val": ["dev.jsonl", "dev_seen.jsonl"], "test": ["test_seen.jsonl"]}
    path = find_file(root, f"{split}.jsonl", *others.get(split, []))
    for record in read_lines(path):
        label = _label(record) if "label" in record else None
        yield Example(
            dataset="hatefulmemes",
            split=split,
            id=record.identifier("id"),
            images=(place_image(root, record.text("img"), record.where, "img"),),
            task="classify",
            question=record.text("text"),
            choices=("yes", "no"),
            answers=() if label is None else (("no", "yes")[label],),
            where=record.where,
            extra={} if label is None else {"label": label},
        )


def _label(record: Record) -> int:
    label = record.integer("label")
    if label not in (0, 1):
        record.fail("label", "0 or 1")
    return label
