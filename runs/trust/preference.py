"""Fewer invented objects: preference training and remedies of decoding, on images that no run saw.

Every seed starts from a tuned model, START/seed0/best and so on (`instructblip train quickstart
training.seed=N data.seed=N`), and is trained further on the captions of its own training set, with
the same number of steps:

- ``dpo`` from pairs of its own responses, ordered by F1 of objects and ROUGE-L;
- ``self_critical`` with the same reward, where it is asked for;
- ``tuning`` on the references, the control: more training may also invent less.

All are measured on captions of fresh images (CHAIR, ROUGE-L, CIDEr), and on the usual benchmarks
with 100 samples each. The start is measured with other decodings as well.

    python runs/trust/preference.py /tmp/work --start runs/five --scenes data/scenes --seeds 3
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from instructblip.core.files import write_json
from instructblip.evaluation.result import Result
from instructblip.evaluation.scoring import scorer_of
from instructblip.experiment.evaluate import evaluate
from instructblip.recipe.load import load_recipe
from instructblip.scenes import write_scenes

STEPS, BATCH = 100, 16
SETS = "data.sets={coco_caption: {}}"
REWARDS = '{"chair scenes": 1, rouge_l: 0.5}'
METHODS = {
    "dpo": f"preference={{rewards: {REWARDS}, pairs: 1600, rpo: 0.2, max_new_tokens: 48}}",
    "self_critical": f"preference={{objective: self_critical, rewards: {REWARDS}}}",
    "tuning": "preference=null",
}
DECODINGS = {
    "5 beams": {"num_beams": 5},
    "repetition penalty 1.3": {"repetition_penalty": 1.3},
    "5 beams, penalty 1.3": {"num_beams": 5, "repetition_penalty": 1.3},
}
CAPTIONS = ("scenes_chair", "scenes_chair_new")
METRICS = ("chair_i", "chair_s", "recall", "rouge_l", "cider")


def train(start: Path, out: Path, scenes: Path, seed: int, method: str, more: list[str]) -> None:
    """Train ``start`` further into ``out``, in a process of its own."""
    if (out / "last").is_dir():
        return
    settings = [
        *(f"model.start={start}", f"data.root={scenes}", SETS, METHODS[method]),
        *("data.check=skip", "features.cache=on", "evaluation.validation=[]"),
        *(f"training.steps={STEPS}", f"training.batch_size={BATCH}", "training.optimizer=adamw"),
        *("training.learning_rate=5e-5", "training.warmup_steps=10", "training.save_every=1000"),
        *(f"training.seed={seed}", f"data.seed={100 + seed}", *more),
    ]
    command = [sys.executable, "-m", "instructblip", "train", "quickstart", *settings]
    subprocess.run([*command, "--out", str(out)], check=True)


def captions(model: Path, root: Path, out: Path, decoding: dict[str, float]) -> dict[str, float]:
    """The scores of captions of the images below ``root``, by benchmark and metric."""
    recipe = load_recipe("quickstart", [f"data.root={root}", "features.cache=off"])
    settings = recipe.evaluation.model_copy(
        update={"benchmarks": CAPTIONS, "limit": None, "decoding": decoding}
    )
    recipe = recipe.model_copy(update={"evaluation": settings})
    results = evaluate(recipe, str(model), out)
    return {f"{r.benchmark} {name}": v for r in results for name, v in scores_of(r).items()}


def scores_of(result: Result) -> dict[str, float]:
    """CHAIR of captions, and ROUGE-L and CIDEr of the same ones."""
    rouge = scorer_of("rouge_l").score(result.predictions)
    scores = {**result.others, "rouge_l": rouge.value or 0.0, **rouge.others}
    return {name: scores[name] for name in METRICS}


def benchmarks(model: Path, scenes: Path, out: Path) -> dict[str, float]:
    """The means of the held-in and held-out benchmarks, 100 samples each."""
    recipe = load_recipe("quickstart", [f"data.root={scenes}", "features.cache=on"])
    results = evaluate(recipe, str(model), out)
    by_role: dict[str, list[float]] = {}
    for result in results:
        by_role.setdefault(result.role, []).append(result.value or 0.0)
    return {f"benchmarks {role}": float(np.mean(values)) for role, values in by_role.items()}


def measure(arguments: argparse.Namespace) -> Iterator[tuple[str, int, dict[str, float]]]:
    """(model, seed, scores), each measured once and read from its file later."""
    work, fresh = arguments.work, arguments.work / "fresh"
    write_scenes(
        fresh, seed=arguments.fresh, scale=arguments.scale, sets=("coco_caption", "nocaps")
    )
    for seed in range(arguments.seeds):
        start = arguments.start / f"seed{seed}" / "best"
        folder = work / f"seed{seed}"
        models = {"start": start}
        for method in arguments.methods:
            train(start, folder / method, arguments.scenes, seed, method, arguments.set)
            models[method] = folder / method / "last"
        for name, model in models.items():
            out = folder / "scores" / name
            if not (out / "all.json").is_file():
                scores = captions(model, fresh, out / "captions", {})
                if not arguments.only_captions:
                    scores |= benchmarks(model, arguments.scenes, out / "benchmarks")
                write_json(out / "all.json", scores)
            yield name, seed, json.loads((out / "all.json").read_text())
        for name, decoding in DECODINGS.items() if arguments.decodings else ():
            out = folder / "scores" / name.replace(" ", "_").replace(",", "")
            if not (out / "all.json").is_file():
                write_json(out / "all.json", captions(start, fresh, out / "captions", decoding))
            yield name, seed, json.loads((out / "all.json").read_text())


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("work", type=Path)
    parser.add_argument("--start", type=Path, required=True, help="folder of seed0/best, ...")
    parser.add_argument("--scenes", type=Path, required=True, help="their training data")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--fresh", type=int, default=12, help="seed of the fresh images")
    parser.add_argument("--scale", type=float, default=1.5, help="of the fresh images")
    parser.add_argument("--methods", nargs="+", default=["dpo", "tuning"], choices=METHODS)
    parser.add_argument("--decodings", action="store_true")
    parser.add_argument("--only-captions", action="store_true")
    parser.add_argument("--set", nargs="*", default=[], help="further overrides of the recipe")
    arguments = parser.parse_args()
    by_model: dict[str, dict[int, dict[str, float]]] = {}
    for name, seed, scores in measure(arguments):
        by_model.setdefault(name, {})[seed] = scores
        print(name, seed, json.dumps({k: round(v, 2) for k, v in scores.items()}), flush=True)
    print_table(by_model)


def print_table(by_model: dict[str, dict[int, dict[str, float]]]) -> None:
    """Means over the seeds, and the change from the start with its 95 % interval over seeds."""
    start = by_model["start"]
    for metric in next(iter(start.values())):
        print(f"\n{metric}: start {np.mean([each[metric] for each in start.values()]):.2f}")
        for name, seeds in by_model.items():
            if name == "start" or metric not in next(iter(seeds.values())):
                continue
            change = [scores[metric] - start[seed][metric] for seed, scores in seeds.items()]
            mean, half = float(np.mean(change)), half_width(change)
            share = mean / np.mean([start[seed][metric] for seed in seeds])
            print(f"  {name:24} {mean:+.2f} +- {half:.2f} ({share:+.0%})")


def half_width(values: list[float]) -> float:
    """Half of the 95 % interval of a mean, by Student's t."""
    t = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78}.get(len(values), float("nan"))
    return t * float(np.std(values, ddof=1)) / len(values) ** 0.5 if len(values) > 1 else t


if __name__ == "__main__":
    main()
