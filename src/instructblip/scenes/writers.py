"""What Scenes puts into each set: its images, and what is asked about them."""

import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from instructblip.scenes import formats
from instructblip.scenes.formats import Asked
from instructblip.scenes.language import a, captions, detail, look, phrase
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


class SetFolder(formats.SetFolder):
    """The folder of a set whose images are scenes."""

    def scene(self, **kinds: Any) -> Scene:
        return sample_scene(self.rng, test_digits=self.split != "train", **kinds)

    def draw(self, scene: Scene, name: str) -> str:
        return self.save(render(scene), name)

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

    def ten_answers(self, question: Question) -> tuple[str, ...]:
        """The answers of ten people, each wrong with probability ``ANNOTATOR_ERROR``."""
        rng, others = self.rng, question.others
        wrong = (rng.random() < ANNOTATOR_ERROR for _ in range(10))
        return tuple(rng.choice(others) if each else question.answer for each in wrong)

    def open(self, question: Question) -> Asked:
        """A question that ten people have answered in their words."""
        return _stated(question, answers=self.ten_answers(question))

    def choose(self, question: Question) -> Asked:
        """A question with choices."""
        choices, right = question.choices(self.rng)
        return _stated(question, choices=choices, right=right)


def _stated(question: Question, **more: Any) -> Asked:
    texts = {"question": question.text, "answer": question.answer, "kind": question.kind}
    return Asked(**texts, context=question.context, why=question.why, **more)


# Captions


def coco_caption(out: SetFolder, number: int) -> None:
    scenes = (out.scene(pairs="seen") for _ in range(number))
    formats.coco_caption(out, ((render(scene), captions(scene)) for scene in scenes))


def nocaps(out: SetFolder, number: int) -> None:
    scenes = (out.scene(pairs="unseen") for _ in range(number))
    formats.nocaps(out, ((render(scene), captions(scene)) for scene in scenes))


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
    asked = out.asked(number // 3, VQA_KINDS, per_scene=3)
    formats.vqav2(out, ((render(scene), [*map(out.open, some)]) for _, scene, some in asked))


def okvqa(out: SetFolder, number: int) -> None:
    asked = out.asked(number, KNOWLEDGE_KINDS)
    formats.okvqa(out, ((render(scene), [*map(out.open, some)]) for _, scene, some in asked))


def gqa(out: SetFolder, number: int) -> None:
    asked = out.asked(number, ("beside",), shapes=(2, 3))
    formats.gqa(out, ((render(scene), _stated(question)) for _, scene, (question,) in asked))


def vizwiz(out: SetFolder, number: int) -> None:
    """Slightly blurred images, and every third one so blurred that nobody can answer."""

    def blurred() -> formats.OneQuestion:
        for i, scene, (question,) in out.asked(number, VQA_KINDS):
            lost = i % 3 == 2
            blur = out.rng.uniform(8, 12) if lost else out.rng.uniform(0.3, 1.0)
            asked = _stated(question) if lost else out.open(question)
            yield render(replace(scene, blur=blur)), asked

    formats.vizwiz(out, blurred())


POPE_SCENES = 2000
"""Scenes in which `pope` counts what is common, and what is there together."""


def pope(out: SetFolder, number: int) -> None:
    """Each of the ``number`` images is asked about its shapes, and about as many that it does not
    show: drawn at random, the most common ones, or those most often beside what it shows."""
    looks = [f"{colour} {shape}" for colour in COLOURS for shape in SHAPES]
    common: Counter[str] = Counter()
    beside: dict[str, Counter[str]] = {each: Counter() for each in looks}
    for _ in range(POPE_SCENES):
        shown = [look(thing) for thing in out.scene(pairs="any").shapes]
        common.update(shown)
        for each in shown:
            beside[each].update(shown)
    asked: dict[str, list[tuple[str, Asked]]] = {"random": [], "popular": [], "adversarial": []}
    for i in range(number):
        scene = out.scene(pairs="any")
        name = out.draw(scene, f"COCO_val2014_{i:012d}.jpg")
        shown = [look(thing) for thing in scene.shapes]
        absent = [each for each in looks if each not in shown]
        near = sum((beside[each] for each in shown), Counter())
        chosen = {
            "random": out.rng.sample(absent, len(shown)),
            "popular": sorted(absent, key=lambda each: -common[each])[: len(shown)],
            "adversarial": sorted(absent, key=lambda each: -near[each])[: len(shown)],
        }
        for kind, wrong in chosen.items():
            for yes, no in zip(shown, wrong, strict=True):
                for text, answer in ((yes, "yes"), (no, "no")):
                    question = f"Is there {a(text)} in the image?"
                    asked[kind].append((name, Asked(question=question, answer=answer)))
    for kind, rows in asked.items():
        formats.pope(out, kind, rows)


# Multiple choice


def aokvqa(out: SetFolder, number: int) -> None:
    kinds = (*KNOWLEDGE_KINDS, "color", "shape", "place")

    def both() -> formats.OneQuestion:
        for _, scene, (question,) in out.asked(number, kinds):
            chosen = out.choose(question)
            yield render(scene), replace(chosen, answers=out.ten_answers(question))

    formats.aokvqa(out, both())


def iconqa(out: SetFolder, number: int) -> None:
    asked = out.asked(number, ("most", "count"), shapes=(2, 3))
    formats.iconqa(out, ((render(scene), out.choose(question)) for _, scene, (question,) in asked))


def scienceqa(out: SetFolder, number: int) -> None:
    asked = out.asked(number, ("science",))
    chosen = ((render(scene), out.choose(question)) for _, scene, (question,) in asked)
    formats.scienceqa(out, chosen)


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
    def stated() -> formats.OneQuestion:
        for _, scene, (question,) in out.asked(number, ("statement",), shapes=(2, 3)):
            relations = ("left of", "right of", "above", "below")
            relation = next(r for r in relations if r in question.text)
            yield render(scene), replace(_stated(question), kind=relation)

    formats.vsr(out, stated())


def hatefulmemes(out: SetFolder, number: int) -> None:
    """The label is 1 where the text fits the image."""
    asked = out.asked(number, ("label",))
    formats.hatefulmemes(
        out, ((render(scene), _stated(question)) for _, scene, (question,) in asked)
    )


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
