"""One writer per data set: scenes and questions in the official files and fields of the set."""

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from instructblip.scenes.language import captions, detail, phrase
from instructblip.scenes.questions import (
    ALL_PLACES,
    KNOWLEDGE_KINDS,
    NUMBERS,
    QUESTIONS,
    VQA_KINDS,
    Question,
)
from instructblip.scenes.world import COLOURS, SHAPES, WORDS, Scene, Thing, render, sample_scene

ANNOTATOR_ERROR = 0.03


@dataclass(frozen=True)
class SetFolder:
    """The folder of one set, the split that is written there, and its random generator."""

    root: Path
    split: str
    rng: random.Random

    def scene(self, **kinds: Any) -> Scene:
        return sample_scene(self.rng, test_digits=self.split != "train", **kinds)

    def draw(self, scene: Scene, name: str) -> str:
        """Draw ``scene`` to ``images/<name>``, a JPEG without chroma subsampling or a PNG."""
        path = self.root / "images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        options: dict[str, Any] = {"quality": 95, "subsampling": 0} if path.suffix == ".jpg" else {}
        render(scene).save(path, **options)
        return name

    def annotations(self, name: str) -> dict[str, Any]:
        """What an earlier split wrote to a file that holds all splits."""
        path = self.root / "annotations" / name
        return json.loads(path.read_text()) if path.exists() else {}

    def annotate(self, name: str, content: Any) -> None:
        path = self.root / "annotations" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if name.endswith(".jsonl"):
            path.write_text("".join(json.dumps(record) + "\n" for record in content))
        else:
            path.write_text(json.dumps(content))

    def question(self, scene: Scene, kinds: tuple[str, ...]) -> Question | None:
        """A question of a random kind among those that fit the scene."""
        for kind in self.rng.sample(kinds, len(kinds)):
            if question := QUESTIONS[kind](scene, self.rng):
                return question
        return None

    def asked(
        self, number: int, kinds: tuple[str, ...], per_scene: int = 1, **scene: Any
    ) -> Iterator[tuple[int, Scene, list[Question]]]:
        """(index, scene, ``per_scene`` different questions) for ``number`` scenes."""
        index = 0
        while index < number:
            world = self.scene(**scene)
            questions = [self.question(world, kinds) for _ in range(3 * per_scene)]
            unique = {q.text: q for q in questions if q}
            if len(unique) >= per_scene:
                yield index, world, list(unique.values())[:per_scene]
                index += 1

    def ten_answers(self, question: Question) -> list[str]:
        """The answers of ten people, each wrong with probability ``ANNOTATOR_ERROR``."""
        rng, others = self.rng, question.others
        wrong = (rng.random() < ANNOTATOR_ERROR for _ in range(10))
        return [rng.choice(others) if each else question.answer for each in wrong]


# Captions


def coco_caption(out: SetFolder, number: int) -> None:
    _coco_files(out, number, f"captions_{out.split}2014.json", f"COCO_{out.split}2014_", "seen")


def nocaps(out: SetFolder, number: int) -> None:
    _coco_files(out, number, "nocaps_val_4500_captions.json", "", "unseen")


def _coco_files(out: SetFolder, number: int, name: str, prefix: str, pairs: str) -> None:
    images, annotations = [], []
    for i in range(number):
        scene = out.scene(pairs=pairs)
        file_name = out.draw(scene, f"{prefix}{i:012d}.jpg")
        images.append({"id": i, "file_name": file_name, "width": 64, "height": 64})
        annotations += [
            {"image_id": i, "id": 5 * i + k, "caption": caption}
            for k, caption in enumerate(captions(scene))
        ]
    out.annotate(name, {"info": {}, "images": images, "annotations": annotations, "licenses": []})


def textcaps(out: SetFolder, number: int) -> None:
    data, ocr = [], []
    for i in range(number):
        scene = out.scene(shapes=(1, 2), words=1)
        image_id = f"{out.split}{i:06d}"
        out.draw(scene, f"train_images/{image_id}.jpg")
        references = captions(scene)
        ocr.append({"image_id": image_id, "ocr_tokens": [t.name for t in scene.of_kind("word")]})
        data += [
            {
                "image_id": image_id,
                "image_path": f"train_images/{image_id}.jpg",
                "caption_str": caption,
                "reference_strs": references,
            }
            for caption in references
        ]
    out.annotate(f"TextCaps_0.1_{out.split}.json", {"dataset_type": out.split, "data": data})
    out.annotate(f"TextVQA_Rosetta_OCR_v0.2_{out.split}.json", {"data": ocr})


