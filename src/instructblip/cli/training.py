"""The commands that train, and those about the recipe that training follows."""

import json
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from typer import Argument, Option

from instructblip.cli import data, evaluation
from instructblip.cli.options import (
    Model,
    Overrides,
    RecipeName,
    Resume,
    Scale,
    read_recipe,
    run_in,
    to_dir,
)

if TYPE_CHECKING:
    from instructblip.evaluation.result import Result
    from instructblip.recipe.schema import Recipe

app = typer.Typer()

NEXT = """
Open {report}: tables, charts, and the answers of both models to each image.{looks}
{out}/results.json holds the same scores. What to type next:
  instructblip train {longer} data.root={world} --out out/longer     a longer run
  instructblip evaluate {longer} {run} data.root={world}             all samples of every set
  instructblip train RECIPE.yaml                                        with your data
"""
LOOKS = """
{out}/looks.png shows where the queries of a Q-Former look under three instructions."""

DENSE_SCALE, DENSE_STEPS = 0.15, 80
"""Of the run behind looks.png: some 45 seconds on two CPU cores."""


@app.command()
def quickstart(
    overrides: Overrides = None,
    out: Annotated[
        Path | None, to_dir("Folder of all it writes; out/quickstart or -real if absent.")
    ] = None,
    resume: Resume = False,
    scale: Scale = 1.0,
    real: Annotated[bool, Option("--real", help="On real images, from the start `small`.")] = False,
    packages: Annotated[
        Path, Option(help="--real: the folder of `pictures fetch`.", file_okay=False)
    ] = Path("data/packages"),
) -> None:
    """Tune a small BLIP-2 on the embedded world and compare before and after: minutes, offline."""
    from instructblip.experiment.evaluate import evaluate
    from instructblip.experiment.train import train as run_training
    from instructblip.model.checkpoints.directory import model_directory

    out = out or Path("out/quickstart-real" if real else "out/quickstart")
    world = out / ("pictures" if real else "scenes")
    name = "quickstart_real" if real else "quickstart"
    recipe = read_recipe(name, [f"data.root={world}", *(overrides or [])])
    model_directory(recipe.model.start)  # a missing start is reported before the world is written
    run, results = out / "run", out / "results"
    seconds: dict[str, float] = {}
    if not resume:
        _remove_earlier(run, out / "dense_run", *results.glob("*"))
    with _clock(seconds, world.name):
        if real:
            data.write(world, packages, scale=scale)
        else:
            data.scenes(world, scale=scale)
    with _clock(seconds, "evaluate_blip2"):
        before = evaluate(recipe, recipe.model.start, results / "blip2", instruction_aware=False)
    with _clock(seconds, "train"):
        if run_training(recipe, run, resume).stopped == "terminated":
            return
    tuned = str(run / "last")  # not the best: validation chose that on images evaluated here
    with _clock(seconds, "evaluate_instructblip"):
        after = evaluate(recipe, tuned, results / "instructblip")
    with _clock(seconds, "evaluate_blind"):
        blind = evaluate(recipe, tuned, results / "instructblip_blind", blind_seed=0)
    models = {"blip2": before, "instructblip": after, "instructblip_blind": blind}
    folders = [results / each for each in models]
    if real:
        with _clock(seconds, "baselines"):
            models |= _baselines(recipe.model.start, after, packages)
            for each in ("constant", "linear_probe"):
                for result in models[each]:
                    result.save_with_predictions(results / each / result.benchmark)
                folders.append(results / each)
    with _clock(seconds, "report"):
        evaluation.report(folders, out / "report.html", [run], images=[world])
    if not real:
        with _clock(seconds, "looks"):
            if not _tune_and_look(out, recipe, resume, scale):
                return
    _write_results(out / "results.json", seconds, models)
    evaluation.compare(folders)
    longer = name if real else "scenes"
    looks = "" if real else LOOKS.format(out=out)
    shown = {"report": out / "report.html", "longer": longer, "world": world, "looks": looks}
    print(NEXT.format(out=out, run=run, **shown))


def _tune_and_look(out: Path, other: "Recipe", resume: bool, scale: float) -> bool:
    """Tune the start of the dense world and draw, in OUT/looks.png, where its queries look in an
    image that it has not seen. It has the device of the other recipe, and no more steps. Returns
    False if a signal interrupted it."""
    import random

    from instructblip.experiment.train import train as run_training
    from instructblip.inference.engine import Engine
    from instructblip.inference.looks import draw_looks
    from instructblip.scenes.dense import ask_one_each, render_dense, sample_dense

    world, run = out / "dense", out / "dense_run"
    data.scenes(world, scale=DENSE_SCALE * scale, dense=True)
    steps = min(DENSE_STEPS, other.training.steps)
    settings = [f"data.root={world}", f"training.device={other.training.device}"]
    settings += [f"training.steps={steps}", f"training.warmup_steps={steps // 10}"]
    if run_training(read_recipe("dense", settings), run, resume).stopped == "terminated":
        return False
    scene = sample_dense(random.Random("quickstart"))
    asked = [f"Question: {each.text} Short answer:" for each in ask_one_each(scene)]
    draw_looks(Engine.from_pretrained(str(run)), render_dense(scene), asked, out / "looks.png")
    return True


