"""Tune and evaluate every condition of the paper's claims on Scenes, several seeds each.

A condition is a list of overrides of the recipe ``scenes``. ``WORK/<condition>/seed<N>`` holds the
run and its results; what is finished there is not done again.
"""

import argparse
import json
import time
from pathlib import Path

from instructblip import stages
from instructblip.evaluation.benchmarks import select_benchmarks
from instructblip.recipe import load_recipe

SETS = ["coco_caption", "vqav2", "okvqa", "aokvqa", "ocrvqa", "textcaps"]
SETS += ["vqav2_question", "llava_conversation"]

# Figure 4: the input without an instruction, and with the name of the data set in its place.
# Question generation and conversations bring no name of their own: they keep the question.
PLAIN = {
    "coco_caption": "",
    "textcaps": "",
    "aokvqa": "{question} {options}",
    **dict.fromkeys(("vqav2", "okvqa", "ocrvqa", "vqav2_question"), "{question}"),
}
NAMED = {name: f"{name}: {text}".strip() for name, text in PLAIN.items()}


def templates(by_set: dict[str, str]) -> list[str]:
    """Overrides that give each set its one template."""
    return [f"data.sets.{name}.templates={json.dumps([text])}" for name, text in by_set.items()]


def named_prompts() -> list[str]:
    """Overrides that ask every benchmark as ``NAMED`` asks in training."""
    found = []
    for benchmark in select_benchmarks(["scenes"]):
        places = [f"{{{p}}}" for p in ("context", "history", "ocr_tokens", "question", "options")
                  if f"{{{p}}}" in benchmark.prompt]  # fmt: skip
        prompt = f"{benchmark.source}: {' '.join(places)}".strip()
        found.append(f"evaluation.prompts.{benchmark.name}={json.dumps(prompt)}")
    return found


TUNED: dict[str, list[str]] = {
    "instructblip": [],
    "no_instruction_in_qformer": ["model.instruction_aware=false"],
    # All sets equally often, and no weights by hand.
    "no_balancing": [
        "data.temperature=0",
        *(f"data.sets.{name}.weight=1" for name in SETS),
    ],
    "multitask_plain": templates(PLAIN),
    "multitask_names": templates(NAMED),
}
"""Condition -> overrides of the recipe."""

DOWNSTREAM = {"scienceqa": "scenes_scienceqa", "okvqa": "scenes_okvqa"}
"""Set to fine-tune on -> its benchmark. The first was held out from tuning, the second was not."""


def tune(folder: Path, overrides: list[str], seed: int) -> None:
    seeds = [f"training.seed={seed}", f"data.seed={seed}"]
    recipe = load_recipe("scenes", [*overrides, *seeds])
    if not (folder / "last" / "config.json").is_file():
        stages.train(recipe, folder, resume=(folder / "checkpoints").is_dir())


def measure(model: str, out: Path, overrides: list[str]) -> None:
    """Evaluation resumes by itself, and reads what is finished."""
    stages.evaluate(load_recipe("scenes", overrides), model, out)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("work", type=Path)
    parser.add_argument("--start", default="starter", help="the BLIP-2 to begin with")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--finetune-steps", type=int, default=60)
    parser.add_argument("--limit", type=int, default=100, help="samples of each benchmark")
    parser.add_argument("--scale", type=float, default=1.0, help="size of the data sets")
    parser.add_argument("overrides", nargs="*", help="further overrides of every recipe")
    given = parser.parse_intermixed_args()
    began = time.monotonic()
    data = given.work / "scenes"
    stages.scenes(data, scale=given.scale)
    common = [f"data.root={data}", f"evaluation.limit={given.limit}", f"model.start={given.start}"]
    common += ["training.validate_every=null", "evaluation.validation=[scenes_vqav2]"]
    common += ["evaluation.validation_limit=8", *given.overrides]

    def schedule(steps: int) -> list[str]:
        return [f"training.steps={steps}", f"training.warmup_steps={max(1, steps // 10)}"]

    measure(given.start, given.work / "blip2" / "seed0" / "results", common)
    for seed in range(given.seeds):
        for condition, overrides in TUNED.items():
            run = given.work / condition / f"seed{seed}"
            # The held-out sets of training are left as they are: only the mixture changes.
            tune(run, [*common, *schedule(given.steps), *overrides], seed)
            measure(f"{run}/last", run / "results", common)
            if condition == "multitask_names":
                asked = [*common, *named_prompts()]
                again = given.work / "multitask_names_asked_by_name" / f"seed{seed}" / "results"
                measure(f"{run}/last", again, asked)
        tuned = given.work / "instructblip" / f"seed{seed}" / "last"
        for name, benchmark in DOWNSTREAM.items():
            only = [f"data.sets={{{name}: {{}}}}", f"evaluation.benchmarks=[{benchmark}]"]
            starts = {
                "blip2": ["model.instruction_aware=false"],
                "instructblip": [f"model.start={tuned}"],
            }
            for start, overrides in starts.items():
                run = given.work / f"{start}_finetuned_{name}" / f"seed{seed}"
                settings = [*common, *schedule(given.finetune_steps), *only, *overrides]
                tune(run, settings, seed)
                measure(f"{run}/last", run / "results", settings)
    minutes = (time.monotonic() - began) / 60
    settings = vars(given) | {"work": str(given.work), "minutes": round(minutes, 1)}
    (given.work / "settings.json").write_text(json.dumps(settings, indent=1) + "\n")
    print(f"took {minutes:.1f} minutes")


if __name__ == "__main__":
    main()