# Open questions


def vqav2(out: SetFolder, number: int) -> None:
    _vqa_files(out, number, "v2_", VQA_KINDS, per_scene=3)


def okvqa(out: SetFolder, number: int) -> None:
    _vqa_files(out, number, "", KNOWLEDGE_KINDS, per_scene=1)


def _vqa_files(
    out: SetFolder, number: int, prefix: str, kinds: tuple[str, ...], per_scene: int
) -> None:
    questions, annotations = [], []
    year = f"{out.split}2014"
    for image_id, scene, asked in out.asked(number // per_scene, kinds, per_scene):
        out.draw(scene, f"COCO_{year}_{image_id:012d}.jpg")
        for question in asked:
            ids = {"image_id": image_id, "question_id": len(questions)}
            answers = [
                {"answer": answer, "answer_confidence": "yes", "answer_id": k}
                for k, answer in enumerate(out.ten_answers(question), start=1)
            ]
            questions.append({**ids, "question": question.text})
            annotations.append(
                {
                    **ids,
                    "question_type": question.kind,
                    "answer_type": _answer_type(question),
                    "multiple_choice_answer": question.answer,
                    "answers": answers,
                }
            )
    out.annotate(f"{prefix}OpenEnded_mscoco_{year}_questions.json", {"questions": questions})
    out.annotate(f"{prefix}mscoco_{year}_annotations.json", {"annotations": annotations})


def gqa(out: SetFolder, number: int) -> None:
    records = {}
    for i, scene, (question,) in out.asked(number, ("beside",), shapes=(2, 3)):
        image = f"n{i:06d}"
        out.draw(scene, f"{image}.jpg")
        records[f"{i:08d}"] = {
            "question": question.text,
            "imageId": image,
            "answer": question.answer,
            "fullAnswer": question.answer,
            "isBalanced": True,
            "types": {"structural": "query", "semantic": "rel", "detailed": "relS"},
        }
    out.annotate("testdev_balanced_questions.json", records)


def vizwiz(out: SetFolder, number: int) -> None:
    """Slightly blurred images, and every third one so blurred that nobody can answer."""
    records = []
    for i, scene, (question,) in out.asked(number, VQA_KINDS):
        lost = i % 3 == 2
        blur = out.rng.uniform(8, 12) if lost else out.rng.uniform(0.3, 1.0)
        name = out.draw(replace(scene, blur=blur), f"VizWiz_{out.split}_{i:08d}.jpg")
        answers = ["unanswerable"] * 10 if lost else out.ten_answers(question)
        records.append(
            {
                "image": name,
                "question": question.text,
                "answers": [{"answer": a, "answer_confidence": "yes"} for a in answers],
                "answer_type": "unanswerable" if lost else _answer_type(question),
                "answerable": int(not lost),
            }
        )
    out.annotate(f"{out.split}.json", records)


def _answer_type(question: Question) -> str:
    if question.answer in ("yes", "no"):
        return "yes/no"
    return "number" if question.answer.isdigit() else "other"


# Multiple choice


def aokvqa(out: SetFolder, number: int) -> None:
    records = []
    kinds = (*KNOWLEDGE_KINDS, "color", "shape", "place")
    # Both splits share one folder of images, so their numbers must differ.
    first = 0 if out.split == "train" else 500_000
    for i, scene, (question,) in out.asked(number, kinds):
        out.draw(scene, f"{first + i:012d}.jpg")
        choices, right = question.choices(out.rng)
        records.append(
            {
                "split": out.split,
                "image_id": first + i,
                "question_id": f"{out.split}{i}",
                "question": question.text,
                "choices": choices,
                "correct_choice_idx": right,
                "direct_answers": out.ten_answers(question),
                "difficult_direct_answer": False,
                "rationales": [question.why] * 3,
            }
        )
    out.annotate(f"aokvqa_v1p0_{out.split}.json", records)


def iconqa(out: SetFolder, number: int) -> None:
    for i, scene, (question,) in out.asked(number, ("most", "count"), shapes=(2, 3)):
        folder = f"iconqa_data/iconqa/test/choose_txt/{i}"
        out.draw(scene, f"{folder}/image.png")
        choices, right = question.choices(out.rng)
        record = {
            "question": question.text,
            "choices": choices,
            "answer": right,
            "ques_type": "choose_txt",
            "grade": "grade1",
        }
        (out.root / "images" / folder / "data.json").write_text(json.dumps(record))


def scienceqa(out: SetFolder, number: int) -> None:
    problems = out.annotations("problems.json")
    first = len(problems)
    for i, scene, (question,) in out.asked(number, ("science",)):
        key = str(first + i)
        out.draw(scene, f"{out.split}/{key}/image.png")
        choices, right = question.choices(out.rng)
        problems[key] = {
            "question": question.text,
            "choices": choices,
            "answer": right,
            "hint": question.context,
            "image": "image.png",
            "subject": "natural science",
            "lecture": "",
            "solution": "",
            "split": out.split,
        }
    out.annotate("problems.json", problems)


# Words in images


def ocrvqa(out: SetFolder, number: int) -> None:
    records = out.annotations("dataset.json")
    for i in range(number):
        word = out.rng.random() < 0.5
        scene = out.scene(shapes=(0, 2), words=int(word), digits=int(not word))
        question = QUESTIONS["word" if word else "digit"](scene, out.rng)
        assert question is not None
        key = f"{out.split}{i:06d}"
        out.draw(scene, f"{key}.jpg")
        records[key] = {
            "imageURL": f"https://books.invalid/{key}.jpg",
            "questions": [question.text],
            "answers": [question.answer],
            "split": {"train": 1, "val": 2, "test": 3}[out.split],
        }
    out.annotate("dataset.json", records)


def textvqa(out: SetFolder, number: int) -> None:
    data, ocr = [], []
    for i, scene, (question,) in out.asked(number, ("word at",), shapes=(0, 1), words=2):
        image_id = f"val{i:06d}"
        out.draw(scene, f"train_images/{image_id}.jpg")
        words = [t.name for t in scene.of_kind("word")]
        ocr.append({"image_id": image_id, "ocr_tokens": out.rng.sample(words, len(words))})
        data.append(
            {
                "question_id": i,
                "image_id": image_id,
                "question": question.text,
                "answers": out.ten_answers(question),
                "set_name": "val",
            }
        )
    out.annotate("TextVQA_0.5.1_val.json", {"dataset_type": "val", "data": data})
    out.annotate("TextVQA_Rosetta_OCR_v0.2_val.json", {"data": ocr})


# A text judged against an image


def vsr(out: SetFolder, number: int) -> None:
    records = []
    for i, scene, (question,) in out.asked(number, ("statement",), shapes=(2, 3)):
        name = out.draw(scene, f"{i:012d}.jpg")
        relation = next(r for r in ("left of", "right of", "above", "below") if r in question.text)
        label = int(question.answer == "true")
        records.append(
            {"image": name, "caption": question.text, "label": label, "relation": relation}
        )
    out.annotate("test.jsonl", records)


def hatefulmemes(out: SetFolder, number: int) -> None:
    """The label is 1 where the text fits the image."""
    records = []
    for i, scene, (question,) in out.asked(number, ("label",)):
        name = out.draw(scene, f"img/{i:05d}.png")
        label = int(question.answer == "yes")
        records.append({"id": f"{i:05d}", "img": name, "label": label, "text": question.text})
    out.annotate("dev.jsonl", records)


# Dialogues


DIALOGUE_KINDS = ("color", "shape", "count", "exists", "place", "size")
DIALOGUE_OPTIONS = 20
DETAIL_INSTRUCTIONS = ("describe the picture in detail.", "tell me everything that you see.")


def llava(out: SetFolder, number: int) -> None:
    conversations, details, reasons = [], [], []
    for i, scene, asked in out.asked(number, VQA_KINDS, per_scene=3, shapes=(2, 3)):
        name = out.draw(scene, f"{i:012d}.jpg")
        turns = [(q.text, q.answer) for q in asked]
        record = {"id": f"{i:012d}", "image": name}
        conversations.append({**record, "conversations": _conversation(turns)})
        text = out.rng.choice(DETAIL_INSTRUCTIONS)
        details.append({**record, "conversations": _conversation([(text, detail(scene))])})
        question = out.question(scene, ("fruit", "corners", "signal"))
        if question:
            answer = f"{question.answer}, because {question.why}."
            text = f"{question.text} say why."
            reasons.append({**record, "conversations": _conversation([(text, answer)])})
    out.annotate("conversation_58k.json", conversations)
    out.annotate("detail_23k.json", details)
    out.annotate("complex_reasoning_77k.json", reasons)


def _conversation(turns: list[tuple[str, str]]) -> list[dict[str, str]]:
    texts = [text for turn in turns for text in turn]
    texts[0] = f"<image>\n{texts[0]}"
    speakers = ("human", "gpt") * len(turns)
    return [{"from": who, "value": text} for who, text in zip(speakers, texts, strict=True)]


def visual_dialog(out: SetFolder, number: int) -> None:
    questions: dict[str, int] = {}
    pool = [*COLOURS, *SHAPES, *ALL_PLACES, *NUMBERS, *WORDS, "yes", "no", "small", "large"]
    dialogs = []
    rounds = 4
    for i, scene, asked in out.asked(number // rounds, DIALOGUE_KINDS, rounds, shapes=(2, 3)):
        out.draw(scene, f"VisualDialog_val2018_{i:012d}.jpg")
        turns = []
        for question in asked:
            right = pool.index(question.answer)
            wrong = [k for k in range(len(pool)) if k != right]
            options = out.rng.sample(wrong, DIALOGUE_OPTIONS - 1)
            options.insert(out.rng.randrange(DIALOGUE_OPTIONS), right)
            turns.append(
                {
                    "question": questions.setdefault(question.text, len(questions)),
                    "answer": right,
                    "answer_options": options,
                    "gt_index": options.index(right),
                }
            )
        dialogs.append({"image_id": i, "caption": phrase(scene.things[0]), "dialog": turns})
    data = {"questions": list(questions), "answers": pool, "dialogs": dialogs}
    out.annotate("visdial_1.0_val.json", {"version": "1.0", "split": "val", "data": data})


# Videos


def msvdqa(out: SetFolder, number: int) -> None:
    """Videos of four frames: of two shapes one moves, and is asked about."""
    records = []
    while len(records) < number:
        scene = out.scene(shapes=(2, 2))
        first, second = scene.shapes
        if first.name == second.name or first.colour == second.colour:
            continue
        moving, still = out.rng.sample([first, second], 2)
        video = f"vid{len(records)}" if out.split == "test" else f"{out.split}{len(records)}"
        for k, cell in enumerate(walk(moving, still, out.rng)):
            moved = replace(moving, row=cell[0], column=cell[1])
            things = tuple(moved if thing is moving else thing for thing in scene.things)
            out.draw(replace(scene, things=things), f"{video}/frame_{k}.png")
        question, answer = out.rng.choice(motion_questions(moving, still))
        records.append(
            {"id": len(records), "video_id": video, "question": question, "answer": answer}
        )
    out.annotate(f"{out.split}_qa.json", records)


def motion_questions(moving: Thing, still: Thing) -> list[tuple[str, str]]:
    """Questions and answers about a video in which one of two shapes moves."""
    return [
        ("what shape moves?", moving.name),
        ("what color is the shape that moves?", moving.colour),
        ("what shape stays in its place?", still.name),
        ("what color is the shape that stays in its place?", still.colour),
    ]


def walk(moving: Thing, still: Thing, rng: random.Random) -> list[tuple[int, int]]:
    """Four cells of the moving shape, each beside the one before and none that of the other."""
    cells = [(moving.row, moving.column)]
    while len(cells) < 4:
        row, column = cells[-1]
        beside = [(row + 1, column), (row - 1, column), (row, column + 1), (row, column - 1)]
        taken = (still.row, still.column)
        free = [c for c in beside if {*c} <= {0, 1, 2} and c != taken]
        cells.append(rng.choice(free))
    return cells
