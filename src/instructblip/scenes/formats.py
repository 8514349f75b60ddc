"""The official files and fields of published sets, for images and texts from anywhere.

Each function writes one split of one set into a `SetFolder`: it takes what the set says about each
image, saves the images under the names that the set gives them and writes the annotation files. The
readers of real downloads (`data/sources`) read the result.
"""

import json
import random
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image


@dataclass(frozen=True)
class SetFolder:
    """The folder of one set, the split that is written there, and its random generator."""

    root: Path
    split: str
    rng: random.Random

    def save(self, image: Image.Image, name: str) -> str:
        """Write ``image`` to ``images/<name>``, a JPEG without chroma subsampling or a PNG."""
        path = self.root / "images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        options: dict[str, Any] = {"quality": 95, "subsampling": 0} if path.suffix == ".jpg" else {}
        image.save(path, **options)
        return name

    def annotations(self, name: str) -> dict[str, Any]:
        """What an earlier split wrote to a file that holds all splits."""
        path = self.root / "annotations" / name
        return json.loads(path.read_text()) if path.exists() else {}

    def annotate(self, name: str, content: Any, lines: bool = False) -> None:
        path = self.root / "annotations" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if lines or name.endswith(".jsonl"):
            path.write_text("".join(json.dumps(record) + "\n" for record in content))
        else:
            path.write_text(json.dumps(content))


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """A question about an image. ``answers`` are ten people's; ``choices`` and ``right`` (an index)
    belong to multiple choice."""

    question: str
    answer: str = ""
    answers: tuple[str, ...] = ()
    kind: str = ""
    choices: tuple[str, ...] = ()
    right: int = 0
    context: str = ""
    why: str = ""

    @property
    def type(self) -> str:
        """VQAv2's and VizWiz's type of an answer."""
        if self.answer in ("yes", "no"):
            return "yes/no"
        return "number" if self.answer.isdigit() else "other"


OneQuestion = Iterable[tuple[Image.Image, Asked]]


# Captions


def coco_caption(out: SetFolder, images: Iterable[tuple[Image.Image, list[str]]]) -> None:
    _captions(out, images, f"captions_{out.split}2014.json", f"COCO_{out.split}2014_")


def nocaps(out: SetFolder, images: Iterable[tuple[Image.Image, list[str]]]) -> None:
    _captions(out, images, "nocaps_val_4500_captions.json", "")


def _captions(
    out: SetFolder, images: Iterable[tuple[Image.Image, list[str]]], name: str, prefix: str
) -> None:
    records, annotations = [], []
    for i, (image, captions) in enumerate(images):
        file_name = out.save(image, f"{prefix}{i:012d}.jpg")
        size = {"width": image.width, "height": image.height}
        records.append({"id": i, "file_name": file_name, **size})
        annotations += [
            {"image_id": i, "id": 5 * i + k, "caption": caption}
            for k, caption in enumerate(captions)
        ]
    out.annotate(name, {"info": {}, "images": records, "annotations": annotations, "licenses": []})


# Open questions


def vqav2(out: SetFolder, images: Iterable[tuple[Image.Image, list[Asked]]]) -> None:
    _vqa(out, images, "v2_")


def okvqa(out: SetFolder, images: Iterable[tuple[Image.Image, list[Asked]]]) -> None:
    _vqa(out, images, "")


def _vqa(out: SetFolder, images: Iterable[tuple[Image.Image, list[Asked]]], prefix: str) -> None:
    questions, annotations = [], []
    year = f"{out.split}2014"
    for image_id, (image, asked) in enumerate(images):
        out.save(image, f"COCO_{year}_{image_id:012d}.jpg")
        for question in asked:
            ids = {"image_id": image_id, "question_id": len(questions)}
            answers = [
                {"answer": answer, "answer_confidence": "yes", "answer_id": k}
                for k, answer in enumerate(question.answers, start=1)
            ]
            questions.append({**ids, "question": question.question})
            annotations.append(
                {
                    **ids,
                    "question_type": question.kind,
                    "answer_type": question.type,
                    "multiple_choice_answer": question.answer,
                    "answers": answers,
                }
            )
    out.annotate(f"{prefix}OpenEnded_mscoco_{year}_questions.json", {"questions": questions})
    out.annotate(f"{prefix}mscoco_{year}_annotations.json", {"annotations": annotations})


