"""Multiple choice: A-OKVQA, IconQA and ScienceQA."""

import json
from typing import Any

from instructblip.scenes.questions import KNOWLEDGE_KINDS
from instructblip.scenes.writers.set_folder import SetFolder


def aokvqa(out: SetFolder, number: int) -> None:
    records = []
    kinds = (*KNOWLEDGE_KINDS, "color", "shape", "place")
    # Both splits lie in one folder, so their pictures need numbers of their own.
    first = 0 if out.split == "train" else 500_000
    for i, scene, (question,) in out.asked(number, kinds):
        out.picture(scene, f"{first + i:012d}.jpg")
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
        out.picture(scene, f"{folder}/image.png")
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
    problems: dict[str, Any] = {}
    path = out.root / "annotations" / "problems.json"
    if path.exists():  # one file holds all splits
        problems = json.loads(path.read_text())
    first = len(problems)
    for i, scene, (question,) in out.asked(number, ("science",)):
        key = str(first + i)
        out.picture(scene, f"{out.split}/{key}/image.png")
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
