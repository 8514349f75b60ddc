"""A choice among given texts: IconQA, ScienceQA, VSR (true, false), HatefulMemes (yes, no)."""

from collections.abc import Iterator
from pathlib import Path

from instructblip.core.example import Example
from instructblip.data.reading.opened import note_file
from instructblip.data.reading.records import Record, list_folder, read_lines, read_records
from instructblip.data.reading.streaming import stream_values
from instructblip.data.sources.split import Split


def iconqa(split: Split) -> Iterator[Example]:
    """The owner's folders below ``images/``, else ``iconqa_{split}.json`` (LAVIS).

    ``iconqa_data/iconqa/test/choose_txt/<pid>/data.json`` (with or without the folders above
    ``test``) beside ``image.png``: ``{"question": "How many dots are there?",
    "choices": ["3", "4"], "answer": 1, "ques_type": "choose_txt", "grade": "grade1"}``.
    LAVIS: ``[{"image": "test/choose_txt/1/image.png", "question", "choices", "answer": 1}]``.
    """
    if listed := split.find_optional(f"iconqa_{split.name}.json"):
        yield from _listed(split, listed)
        return
    images = split.root / "images"
    for parent in ("iconqa_data/iconqa", "iconqa", "."):
        folder = images / parent / split.name / "choose_txt"
        if folder.is_dir():
            break
    else:
        raise FileNotFoundError(
            f"neither annotations/iconqa_{split.name}.json nor images/iconqa_data/iconqa/"
            f"{split.name}/choose_txt is in {split.root}; unpack the owner's archive in {images}"
        )
    note_file(folder)
    problems = [path for path in list_folder(folder) if path.is_dir()]
    for problem in sorted(problems, key=lambda path: (len(path.name), path.name)):
        name = problem.relative_to(images).as_posix()
        record = Record(dict(stream_values(problem / "data.json")), f"{name}/data.json")
        yield _choice(split, record, problem.name, f"{name}/image.png")


def scienceqa(split: Split) -> Iterator[Example]:
    """``problems.json`` (all splits in one file), else ``scienceqa_{split}.json`` (LAVIS).

    ``{"17": {"question": "Which one is a solid?", "choices": ["rock", "juice"], "answer": 0,
    "hint": "Look at the picture.", "image": "image.png", "lecture": "...", "split": "train"}}``;
    problems without an image are skipped. The image is ``images/{split}/17/image.png``.
    """
    path = split.find("problems.json", f"scienceqa_{split.name}.json")
    if path.name != "problems.json":
        yield from _listed(split, path)
        return
    for key, record in read_records(path):
        if record.text("split") == split.name and (image := record.text("image", "")):
            yield _choice(split, record, key, f"{split.name}/{key}/{image}")


def _listed(split: Split, path: Path) -> Iterator[Example]:
    for key, record in read_records(path):
        identifier = record.identifier("question_id", key)
        yield _choice(split, record, identifier, record.text("image"))


def _choice(split: Split, record: Record, identifier: str, image: str) -> Example:
    choices = record.texts("choices")
    return split.example(
        record.where,
        identifier,
        split.image(image, record.where, split.name),
        question=record.text("question"),
        choices=choices,
        answers=(record.pick("answer", choices),) if "answer" in record else (),
        context=record.text("hint", ""),
    )


def vsr(split: Split) -> Iterator[Example]:
    """``{split}.jsonl``, or the owner's ``zeroshot/{split}.jsonl``, the paper's split; val is dev.

    ``{"image": "000000085637.jpg", "caption": "The cat is under the bed.", "label": 1,
    "relation": "under", "subj": "cat", "obj": "bed"}``
    """
    parts = ("val", "dev") if split.name == "val" else (split.name,)
    path = split.find(*(f"{f}{part}.jsonl" for f in ("", "zeroshot/") for part in parts))
    for key, record in read_lines(path):
        yield split.example(
            record.where,
            key,
            split.image(record.text("image"), record.where, "trainval2017", "images"),
            question=record.text("caption"),
            choices=("true", "false"),
            answers=(("false", "true")[_label(record)],),
            extra={"question_type": record.text("relation", "")},
        )


def hatefulmemes(split: Split) -> Iterator[Example]:
    """``{split}.jsonl``, val also as ``dev.jsonl`` or ``dev_seen.jsonl``, test ``test_seen.jsonl``.

    ``{"id": 42953, "img": "img/42953.png", "label": 0, "text": "it is a nice day"}``; the test
    file has no label.
    """
    others = {"val": ["dev.jsonl", "dev_seen.jsonl"], "test": ["test_seen.jsonl"]}
    path = split.find(f"{split.name}.jsonl", *others.get(split.name, []))
    for _, record in read_lines(path):
        label = _label(record) if "label" in record else None
        yield split.example(
            record.where,
            record.identifier("id"),
            split.image(record.text("img"), record.where, "img"),
            question=record.text("text"),
            choices=("yes", "no"),
            answers=() if label is None else (("no", "yes")[label],),
            extra={} if label is None else {"label": label},
        )


def _label(record: Record) -> int:
    label = record.integer("label")
    if label not in (0, 1):
        record.fail("label", "0 or 1")
    return label