def _baselines(start: str, after: "list[Result]", packages: Path) -> "dict[str, list[Result]]":
    """The best constant answers, and what a linear probe of the image encoder knows."""
    from instructblip.evaluation.verdict import constant_result
    from instructblip.experiment.probe import PROBED, Probe
    from instructblip.inference.engine import Engine

    probe = Probe(Engine.from_pretrained(start), packages)
    return {
        "constant": [constant_result(result) for result in after],
        "linear_probe": [probe.answer(each) for each in after if each.benchmark in PROBED],
    }


def _write_results(
    path: Path, seconds: dict[str, float], models: "dict[str, list[Result]]"
) -> None:
    """Write the scores of several models, 0 to 100, and the seconds that each step took."""
    from instructblip.core.files import write_json
    from instructblip.evaluation.compare import summarise

    scores = {
        name: {role: mean.value for role, mean in summarise(results).items()}
        | {"datasets": {result.benchmark: result.value for result in results}}
        for name, results in models.items()
    }
    seconds = {**seconds, "total": sum(seconds.values())}
    rounded = {step: round(value, 1) for step, value in seconds.items()}
    write_json(path, {"seconds": rounded, "models": scores}, indent=2)


@contextmanager
def _clock(seconds: dict[str, float], name: str) -> Iterator[None]:
    began = time.monotonic()
    yield
    seconds[name] = time.monotonic() - began


def _remove_earlier(*folders: Path) -> None:
    """Remove what an earlier quickstart wrote; anything else there belongs to the user."""
    from instructblip.recipe.schema import RECIPE_FILE
    from instructblip.training.run_directory import LOCK_FILE, claim

    for folder in filter(Path.exists, folders):
        if {RECIPE_FILE, LOCK_FILE}.isdisjoint(path.name for path in folder.iterdir()):
            raise ValueError(
                f"{folder} was not written by a quickstart: choose another folder with --out"
            )
        with claim(folder):  # nor is another one training there
            shutil.rmtree(folder)


@app.command()
def train(
    recipe: RecipeName,
    overrides: Overrides = None,
    out: Annotated[Path | None, to_dir("Run directory; out/<recipe> by default.")] = None,
    resume: Resume = False,
) -> None:
    """Tune the model of a recipe."""
    from instructblip.experiment.train import train as run

    run(read_recipe(recipe, overrides), out or Path("out") / Path(recipe).stem, resume)


@app.command()
def status(run: Annotated[Path, Argument(help="A run directory.")]) -> None:
    """Print how far a run is, as JSON: step, last losses, last validation, if it trains now."""
    from instructblip.core.files import is_locked
    from instructblip.recipe.load import read_values
    from instructblip.recipe.schema import RECIPE_FILE
    from instructblip.training.checkpoint import complete_steps
    from instructblip.training.log import METRICS, read_metrics
    from instructblip.training.run_directory import LOCK_FILE

    run = run_in(run)
    recipe = run / RECIPE_FILE
    if not recipe.is_file():
        raise FileNotFoundError(f"{run} holds no {RECIPE_FILE}: give the directory of a run")
    logged = read_metrics(run / METRICS)
    last = next((each for each in reversed(logged) if "loss" in each), {})
    validated = [each for each in logged if "validation" in each]
    shown = {
        "run": str(run),
        "running": is_locked(run / LOCK_FILE),
        "step": max([0, *(each["step"] for each in logged), *complete_steps(run / "checkpoints")]),
        "steps": read_values(recipe).get("training", {}).get("steps"),
        "last": last,
        "validation": validated[-1]["validation"] if validated else None,
    }
    print(json.dumps(shown, indent=2))


