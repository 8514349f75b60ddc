"""Tuning on a folder of images: check, split, choose settings, evaluate, train, report."""

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from instructblip.core import distributed
from instructblip.core.files import write_text
from instructblip.core.version import __version__
from instructblip.data.custom.folder import FolderSet, read_folder, split_by_image
from instructblip.evaluation.benchmarks import Benchmark
from instructblip.evaluation.compare import compare
from instructblip.evaluation.report import write_report
from instructblip.evaluation.result import Result
from instructblip.evaluation.tables import to_markdown
from instructblip.experiment.build import Data, Variant, build
from instructblip.experiment.datasets import Held
from instructblip.experiment.evaluate import load_engine, score
from instructblip.model.instructblip import InstructBlip
from instructblip.recipe.load import load_recipe
from instructblip.recipe.schema import RECIPE_FILE, Recipe
from instructblip.training.run_directory import refuse_existing

SET = "own"
"""The entry of ``data.sets`` that stands for the folder."""
MOST_EVALUATED = 1000
"""Held-back examples of a task that are answered before and after."""
SMALL = 20_000_000
"""Trainable parameters below which a model is small: it takes higher rates and more epochs."""
LEAD = (
    "What was held back, before and after. The step that is kept is the one with the best score on "
    "some of these same examples, which makes the figure after a little too high; the interval "
    "does not cover this choice."
)

# task -> prompt, metric, decoding: how a held-back example is asked and scored
MEASURES: dict[str, tuple[str, str, dict[str, int]]] = {
    "caption": ("A short image description.", "rouge_l", {"max_new_tokens": 60}),
    "vqa": ("Question: {question} Short answer:", "exact_match", {"max_new_tokens": 16}),
    "instruct": ("{question}", "rouge_l", {"max_new_tokens": 80}),
    "multiple_choice": (
        "Question: {question} Options: {options}. Short answer:",
        "exact_match",
        {},
    ),
}


@dataclass(frozen=True)
class FolderTuning(Variant):
    """Trains on one side of a folder and validates on the other."""

    training: FolderSet
    held: FolderSet

    def refuse(self, recipe: Recipe) -> None:
        most = max(len(e.images) for side in (self.training, self.held) for e in side.examples)
        if most > recipe.data.num_frames:
            raise ValueError(
                f"an example has {most} images and data.num_frames={recipe.data.num_frames} "
                "shows fewer: raise it, or leave it out"
            )

    def validates(self, recipe: Recipe) -> bool:
        return True

    def read_data(self, recipe: Recipe) -> Data:
        return Data({SET: self.training}, {SET: fingerprint(self.training)}, held_sets(self.held))


def tune(
    root: Path, start: str, out: Path, overrides: Sequence[str] = (), resume: bool = False
) -> Path | None:
    """Tune ``start`` on the folder ``root`` and compare before and after.

    Returns the report, or None if a signal interrupted the run, which ``resume`` continues.

    Raises ValueError or FileNotFoundError for what is wrong with the folder, naming every row.
    """
    if not resume:
        refuse_existing(out / "run")
    languages = [o for o in overrides if o.startswith(f"data.sets.{SET}.language=")]
    folder = read_folder(root, *(o.partition("=")[2] for o in languages[-1:]))
    training, held = split_by_image(folder)
    images = max(len(example.images) for example in folder.examples)
    variant, sets = FolderTuning(training, held), held_sets(held)
    with distributed.process_group():
        if distributed.is_main():
            tasks = Counter(example.task for example in folder.examples)
            print(f"{len(folder)} examples: {dict(tasks)}; {len(held)} held back", flush=True)
            write_recipe(root, start, out, len(training), overrides, images)
        distributed.barrier()
        recipe = load_recipe(out / RECIPE_FILE)
        variant.refuse(recipe)
        results = {"before": _evaluate(recipe, start, sets, out / "results/before")}
        result = build(recipe, variant, out / "run", resume).train(out / "run", resume)
        if result.stopped == "terminated":
            return None
        results["after"] = _evaluate(recipe, str(out / "run"), sets, out / "results/after")
        page = out / "report.html"
        if distributed.is_main():
            print(to_markdown(compare(results)))
            curves = {"run": out / "run" / "metrics.jsonl"}
            facts = {"version": __version__}
            write_report(page, results, lead=LEAD, curves=curves, facts=facts)
        return page


