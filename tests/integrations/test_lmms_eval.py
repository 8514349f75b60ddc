"""lmms-eval finds and runs the plug-in, offline, on two generated tasks."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("lmms_eval", reason="needs lmms-eval (extra: lmms)")

import datasets
from PIL import Image

from instructblip.inference.engine import Engine
from instructblip.integrations.lmms_eval import _prompt
from runs.lmms import TASK, UTILS
from tests.testing import write_model, write_picture

QUESTION = "Question: what is red? Short answer:"
CHOICES = ["red", "blue", "the cat"]


@pytest.mark.parametrize(
    ("context", "num_images", "prompt"),
    [
        ("<image> or <image>? ", 2, "<image> or <image>?"),
        ("<image>\nWhat?", 3, "What?"),
        ("What?", 1, "What?"),
    ],
)
def test_images_between_words_keep_their_places(context: str, num_images: int, prompt: str) -> None:
    assert _prompt(context, num_images) == prompt


def test_lmms_eval_runs_the_engine(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model", "instructblip")
    engine = Engine.from_pretrained(model, device="cpu")
    images = [write_picture(tmp_path / f"{i}.png", seed=i) for i in range(4)]
    greedy = {"num_beams": 1, "max_new_tokens": 4, "min_new_tokens": 0, "repetition_penalty": 1.0}
    answers = engine.answer(images, QUESTION, **greedy)
    ranked = [engine.rank(image, QUESTION, CHOICES) for image in images]
    best = [scores.index(max(scores)) for scores in ranked]
    records = [
        {
            "image": Image.open(image),
            "prompt": QUESTION,
            "choices": CHOICES,
            "answer": answer if i else "something else",
            "label": right if i else (right + 1) % 3,
        }
        for i, (image, answer, right) in enumerate(zip(images, answers, best, strict=True))
    ]
    data = tmp_path / "data"
    datasets.DatasetDict({"test": datasets.Dataset.from_list(records)}).save_to_disk(data)
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    (tasks / "utils.py").write_text(UTILS)
    settings = "generation_kwargs: {max_new_tokens: 4, num_beams: 1, do_sample: false}"
    (tasks / "free.yaml").write_text(
        TASK.format(data=data, name="toy_free", kind="generate_until", target="answer",
                    more=settings, metric="exact_match")
    )  # fmt: skip
    (tasks / "choice.yaml").write_text(
        TASK.format(data=data, name="toy_choice", kind="multiple_choice", target="label",
                    more="doc_to_choice: !function utils.choices", metric="acc")
    )  # fmt: skip
    command = [sys.executable, "-m", "lmms_eval", "--model", "instructblip_engine"]
    command += ["--model_args", f"pretrained={model}", "--tasks", "toy_free,toy_choice"]
    command += ["--include_path", str(tasks), "--output_path", str(tmp_path / "out")]
    command += ["--batch_size", "2", "--device", "cpu"]
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf")}
    done = subprocess.run(command, env=os.environ | offline, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    (file,) = (tmp_path / "out").rglob("*results.json")
    results = json.loads(file.read_text())["results"]
    scores = {task: [v for k, v in each.items() if k.split(",")[0] in ("exact_match", "acc")]
              for task, each in results.items()}  # fmt: skip
    assert scores == {"toy_free": [0.75], "toy_choice": [0.75]}
    print(done.stdout[-1500:])
