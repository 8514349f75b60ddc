"""Open questions: VQAv2, OK-VQA, GQA and VizWiz."""

from dataclasses import replace

from instructblip.scenes.questions import (
    KNOWLEDGE_KINDS,
    VQA_KINDS,
    Question,
)
from instructblip.scenes.writers.set_folder import SetFolder


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
        out.picture(scene, f"COCO_{year}_{image_id:012d}.jpg")
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
        out.picture(scene, f"{image}.jpg")
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
    """Slightly blurred pictures, and every third one so blurred that nobody can answer."""
    records = []
    for i, scene, (question,) in out.asked(number, VQA_KINDS):
        lost = i % 3 == 2
        blur = out.rng.uniform(8, 12) if lost else out.rng.uniform(0.3, 1.0)
        name = out.picture(replace(scene, blur=blur), f"VizWiz_{out.split}_{i:08d}.jpg")
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
