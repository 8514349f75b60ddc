"""Questions with short answers: VQAv2, OK-VQA, A-OKVQA, GQA, VizWiz, POPE; question generation.

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

Question generation swaps the two: the instruction holds an answer (``Example.question``), and the
response is the question.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from sys import intern
from typing import Any

from instructblip.core.example import Example
from instructblip.data.reading.records import Record, read_lines, read_records
from instructblip.data.reading.streaming import is_list
from instructblip.data.sources.split import COCO_FOLDERS, Split


def vqav2(split: Split) -> Iterator[Example]:
    """The owner's two files, of 2015 and without annotations in the test split; else LAVIS's
    ``vqa_{split}_eval.json`` or ``vqa_{split}.json``."""
    yield from _two_files(split, "v2_", "vqa")


def okvqa(split: Split) -> Iterator[Example]:
    """Files named as those of VQAv2, without ``v2_``; else ``okvqa_{split}_eval.json`` or
    ``okvqa_{split}.json``."""
    yield from _two_files(split, "", "okvqa")


def _two_files(split: Split, prefix: str, lavis: str) -> Iterator[Example]:
    is_test = split.name == "test"
    years = [f"{split.name}2014", *(["test2015", "test-dev2015"] if is_test else [])]
    official = [f"{prefix}OpenEnded_mscoco_{year}_questions.json" for year in years]
    joined = [f"{lavis}_{split.name}_eval.json", f"{lavis}_{split.name}.json"]
    path = split.find(*official, *joined)
    if path.name in joined:
        yield from _joined(split, path)
        return
    year = path.name.removeprefix(f"{prefix}OpenEnded_mscoco_").removesuffix("_questions.json")
    find = split.find_optional if is_test else split.find
    annotations = find(f"{prefix}mscoco_{year}_annotations.json")
    answered = _read_annotations(annotations) if annotations else {}
    folder = year.replace("test-dev", "test")
    for _, record in read_records(path, "questions"):
        question_id, image_id = record.identifier("question_id"), record.integer("image_id")
        answers, types = answered.pop(question_id, ((), ("", "")))
        yield split.example(
            record.where,
            question_id,
            split.image(f"COCO_{folder}_{image_id:012d}.jpg", record.where, folder),
            question=record.text("question"),
            answers=answers,
            extra=_given(question_type=types[0], answer_type=types[1]),
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
        types = (intern(record.text("question_type", "")), intern(record.text("answer_type", "")))
        question_id = record.identifier("question_id")
        if question_id in answered:
            record.fail("question_id", "each question once")
        answered[question_id] = (answers, types)
    return answered


def _joined(split: Split, path: Path) -> Iterator[Example]:
    for _, record in read_records(path):
        yield split.example(
            record.where,
            record.identifier("question_id"),
            split.image(record.text("image"), record.where, *COCO_FOLDERS),
            question=record.text("question"),
            answers=record.one_or_more("answer") if "answer" in record else (),
        )


def aokvqa(split: Split) -> Iterator[Example]:
    """The question with its choices; the answer is the text of the right choice."""
    for record, common in _aokvqa_records(split):
        choices = record.texts("choices")
        has_answer = "correct_choice_idx" in record
        answers = (record.pick("correct_choice_idx", choices),) if has_answer else ()
        yield replace(common, choices=choices, answers=answers)


def aokvqa_direct(split: Split) -> Iterator[Example]:
    """The question alone, with the direct answers (ten, repeated as often as they were given).

    ``extra`` marks questions that are ``difficult_direct_answer``, which the owner does not score.
    """
    for record, common in _aokvqa_records(split):
        marked = record.data.get("difficult_direct_answer") is True
        extra = {"difficult_direct_answer": True} if marked else {}
        yield replace(common, answers=record.texts("direct_answers", ()), extra=extra)


def _aokvqa_records(split: Split) -> Iterator[tuple[Record, Example]]:
    """Each record, and what its example has besides choices and answers."""
    for _, record in read_records(split.find(f"aokvqa_v1p0_{split.name}.json")):
        has_name = "image" in record
        name = record.text("image") if has_name else f"{record.integer('image_id'):012d}.jpg"
        yield (
            record,
            split.example(
                record.where,
                record.identifier("question_id"),
                split.image(name, record.where, f"{split.name}2017", *COCO_FOLDERS),
                question=record.text("question"),
            ),
        )


def asked_for(read: Callable[[Split], Iterator[Example]], split: Split) -> Iterator[Example]:
    """The questions of another reader as responses to their most frequent answer: people agree on
    it, and it is the same each time."""
    for example in read(split):
        if not example.answers:
            # There is nothing to ask for. Left without an answer, the example counts as bad.
            yield replace(example, question="", choices=())
            continue
        ((answer, _),) = Counter(example.answers).most_common(1)
        yield replace(example, question=answer, answers=(example.question,), choices=())


def gqa(split: Split) -> Iterator[Example]:
    """``{split}_balanced_questions.json`` (test: ``testdev_balanced_questions.json`` first).

    ``{"201640614": {"question": "What is left of the cup?", "imageId": "n161313",
    "answer": "spoon", "types": {"structural": "query", "semantic": "rel"}}}``; LAVIS's file of
    the same name is a list of ``{"question_id", "question", "image", "answer"}``.
    """
    parts = ("testdev", "test") if split.name == "test" else (split.name,)
    names = [f"{p}{part}_balanced_questions.json" for part in parts for p in ("", "gqa_")]
    path = split.find(*names)
    lavis = is_list(path)
    for key, record in read_records(path):
        name = record.text("image") if lavis else f"{record.identifier('imageId')}.jpg"
        types = record.data.get("types")
        types = types if isinstance(types, dict) else {}
        yield split.example(
            record.where,
            record.identifier("question_id") if lavis else key,
            split.image(name, record.where, "images"),
            question=record.text("question"),
            answers=(record.text("answer"),) if "answer" in record else (),
            extra=_given(
                question_type=str(types.get("structural") or ""),
                semantic_type=str(types.get("semantic") or ""),
            ),
        )


def vizwiz(split: Split) -> Iterator[Example]:
    """``{split}.json`` or ``vizwiz_{split}.json``; test has no answers.

    ``[{"image": "VizWiz_val_00000000.jpg", "question": "What is this?", "answerable": 0,
    "answer_type": "unanswerable", "answers": [{"answer": "unanswerable"}]}]``
    """
    for key, record in read_records(split.find(f"{split.name}.json", f"vizwiz_{split.name}.json")):
        name = record.text("image")
        answers = record.records("answers") if "answers" in record else []
        extra: dict[str, Any] = _given(answer_type=record.text("answer_type", ""))
        if "answerable" in record:
            extra["answerable"] = record.integer("answerable")
        yield split.example(
            record.where,
            Path(name).stem or key,
            split.image(name, record.where, split.name),
            question=record.text("question"),
            answers=tuple(answer.text("answer") for answer in answers),
            extra=extra,
        )


def pope(split: Split) -> Iterator[Example]:
    """``coco_pope_{split}.json``, a record a line; the splits are random, popular and adversarial.

    ``{"question_id": 1, "image": "COCO_val2014_000000016631.jpg",
    "text": "Is there a person in the image?", "label": "yes"}``
    """
    for _, record in read_lines(split.find(f"coco_pope_{split.name}.json")):
        label = record.text("label")
        if label not in ("yes", "no"):
            record.fail("label", "'yes' or 'no'")
        yield split.example(
            record.where,
            record.identifier("question_id"),
            split.image(record.text("image"), record.where, "val2014"),
            question=record.text("text"),
            answers=(label,),
        )


def _given(**values: str) -> dict[str, str]:
    """The values that are not empty."""
    return {name: value for name, value in values.items() if value}