@app.command()
def tune(
    root: Annotated[Path, Argument(help="Folder of images with captions or questions.")],
    overrides: Overrides = None,
    model: Model = "starter",
    out: Annotated[Path, to_dir("Folder of run, results and report.")] = Path("out/tuned"),
    split: Annotated[
        Literal["images", "column", "files"] | None,
        Option(help="Split by a hash of images, a column `split`, or files."),
    ] = None,
    group: Annotated[
        str | None, Option(help="Column, or regex over paths, that may not be on two sides.")
    ] = None,
    anyway: Annotated[bool, Option("--anyway", help="Also if it cannot say the answers.")] = False,
    resume: Resume = False,
) -> None:
    """Tune a model on a folder of your data: check, split, tune, evaluate before and after."""
    from instructblip.experiment.folder import read_to_tune

    sides = read_to_tune(root, model, out, overrides or [], resume, split, group)
    from instructblip.experiment.tune import tune as run  # a bad row needs no torch

    tuned = run(root, model, out, overrides or [], resume, split, group, anyway, sides)
    if tuned is None:
        return
    print(f"\nOpen {tuned.report}.")
    if tuned.verdict.is_better:
        print(f"To try the model:\n  instructblip serve --model {out / 'run'}")
    else:
        print("The tuned model is not clearly better. To compare it with its start by hand:")
        print(f"  instructblip serve --model {out / 'run'} --before {model}")


@app.command()
def pretrain(
    recipe: RecipeName,
    overrides: Overrides = None,
    stage: Annotated[
        Literal["1", "align", "2", "retrieval"],
        Option(help="1: see; align: see as words; 2: tell; retrieval: search."),
    ] = "1",
    out: Annotated[Path | None, to_dir("Run directory; out/<recipe>_stage<N> if absent.")] = None,
    resume: Resume = False,
) -> None:
    """Run a stage of pre-training for a new pair of image encoder and language model.

    Stages 1 and 2 are BLIP-2's. Align stands between them and needs no pass of the language model.
    Retrieval adds to any model what `instructblip search` needs and leaves its answers as they are.
    """
    from instructblip.experiment.pretrain import Stage
    from instructblip.experiment.pretrain import pretrain as run

    folder = out or Path("out") / f"{Path(recipe).stem}_stage{stage}"
    stages: dict[str, Stage] = {"1": 1, "align": "align", "2": 2, "retrieval": "retrieval"}
    run(read_recipe(recipe, overrides), stages[stage], folder, resume)


@app.command(name="recipe")
def recipe_(
    name: Annotated[str | None, Argument(help="A shipped recipe or a YAML file.")] = None,
) -> None:
    """Print a recipe with a sentence above each setting, to edit: recipe NAME > my.yaml."""
    from instructblip.recipe.writing import commented, titles

    if name is not None:
        print(commented(name), end="")
        return
    for shipped, title in titles().items():
        print(f"{shipped:22} {title}")


@app.command()
def schema() -> None:
    """Print the JSON schema of a recipe, with which an editor completes and checks settings."""
    from instructblip.recipe.writing import json_schema

    print(json.dumps(json_schema(), indent=2))


@app.command()
def memory(
    recipe: RecipeName,
    overrides: Overrides = None,
    devices: Annotated[
        int, Option(min=1, help="How many devices share a batch, or with --answer the layers.")
    ] = 1,
    gigabytes: Annotated[float | None, Option(help="GiB of each; else of the GPU here.")] = None,
    answer: Annotated[
        bool, Option("--answer", help="Of a model that answers: give it instead of a recipe.")
    ] = False,
    samples: Annotated[int, Option(min=1, help="--answer: samples at a time.")] = 1,
) -> None:
    """Predict the memory that a recipe needs on each device, without loading anything."""
    import torch

    from instructblip.experiment.evaluate import recipe_of
    from instructblip.experiment.memory import (
        advise,
        fit_micro_batches,
        predict_answer,
        predict_memory,
        usable_bytes,
    )

    resolved = read_recipe(recipe_of(recipe) if answer else recipe, overrides)
    available = None if gigabytes is None else int(gigabytes * 2**30)
    if available is None and torch.cuda.is_available():
        available = usable_bytes()
    if answer:
        needed = predict_answer(resolved, recipe, samples)
        sizes = {
            "fixed": needed.fixed,
            "layers": sum(needed.layers),
            "cache": needed.cache * len(needed.layers),
            "passing": needed.passing,
            "peak": needed.peak,
        }
        _print_sizes(sizes)
        if available is not None:
            print(needed.advise(available, devices, resolved.evaluation.quantize))
        return
    fitted = fit_micro_batches(resolved, devices, available)
    predicted = predict_memory(fitted, devices)
    shares = ("frozen", "trained", "optimizer", "gradients", "activations", "passing", "encoder")
    _print_sizes({name: getattr(predicted, name) for name in (*shares, "peak")})
    if fitted != resolved:
        print(f"training.tokens_per_micro_batch={fitted.training.tokens_per_micro_batch}")
    if available is not None:
        print(advise(predicted, available, fitted, devices))


def _print_sizes(sizes: dict[str, int]) -> None:
    for name, size in sizes.items():
        print(f"{name:12} {size / 2**30:9.3f} GiB")
