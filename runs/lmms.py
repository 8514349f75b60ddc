"""lmms-eval, offline, on two tasks made of Scenes: open questions, and choices by likelihood.

    python runs/lmms.py [--model starter] [--root data/scenes] [--limit 100] [--out out/lmms]

Needs the extra ``lmms`` and the data (`instructblip scenes`). Prints lmms-eval's own table, and
below it the same two figures by `instructblip evaluate`'s scorers.
"""

import argparse
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import datasets
from PIL import Image

from instructblip.core.example import Example
from instructblip.data.prepared.prepare import prepare
from instructblip.data.templates import render_prompt
from instructblip.evaluation.benchmarks import BENCHMARKS, Benchmark
from instructblip.evaluation.evaluate import evaluate, pick
from instructblip.inference.engine import Engine

TASK = """
dataset_path: {data}
dataset_kwargs: {{load_from_disk: True}}
task: {name}
test_split: test
output_type: {kind}
doc_to_visual: !function utils.visual
doc_to_text: !function utils.text
doc_to_target: {target}
{more}
metric_list:
  - metric: {metric}
    aggregation: mean
    higher_is_better: true
"""
UTILS = """
def visual(doc):
    return [doc["image"].convert("RGB")]


def text(doc):
    return doc["prompt"]


def choices(doc):
    return doc["choices"]
"""
TASKS = {
    "scenes_open": ("scenes_okvqa", "generate_until", "answer", "exact_match",
                    "generation_kwargs: {max_new_tokens: 10, num_beams: 1, do_sample: false}"),
    "scenes_choices": ("scenes_aokvqa", "multiple_choice", "label", "acc",
                       "doc_to_choice: !function utils.choices"),
}  # fmt: skip
"""Name -> our benchmark, kind of answer, field of the right one, metric, further settings."""


def record(example: Example, benchmark: Benchmark, root: Path) -> dict[str, Any]:
    answer = Counter(example.answers).most_common(1)[0][0]
    choices = list(example.choices) or [answer]
    return {
        "image": Image.open(root / example.images[0]),
        "prompt": render_prompt(example, benchmark.prompt).prompt,
        "choices": choices,
        "answer": answer,
        "label": choices.index(answer) if answer in choices else 0,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", default="starter")
    parser.add_argument("--root", type=Path, default=Path("data/scenes"))
    parser.add_argument("--limit", type=int, default=100)
    parser.add_argument("--out", type=Path, default=Path("out/lmms"))
    given = parser.parse_args()
    tasks = given.out / "tasks"
    tasks.mkdir(parents=True, exist_ok=True)
    (tasks / "utils.py").write_text(UTILS)
    ours = []
    engine = Engine.from_pretrained(given.model)
    for name, (asked, kind, target, metric, more) in TASKS.items():
        benchmark = BENCHMARKS[asked]
        source = benchmark.source
        prepared = prepare(source, given.root / source, benchmark.split, given.out / "prepared")
        chosen = [prepared[i] for i in pick(len(prepared), given.limit)]
        records = [record(example, benchmark, prepared.image_root) for example in chosen]
        data = (given.out / name).resolve()
        datasets.DatasetDict({"test": datasets.Dataset.from_list(records)}).save_to_disk(data)
        text = TASK.format(data=data, name=name, kind=kind, target=target, metric=metric, more=more)
        (tasks / f"{name}.yaml").write_text(text)
        result = evaluate(engine, benchmark, prepared, limit=given.limit, progress=False)
        right = [p["prediction"] == r["answer"]
                 for p, r in zip(result.predictions, records, strict=True)]  # fmt: skip
        ours.append(f"{name}: {sum(right) / len(right):.4f} of {len(right)} answers equal")
    command = [sys.executable, "-m", "lmms_eval", "--model", "instructblip_engine"]
    command += ["--model_args", f"pretrained={given.model}", "--tasks", ",".join(TASKS)]
    command += ["--include_path", str(tasks), "--output_path", str(given.out / "results")]
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    done = subprocess.run(
        [*command, "--batch_size", "32"],
        env=os.environ | offline, stdout=subprocess.PIPE, text=True, check=True,
    )  # fmt: skip
    print("\n".join(line for line in done.stdout.splitlines() if line.startswith("|")))
    print("\n".join(f"evaluate, {line}" for line in ours))


if __name__ == "__main__":
    main()
