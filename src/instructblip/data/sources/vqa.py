"""Questions with short answers: VQAv2, OK-VQA, A-OKVQA, GQA, VizWiz, and question generation.

VQAv2 and OK-VQA keep questions and annotations in two files::

    v2_OpenEnded_mscoco_train2014_questions.json
    {"questions": [{"question_id": 9000, "image_id": 9, "question": "What is on the tray?"}]}
    v2_mscoco_train2014_annotations.json
    {"annotations": [{"question_id": 9000, "image_id": 9, "question_type": "what is",
      "answer_type": "other", "multiple_choice_answer": "bread",
      "answers": [{"answer_id": 1, "answer": "bread", "answer_confidence": "yes"}]}]}

LAVIS joins them (vqa_train.json, vqa_val_eval.json; okvqa_train.json)::

    [{"question_id": 9000, "question": "What is on the tray?", "answer": ["bread", "bread"],
      "image": "train2014/COCO_train2014_000000000009.jpg", "dataset": "vqa"}]

A-OKVQA (aokvqa_v1p0_{split}.json) is read as multiple choice and as direct answers::

    [{"question_id": "22MexNkBPpdZGX6sxbxVBH", "image_id": 299207, "split": "train",
      "question": "What is the man by the bags awaiting?",
      "choices": ["skateboarder", "train", "delivery", "cab"], "correct_choice_idx": 3,
      "direct_answers": ["ride", "bus", "taxi"], "rationales": ["He stands at the road."]}]

The test file has neither ``correct_choice_idx`` nor ``direct_answers``. LAVIS's file of the same
name adds ``image``.

Question generation turns a set round: the instruction holds an answer (``Example.question``) and
the response is the question.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from sys import intern

from instructblip.core.batch import Example
from instructblip.data.reading.records import (
    Record,
    find_file,
    find_optional,
    place_image,
    read_records,
)
from instructblip.data.reading.streaming import is_list
from instructblip.data.sources.captions import COCO_FOLDERS


def vqav2(root: Path, split: str) -> Iterator[Example]:
    """``v2_OpenEnded_mscoco_{split}2014_questions.json`` and ``v2_mscoco_{split}2014_annotations``.

    Test questions are of 2015 and have no annotations. Else ``vqa_train.json``,
    ``vqa_{split}_eval.json`` or ``vqa_{split}.json``.
    """
    yield from _two_files(root, split, "vqav2", "v2_", "vqa")


def okvqa(root: Path, split: str) -> Iterator[Example]:
    """``OpenEnded_mscoco_{split}2014_questions.json`` and ``mscoco_{split}2014_annotations.json``.

    Else ``okvqa_train.json``, ``okvqa_{split}_eval.json`` or ``okvqa_{split}.json``.
    """
    yield from _two_files(root, split, "okvqa", "", "okvqa")


def _two_files(root: Path, split: str, dataset: str, prefix: str, lavis: str) -> Iterator[Example]:
    years = (f"{split}2014", "test2015", "test-dev2015") if split == "test" else (f"{split}2014",)
    official = [f"{prefix}OpenEnded_mscoco_{year}_questions.json" for year in years]
    joined = [f"{lavis}_{split}_eval.json", f"{lavis}_{split}.json"]
    path = find_file(root, *official, *joined)
    if path.name in joined:
        yield from _joined(root, path, dataset, split)
        return
    year = path.name.removeprefix(f"{prefix}OpenEnded_mscoco_").removesuffix("_questions.json")
    annotations = find_optional(root, f"{prefix}mscoco_{year}_annotations.json")
    if annotations is None and split != "test":
        find_file(root, f"{prefix}mscoco_{year}_annotations.json")
    answered = _read_annotations(annotations) if annotations else {}
    folder = year.replace("test-dev", "test")
    for _, record in read_records(path, "questions"):
        question_id, image_id = record.identifier("question_id"), record.integer("image_id")
        answers, kinds = answered.pop(question_id, ((), ("", "")))
        yield Example(
            dataset=dataset,
            split=split,
            id=question_id,
            images=(place_image(root, f"COCO_{folder}_{image_id:012d}.jpg", record.where, folder),),
            task="vqa",
            question=record.text("question"),
            answers=answers,
            where=record.where,
            extra=_named(question_type=kinds[0], answer_type=kinds[1]),
        )
    if answered:
        raise ValueError(
            f"{annotations}: {len(answered)} annotations have no question in {path.name}, first "
            f"question_id {next(iter(answered))}; use both files of the same release"
        )


def _read_annotations(path: Path) -> dict[str, tuple[tuple[str, ...], tuple[str, str]]]:
    """Answers and types by question; equal strings are stored once (VQAv2 has 4.4 M answers)."""
    answered = {}
    for _, record in read_records(path, "annotations"):
        answers = tuple(intern(answer.text("answer")) for answer in record.records("answers"))
        kinds = (intern(record.text("question_type", "")), intern(record.text("answer_type", "")))
        question_id = record.identifier("question_id")
        if question_id in answered:
            record.fail("question_id", "each question once")
        answered[question_id] = (answers, kinds)
    return answered


def _joined(root: Path, path: Path, dataset: str, split: str) -> Iterator[Example]:
    for _, record in read_records(path):
        yield Example(
            dataset=dataset,
            split=split,
            id=record.identifier("question_id"),
            images=(place_image(root, record.text("image"), record.where, *COCO_FOLDERS),),
            task="vqa",
            question=record.text("question"),
            answers=_one_or_many(record, "answer"),
            where=record.where,
        )


def aokvqa(root: Path, split: str) -> Iterator[Example]:
    """The question with its choices; the answer is the text of the right choice."""
    for record, image in _aokvqa_records(root, split):
        choices = record.texts("choices")
        right = "correct_choice_idx" in record
        yield Example(
            dataset="aokvqa",
            split=split,
            id=record.identifier("question_id"),
            images=(image,),
            task="multiple_choice",
            question=record.text("question"),
            choices=choices,
            answers=(record.pick("correct_choice_idx", choices),) if right else (),
            where=record.where,
        )


def aokvqa_direct(root: Path, split: str) -> Iterator[Example]:
    """The question alone, with the direct answers (ten, repeated as often as they were given)."""
    for record, image in _aokvqa_records(root, split):
        yield Example(
            dataset="aokvqa_direct",
            split=split,
            id=record.identifier("question_id"),
            images=(image,),
            task="vqa",
            question=record.text("question"),
            answers=record.texts("direct_answers") if "direct_answers" in record else (),
            where=record.where,
        )


def _aokvqa_records(root: Path, split: str) -> Iterator[tuple[Record, str]]:
    for _, record in read_records(find_file(root, f"aokvqa_v1p0_{split}.json")):
        if "image" in record:
            name = record.text("image")
        else:
            name = f"{record.integer('image_id'):012d}.jpg"
        yield record, place_image(root, name, record.where, f"{split}2017", *COCO_FOLDERS)


def vqav2_question(root: Path, split: str) -> Iterator[Example]:
    """The files of ``vqav2``."""
    yield from _turned_round(vqav2, "vqav2_question", root, split)


def okvqa_question(root: Path, split: str) -> Iterator[Example]:
    """The files of ``okvqa``."""
    yield from _turned_round(okvqa, "okvqa_question", root, split)


def aokvqa_question(root: Path, split: str) -> Iterator[Example]:
    """The files of ``aokvqa``; the answer is the right choice."""
    yield from _turned_round(aokvqa, "aokvqa_question", root, split)


def _turned_round(
    read: Callable[[Path, str], Iterator[Example]], dataset: str, root: Path, split: str
) -> Iterator[Example]:
    for example in read(root, split):
        counted = Counter(example.answers).most_common(1)
        yield replace(
            example,
            dataset=dataset,
            task="ask",
            question=counted[0][0] if counted else "",
            # Without an answer there is nothing to ask for: left empty, it is reported as bad.
            answers=(example.question,) if counted else (),
            choices=(),
        )


def gqa(root: Path, split: str) -> Iterator[Example]:
    """``{split}_balanced_questions.json`` (test: ``testdev_balanced_questions.json`` first).

    ``{"201640614": {"question": "What is left of the cup?", "imageId": "n161313",
    "answer": "spoon", "types": {"structural": "query", "semantic": "rel"}}}``; LAVIS's file of
    the same name is a list of ``{"question_id", "question", "image", "answer"}``.
    """
    parts = ("testdev", "test") if split == "test" else (split,)
    names = [f"{p}{part}_balanced_questions.json" for part in parts for p in ("", "gqa_")]
    path = find_file(root, *names)
    lavis = is_list(path)
    for key, record in read_records(path):
        name = record.text("image") if lavis else f"{record.identifier('imageId')}.jpg"
        kinds = record.data.get("types")
        kinds = kinds if isinstance(kinds, dict) else {}
        yield Example(
            dataset="gqa",
            split=split,
            id=record.identifier("question_id") if lavis else key,
            images=(place_image(root, name, record.where, "images"),),
            task="vqa",
            question=record.text("question"),
            answers=(record.text("answer"),) if "answer" in record else (),
            where=record.where,
            extra=_named(
                question_type=str(kinds.get("structural") or ""),
                semantic_type=str(kinds.get("semantic") or ""),
            ),
        )


def vizwiz(root: Path, split: str) -> Iterator[Example]:
    """``{split}.json`` or ``vizwiz_{split}.json``; test has no answers.

    ``[{"image": "VizWiz_val_00000000.jpg", "question": "What is this?", "answerable": 0,
    "answer_type": "unanswerable", "answers": [{"answer": "unanswerable"}]}]``
    """
    path = find_file(root, f"{split}.json", f"vizwiz_{split}.json")
    for key, record in read_records(path):
        name = record.text("image")
        answers = record.records("answers") if "answers" in record else []
        extra = _named(answer_type=record.text("answer_type", ""))
        if "answerable" in record:
            extra["answerable"] = record.integer("answerable")
        yield Example(
            dataset="vizwiz",
            split=split,
            id=Path(name).stem or key,
            images=(place_image(root, name, record.where, split),),
            task="vqa",
            question=record.text("question"),
            answers=tuple(answer.text("answer") for answer in answers),
            where=record.where,
            extra=extra,
        )


def _one_or_many(record: Record, name: str) -> tuple[str, ...]:
    if name not in record:
        return ()
    return record.texts(name) if isinstance(record.data[name], list) else (record.text(name),)


def _named(**values: str) -> dict[str, str | int]:
    """The values that the file gave."""
    return {name: value for name, value in values.items() if value}