def write_recipe(
    root: Path, start: str, out: Path, examples: int, overrides: Sequence[str], images: int = 1
) -> Recipe:
    """Choose settings for ``examples`` training examples of at most ``images`` images each, write
    them to ``out/recipe.yaml`` and return them; ``overrides`` have precedence."""
    model = InstructBlip.from_pretrained(start)
    small = sum(p.numel() for _, p in model.trainable_parameters()) < SMALL
    batch = max(2, min(32 if small else 16, examples // 4 * 2))
    epochs, rate = (30, 1e-3) if small else (3, 1e-5)
    steps = max(20, min(2000, epochs * examples // batch))
    asked = [o.partition("=")[2] for o in overrides if o.startswith("training.steps=")]
    if asked and asked[-1].isdigit():  # warm-up, validation and checkpoints follow from it
        steps = int(asked[-1])
    values: dict[str, Any] = {
        "model": {"start": _absolute(start)},
        "data": {
            "root": str(root.absolute()),
            "augment": False,
            "num_frames": max(4, images),
            "sets": {SET: {"format": "imagefolder", "root": "."}},
        },
        "training": {
            "steps": steps,
            "batch_size": batch,
            "learning_rate": rate,
            "warmup_steps": steps // 10,
            "validate_every": max(1, steps // 4),
            "save_every": max(1, steps // 4),
            "workers": 0,
            "precision": "fp32" if small else "bf16",
        },
        "features": {"root": str((out / "features").absolute())},
        # `tune` validates on what it held back; who trains by this recipe has no such set
        "evaluation": {"validation": [], "validation_limit": 64},
    }
    file = out / RECIPE_FILE
    write_text(file, yaml.safe_dump(values, sort_keys=False))
    recipe = load_recipe(file, overrides)
    write_text(file, recipe.to_yaml())
    return recipe


def _absolute(start: str) -> str:
    """The name of a model as it holds in any working directory."""
    is_path = start != "starter" and Path(start).exists()
    return str(Path(start).absolute()) if is_path else start


def held_sets(held: FolderSet) -> list[Held]:
    """A benchmark for each task among the held-back examples, with its examples."""
    sets = []
    for task, (prompt, metric, decoding) in MEASURES.items():
        examples = [example for example in held.examples if example.task == task]
        benchmark = Benchmark(
            name=f"own_{task}",
            title=f"own {task.replace('_', ' ')}",
            source="imagefolder",
            split="val",
            prompt=prompt,
            mode="rank" if task == "multiple_choice" else "generate",
            metric=metric,
            role="held_in",
            decoding=decoding,
        )
        if examples:
            sets.append(Held(benchmark, FolderSet(examples, held.image_root, benchmark.name)))
    return sets


def fingerprint(folder: FolderSet) -> str:
    """Number of examples, and a digest of their texts and of the files of their images."""
    digest = hashlib.sha256()
    for example in folder.examples:
        digest.update(repr(example).encode())
        for name in example.images:
            digest.update(hashlib.sha256((folder.image_root / name).read_bytes()).digest())
    return f"{len(folder)} {digest.hexdigest()[:16]}"


def _evaluate(recipe: Recipe, model: str, sets: Sequence[Held], out: Path) -> list[Result]:
    engine, settings = load_engine(recipe, model), recipe.evaluation
    options = {"limit": MOST_EVALUATED, "progress": False}
    return [
        score(engine, held, settings, out=out / held.benchmark.name, **options) for held in sets
    ]
