"""Words in pictures: OCR-VQA and TextVQA."""

import json
from typing import Any

from instructblip.scenes.questions import QUESTIONS
from instructblip.scenes.writers.set_folder import SetFolder


def ocrvqa(out: SetFolder, number: int) -> None:
    records: dict[str, Any] = {}
    path = out.root / "annotations" / "dataset.json"
    if path.exists():  # one file holds all splits
        records = json.loads(path.read_text())
    for i in range(number):
        word = out.rng.random() < 0.5
        scene = out.scene(shapes=(0, 2), words=int(word), digits=int(not word))
        question = QUESTIONS["word" if word else "digit"](scene, out.rng)
        assert question is not None
        key = f"{out.split}{i:06d}"
        out.picture(scene, f"{key}.jpg")
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
        out.picture(scene, f"train_images/{image_id}.jpg")
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
