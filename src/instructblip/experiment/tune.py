"""One's own folder of pictures, from the check to the report, in one call."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from instructblip.core.version import __version__
from instructblip.data.custom.folder import (
    FolderSet,
    read_folder,
    split_by_image,
)
from instructblip.data.loader import Loader
from instructblip.data.order import Mixture
from instructblip.data.samples import ImageReader
from instructblip.evaluation.benchmarks.benchmark import Benchmark
from instructblip.evaluation.compare import compare
from instructblip.evaluation.evaluate import evaluate
from instructblip.evaluation.report import write_report
from instructblip.evaluation.result import Result
from instructblip.evaluation.tables import to_markdown
from instructblip.experiment import build as assembly
from instructblip.inference.engine import Engine
from instructblip.model.instructblip import InstructBlip
from instructblip.recipe.schema import Recipe, load_recipe
from instructblip.training.train import train

MOST_MEASURED = 1000
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


def tune(root: Path, start: str, out: Path, overrides: Sequence[str] = ()) -> Path:
    """Check, split, choose settings, evaluate, tune, evaluate, report; returns the report.

    Raises ValueError or FileNotFoundError for what is wrong with the folder, naming every row.
    """
    folder = read_folder(root)
    training, held = split_by_image(folder)
    tasks = Counter(example.task for example in folder.examples)
    print(f"{len(folder)} examples: {dict(tasks)}; {len(held)} held back", flush=True)
    pictures = max(len(example.images) for example in folder.examples)
    recipe = write_recipe(root, start, out, len(training), overrides, pictures)
    before = _measure(assembly.make_engine(recipe, start), held, out / "results" / "before")
    model = assembly.make_model(recipe)
    train(
        model,
        _loader(recipe, training, model),
        _validation(recipe, held, model),
        recipe.training,
        out / "run",
        export=model.save_pretrained,
        notes={"recipe.yaml": recipe.to_yaml()},
    )
    tuned = assembly.make_engine(recipe, str(out / "run"))
    after = _measure(tuned, held, out / "results" / "after")
    results = {"before": before, "after": after}
    print(to_markdown(compare(results)))
    curves = {"run": out / "run" / "metrics.jsonl"}
    return write_report(
        out / "report.html",
        results,
        lead=LEAD,
        curves=curves,
        facts={"version": __version__},
    )


def write_recipe(
    root: Path, start: str, out: Path, examples: int, overrides: Sequence[str], pictures: int = 1
) -> Recipe:
    """Settings for so many examples, of which one shows at most so many ``pictures``, written to
    ``out/recipe.yaml``; ``overrides`` come on top."""
    aware = InstructBlip.from_pretrained(start)
    trainable = sum(p.numel() for _, p in aware.trainable_parameters())
    small = trainable < SMALL
    batch = max(2, min(32 if small else 16, examples // 4 * 2))
    epochs, rate = (30, 1e-3) if small else (3, 1e-5)
    steps = max(20, min(2000, epochs * examples // batch))
    asked = [o.partition("=")[2] for o in overrides if o.startswith("training.steps=")]
    if asked and asked[-1].isdigit():  # the rest follows from it
        steps = int(asked[-1])
    values: dict[str, Any] = {
        "model": {"start": _absolute(start)},
        "data": {
            "root": str(root.absolute()),
            "augment": False,
            "num_frames": max(4, pictures),
            "sets": {"own": {"format": "imagefolder", "root": "."}},
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
        # what is held back validates here; who trains by this recipe has no such set
        "evaluation": {"validation": [], "validation_limit": 64},
    }
    out.mkdir(parents=True, exist_ok=True)
    file = out / "recipe.yaml"
    file.write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf-8")
    recipe = load_recipe(file, overrides)
    file.write_text(recipe.to_yaml(), encoding="utf-8")
    return recipe


def _absolute(start: str) -> str:
    """The name of a model as it holds in any working directory."""
    is_path = start != "starter" and Path(start).exists()
    return str(Path(start).absolute()) if is_path else start


def measures_of(held: FolderSet) -> list[tuple[Benchmark, FolderSet]]:
    """A benchmark for each task among the examples, with its examples."""
    found = []
    for task, (prompt, metric, decoding) in MEASURES.items():
        own = [example for example in held.examples if example.task == task]
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
        if own:
            found.append((benchmark, FolderSet(own, held.image_root, benchmark.name)))
    return found


def _measure(
    engine: Engine, held: FolderSet, out: Path | None, limit: int | None = MOST_MEASURED
) -> list[Result]:
    return [
        evaluate(
            engine,
            benchmark,
            examples,
            limit=limit,
            out=None if out is None else out / benchmark.name,
            progress=False,
        )
        for benchmark, examples in measures_of(held)
    ]


def _loader(recipe: Recipe, training: FolderSet, model: InstructBlip) -> Loader:
    tokens, transform = assembly.read_assets(recipe, model)
    return Loader(
        {"own": training},
        Mixture(sizes={"own": len(training)}, weights={"own": 1.0}, temperature=1.0),
        tokens,
        ImageReader(transform.for_training() if recipe.data.augment else transform),
        batch_size=recipe.training.batch_size,
        seed=recipe.data.seed,
    )


def _validation(recipe: Recipe, held: FolderSet, model: InstructBlip) -> Any:
    tokens, transform = assembly.read_assets(recipe, model)
    engine = Engine(model, tokens, transform)
    engine.images = assembly.make_pictures(recipe, transform)

    def validate(_model: InstructBlip) -> dict[str, float]:
        results = _measure(engine, held, None, recipe.evaluation.validation_limit)
        scores = {result.benchmark: result.value or 0.0 for result in results}
        return {"score": sum(scores.values()) / len(scores), **scores}

    return validate
