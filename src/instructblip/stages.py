"""What the command line can do, one function a stage; each is short and calls the package.

Stages import what they need when they run, so that `instructblip --help` stays fast.
"""

import json
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from instructblip.evaluation.result import Result
    from instructblip.recipe import Recipe
    from instructblip.training.train import TrainResult

RECIPE_FILE = "recipe.yaml"
RESULTS_FILE = "results.json"
Form = Literal["table", "markdown", "latex", "json"]


def scenes(root: Path, seed: int = 0, scale: float = 1.0) -> None:
    """Write the embedded world below ``root``, each set in its official format."""
    from instructblip.data.scenes.official import write_scenes

    folders = write_scenes(root, seed=seed, scale=scale)
    print(f"{len(folders)} data sets in {root}: {', '.join(folders)}")


def prepare(recipe: "Recipe") -> None:
    """Read, verify and index the recipe's data sets; print the mixture."""
    from instructblip import assembly

    datasets = assembly.prepare_training(recipe)
    print(assembly.describe_mixture(recipe, assembly.make_mixture(recipe, datasets)))


def train(recipe: "Recipe", out: Path, resume: bool = False) -> "TrainResult":
    """Tune the recipe's model; checkpoints, metrics, curves and the model itself go to ``out``."""
    from instructblip import assembly, distributed
    from instructblip.training.train import train as run_training

    with distributed.process_group():
        if distributed.is_main():
            _store_recipe(recipe, out, resume)
        if recipe.drawing is not None:
            from instructblip import drawing

            model = drawing.make_model(recipe)
            return run_training(
                model,
                drawing.make_batches(recipe, model),
                drawing.make_validation(recipe, model),
                recipe.training,
                out,
                resume=resume,
                export=lambda path: drawing.save_pretrained(model, path),
                notes={RECIPE_FILE: recipe.to_yaml()},
            )
        with assembly.main_first():
            datasets = assembly.prepare_training(recipe)
        if distributed.is_main():
            print(assembly.describe_mixture(recipe, assembly.make_mixture(recipe, datasets)))
        model = assembly.make_model(recipe)
        return run_training(
            model,
            assembly.make_loader(recipe, datasets, model),
            assembly.make_validation(recipe, model),
            recipe.training,
            out,
            resume=resume,
            export=model.save_pretrained,
            notes={RECIPE_FILE: recipe.to_yaml()},
        )


def draw(
    instruction: str,
    out: Path,
    model: str = "starter",
    image: Path | None = None,
    num_images: int = 1,
    seed: int | None = None,
    steps: int = 20,
    guidance: float = 2.0,
    image_guidance: float | None = None,
) -> list[Path]:
    """Draw ``instruction`` into ``out``; several pictures get a number each: x_0.png, x_1.png."""
    from instructblip.text_to_image.sample import Painter, save_picture

    if out.suffix.lower() not in (".png", ".jpg", ".jpeg", ".webp"):
        raise ValueError(f"--out {out}: expected a file that ends in .png, .jpg or .webp")
    pictures = Painter.from_pretrained(model).draw(
        instruction, image, num_images, seed,
        steps=steps, guidance=guidance, image_guidance=image_guidance,
    )  # fmt: skip
    names = [out] if num_images == 1 else [
        out.with_stem(f"{out.stem}_{i}") for i in range(num_images)
    ]  # fmt: skip
    for picture, name in zip(pictures, names, strict=True):
        save_picture(picture, name)
        print(name)
    return names


def cache(recipe: "Recipe") -> None:
    """Compute and keep the image features that training and validation will read."""
    from instructblip import assembly, distributed

    settings = recipe.features.model_copy(update={"cache": "on"})
    recipe = recipe.model_copy(update={"features": settings})
    with distributed.process_group():
        with assembly.main_first():
            datasets = assembly.prepare_training(recipe)
        model = assembly.make_model(recipe)
        assembly.make_loader(recipe, datasets, model)
        assembly.make_validation(recipe, model)


def evaluate(
    recipe: "Recipe",
    model: str,
    out: Path,
    blind_seed: int | None = None,
    instruction_aware: bool | None = None,
) -> "list[Result]":
    """Answer the recipe's benchmarks with ``model``; one folder of ``out`` for each."""
    from instructblip import assembly
    from instructblip.evaluation.evaluate import evaluate as run_benchmark

    settings = recipe.evaluation
    benchmarks = assembly.benchmarks_of(recipe, settings.benchmarks)
    datasets = assembly.prepare_benchmarks(recipe, benchmarks)
    engine = assembly.make_engine(recipe, model, instruction_aware)
    # twice: benchmarks are answered again, by the next model or without the pictures
    assembly.use_features(recipe, engine, datasets.values(), settings.limit, times=2)
    out.mkdir(parents=True, exist_ok=True)
    (out / RECIPE_FILE).write_text(recipe.to_yaml(), encoding="utf-8")
    results = []
    for benchmark in benchmarks:
        result = run_benchmark(
            engine,
            benchmark,
            datasets[benchmark.name],
            limit=settings.limit,
            batch_size=settings.batch_size,
            blind_seed=blind_seed,
            out=out / benchmark.name,
            vocabulary=assembly.vocabulary_of(recipe, benchmark),
        )
        print(result.describe(), flush=True)
        results.append(result)
    return results