def gqa(out: SetFolder, images: OneQuestion) -> None:
    records = {}
    for i, (picture, asked) in enumerate(images):
        image = f"n{i:06d}"
        out.save(picture, f"{image}.jpg")
        records[f"{i:08d}"] = {
            "question": asked.question,
            "imageId": image,
            "answer": asked.answer,
            "fullAnswer": asked.answer,
            "isBalanced": True,
            "types": {"structural": "query", "semantic": "rel", "detailed": "relS"},
        }
    out.annotate("testdev_balanced_questions.json", records)


def vizwiz(out: SetFolder, images: OneQuestion) -> None:
    """A question without an answer is one that nobody can answer."""
    records = []
    for i, (image, asked) in enumerate(images):
        records.append(
            {
                "image": out.save(image, f"VizWiz_{out.split}_{i:08d}.jpg"),
                "question": asked.question,
                "answers": [
                    {"answer": a, "answer_confidence": "yes"}
                    for a in asked.answers or ["unanswerable"] * 10
                ],
                "answer_type": asked.type if asked.answers else "unanswerable",
                "answerable": int(bool(asked.answers)),
            }
        )
    out.annotate(f"{out.split}.json", records)


def pope(out: SetFolder, kind: str, asked: Iterable[tuple[str, Asked]]) -> None:
    """The questions of one kind (random, popular, adversarial) about images that are saved, a
    record a line though the file is named .json; the answer is yes or no."""
    records = [
        {"question_id": i, "image": image, "text": each.question, "label": each.answer}
        for i, (image, each) in enumerate(asked, start=1)
    ]
    out.annotate(f"coco_pope_{kind}.json", records, lines=True)


# Multiple choice


def aokvqa(out: SetFolder, images: OneQuestion) -> None:
    records = []
    # Both splits share one folder of images, so their numbers must differ.
    first = 0 if out.split == "train" else 500_000
    for i, (image, asked) in enumerate(images):
        out.save(image, f"{first + i:012d}.jpg")
        records.append(
            {
                "split": out.split,
                "image_id": first + i,
                "question_id": f"{out.split}{i}",
                "question": asked.question,
                "choices": asked.choices,
                "correct_choice_idx": asked.right,
                "direct_answers": asked.answers,
                "difficult_direct_answer": False,
                "rationales": [asked.why] * 3,
            }
        )
    out.annotate(f"aokvqa_v1p0_{out.split}.json", records)


def iconqa(out: SetFolder, images: OneQuestion) -> None:
    for i, (image, asked) in enumerate(images):
        folder = f"iconqa_data/iconqa/test/choose_txt/{i}"
        out.save(image, f"{folder}/image.png")
        record = {
            "question": asked.question,
            "choices": asked.choices,
            "answer": asked.right,
            "ques_type": "choose_txt",
            "grade": "grade1",
        }
        (out.root / "images" / folder / "data.json").write_text(json.dumps(record))


def scienceqa(out: SetFolder, images: OneQuestion) -> None:
    problems = out.annotations("problems.json")
    first = len(problems)
    for i, (image, asked) in enumerate(images):
        key = str(first + i)
        out.save(image, f"{out.split}/{key}/image.png")
        problems[key] = {
            "question": asked.question,
            "choices": asked.choices,
            "answer": asked.right,
            "hint": asked.context,
            "image": "image.png",
            "subject": "natural science",
            "lecture": "",
            "solution": "",
            "split": out.split,
        }
    out.annotate("problems.json", problems)


# A text judged against an image


def vsr(out: SetFolder, images: OneQuestion) -> None:
    """The answer is "true" or "false", the kind the relation."""
    records = []
    for i, (image, asked) in enumerate(images):
        name = out.save(image, f"{i:012d}.jpg")
        label = int(asked.answer == "true")
        record = {"image": name, "caption": asked.question, "label": label}
        records.append({**record, "relation": asked.kind})
    out.annotate("test.jsonl", records)


def hatefulmemes(out: SetFolder, images: OneQuestion) -> None:
    """The label is 1 where the answer is "yes"."""
    records = []
    for i, (image, asked) in enumerate(images):
        name = out.save(image, f"img/{i:05d}.png")
        label = int(asked.answer == "yes")
        records.append({"id": f"{i:05d}", "img": name, "label": label, "text": asked.question})
    out.annotate("dev.jsonl", records)