def compare(folders: Sequence[Path], form: Form = "table") -> None:
    """Print the figures of two or more result folders, each held to the first."""
    from rich.console import Console

    from instructblip.evaluation import compare as comparing

    comparison = comparing.compare(load_results(folders))
    if form == "table":
        console = Console()
        if not console.is_terminal:
            console = Console(width=max(120, console.width))
        console.print(comparing.to_rich(comparison))
    elif form == "json":
        print(json.dumps(comparing.to_json(comparison), indent=2))
    else:
        print(
            comparing.to_latex(comparison) if form == "latex" else comparing.to_markdown(comparison)
        )


def report(folders: Sequence[Path], out: Path, runs: Sequence[Path] = ()) -> Path:
    """Write one offline HTML file: tables, a gallery of answers, the curves of ``runs``."""
    from instructblip import __version__
    from instructblip.evaluation.report import write_report

    return write_report(
        out,
        load_results(folders),
        curves={run.name: run / "metrics.jsonl" for run in runs},
        facts={"version": __version__},
    )


def load_results(folders: Sequence[Path]) -> "dict[str, list[Result]]":
    """The results of each folder that `evaluate` wrote, by the folder's name."""
    from instructblip.evaluation.result import Result

    found = {}
    for folder in folders:
        paths = sorted(folder.glob("*/result.json"))
        if not paths:
            raise FileNotFoundError(f"{folder} holds no results: run `instructblip evaluate` first")
        found[folder.name] = [Result.load(path.parent) for path in paths]
    return found


def quickstart(
    out: Path, overrides: Sequence[str] = (), resume: bool = False, scale: float = 1.0
) -> None:
    """From a BLIP-2 to an InstructBLIP on the embedded world, with tables, in minutes."""
    from instructblip.recipe import load_recipe

    recipe = load_recipe("quickstart", [f"data.root={out / 'scenes'}", *overrides])
    run, results = out / "run", out / "results"
    seconds: dict[str, float] = {}
    if not resume:
        _start_afresh(run, results)
    with _clock(seconds, "scenes"):
        scenes(out / "scenes", scale=scale)
    with _clock(seconds, "evaluate_blip2"):
        before = evaluate(recipe, recipe.model.start, results / "blip2", instruction_aware=False)
    with _clock(seconds, "train"):
        if train(recipe, run, resume).stopped == "terminated":
            return
    tuned = str(run / "last")  # not the best: validation chose that on pictures measured here
    with _clock(seconds, "evaluate_instructblip"):
        after = evaluate(recipe, tuned, results / "instructblip")
    with _clock(seconds, "evaluate_blind"):
        blind = evaluate(recipe, tuned, results / "instructblip_blind", blind_seed=0)
    models = {"blip2": before, "instructblip": after, "instructblip_blind": blind}
    folders = [results / name for name in models]
    with _clock(seconds, "report"):
        page = report(folders, out / "report.html", [run])
    write_results(out / RESULTS_FILE, seconds, models)
    compare(folders)
    print(NEXT.format(out=out, run=run, report=page))


NEXT = """
Open {report}: tables, curves, and what both models said about each picture.
{out}/results.json holds the same figures. What to type next:
  instructblip train scenes data.root={out}/scenes --out out/longer     a longer run
  instructblip evaluate scenes {run} data.root={out}/scenes             all samples of every set
  instructblip train RECIPE.yaml                                        with data of your own
"""


def write_results(path: Path, seconds: dict[str, float], models: "dict[str, list[Result]]") -> None:
    """Write the figures of several models, 0 to 100, and what each stage took in seconds."""
    from instructblip.evaluation.result import summarise

    found = {}
    for name, results in models.items():
        means = {role: mean.value for role, mean in summarise(results).items()}
        found[name] = {**means, "datasets": {r.benchmark: r.value for r in results}}
    seconds = {**seconds, "total": sum(seconds.values())}
    rounded = {stage: round(value, 1) for stage, value in seconds.items()}
    path.write_text(json.dumps({"seconds": rounded, "models": found}, indent=2) + "\n")


@contextmanager
def _clock(seconds: dict[str, float], name: str) -> Iterator[None]:
    began = time.monotonic()
    yield
    seconds[name] = time.monotonic() - began


def _start_afresh(run: Path, results: Path) -> None:
    """Remove what an earlier quickstart left; anything else there is the user's."""
    for folder in (run, *results.glob("*")):
        if folder.exists() and not (folder / RECIPE_FILE).is_file():
            raise ValueError(
                f"{folder} was not written by a quickstart: choose another folder with --out"
            )
        shutil.rmtree(folder, ignore_errors=True)


def _store_recipe(recipe: "Recipe", out: Path, resume: bool) -> None:
    """Write the recipe into the run directory; name what a resumed run changes."""
    from instructblip.recipe import differences, load_recipe
    from instructblip.training.files import refuse_existing

    path = out / RECIPE_FILE
    if not resume:
        refuse_existing(out)
    if resume and path.is_file():
        for change in differences(load_recipe(path), recipe):
            print(f"resuming with a changed recipe: {change}")
    out.mkdir(parents=True, exist_ok=True)
    path.write_text(recipe.to_yaml(), encoding="utf-8")
