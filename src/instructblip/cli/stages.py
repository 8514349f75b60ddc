"""What the command line can do, one function a stage; each is short and calls the package.

Stages import what they need when they run, so that `instructblip --help` stays fast.
"""

import os
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from instructblip.cli.stages_measure import (
    RECIPE_FILE,
    compare,
    evaluate,
    report,
)

if TYPE_CHECKING:
    from instructblip.data.export import Form as DataForm
    from instructblip.evaluation.result import Result
    from instructblip.recipe.schema import Recipe
    from instructblip.training.train import TrainResult

RESULTS_FILE = "results.json"


def scenes(root: Path, seed: int = 0, scale: float = 1.0) -> None:
    """Write the embedded world below ``root``, each set in its official format."""
    from instructblip.scenes.official import write_scenes

    folders = write_scenes(root, seed=seed, scale=scale)
    print(f"{len(folders)} data sets in {root}: {', '.join(folders)}")


def prepare(
    recipe: "Recipe",
    workers: int | None = None,
    form: "DataForm | None" = None,
    out: Path = Path("out"),
) -> None:
    """Read, verify and index the recipe's data sets; print the mixture, or export the samples."""
    from instructblip.data.export import check_form, export
    from instructblip.data.prepared.prepare import prepare_all
    from instructblip.experiment import datasets as sets

    if form is not None:
        check_form(form)  # before any data is read
    names = sets.training_names(recipe)
    jobs = [sets.job_of(recipe, name) for name in names]
    prepared = prepare_all(jobs, workers)
    datasets = dict(zip(names, prepared, strict=True))
    if form is None:
        print("".join(f"{dataset.describe()}\n" for dataset in prepared))
        print(sets.describe_mixture(recipe, sets.make_mixture(recipe, datasets)))
        return
    data = recipe.data
    for job, (name, dataset) in zip(jobs, datasets.items(), strict=True):
        entry = data.sets[name]
        prefix = os.path.relpath(job.root / job.source.images, data.root)  # links stay links
        path = export(dataset, name, form, out, prefix, data.seed, entry.templates, entry.language)
        print(path, flush=True)
    print(f"paths of pictures are relative to {data.root}")


def check(recipe: "Recipe", decode: bool = False) -> bool:
    """Look at every example and picture of the recipe's data sets; say whether all will do."""
    from instructblip.experiment.datasets import check_recipe, passes

    good = True
    for diagnosis in check_recipe(recipe, decode):
        if isinstance(diagnosis, str):
            print(f"FAILED  {diagnosis}", flush=True)
            good = False
            continue
        passed = passes(recipe, diagnosis)
        print(f"{'ok' if passed else 'FAILED':7} {diagnosis.describe()}", flush=True)
        good = good and passed
    return good


def show(recipe: "Recipe", count: int, page: Path | None = None) -> None:
    """Print ``count`` training samples of each data set as the model gets them, or write a page."""
    from rich.console import Console

    from instructblip.data import show as showing
    from instructblip.experiment.build import training_samples

    samples = showing.training_samples(training_samples(recipe), count)
    if page:
        print(showing.write_page(page, samples, {"model": recipe.model.start}))
        return
    console = Console()
    for sample in samples:
        console.print(
            showing.to_terminal(sample, console.is_terminal), highlight=False, soft_wrap=True
        )


def train(recipe: "Recipe", out: Path, resume: bool = False) -> "TrainResult":
    """Tune the recipe's model; checkpoints, metrics, curves and the model itself go to ``out``."""
    from instructblip.experiment.train import train as run

    return run(recipe, out, resume)


def cache(recipe: "Recipe") -> None:
    """Compute and keep the image features that training and validation will read."""
    from instructblip.experiment.train import cache as run

    run(recipe)


def memory(recipe: "Recipe", world_size: int = 1, gigabytes: float | None = None) -> None:
    """Print what the recipe needs of each device, and whether it fits into ``gigabytes`` (GiB)."""
    import torch

    from instructblip.experiment.memory import advise, predict_memory

    found = predict_memory(recipe, world_size)
    shares = ("frozen", "trained", "optimizer", "gradients", "activations", "passing", "encoder")
    for name in (*shares, "peak"):
        print(f"{name:12} {getattr(found, name) / 2**30:9.3f} GiB")
    available = None if gigabytes is None else int(gigabytes * 2**30)
    if available is None and torch.cuda.is_available():
        available = torch.cuda.mem_get_info()[1]
    if available is not None:
        print(advise(found, available, recipe, world_size))


def pretrain(recipe: "Recipe", stage: int, out: Path, resume: bool = False) -> "TrainResult":
    """One of BLIP-2's two stages on the captions of a recipe."""
    from instructblip.experiment.pretrain import pretrain as run

    return run(recipe, stage, out, resume)


def tune(
    root: Path, start: str, out: Path, overrides: Sequence[str] = (), resume: bool = False
) -> None:
    """Tune a model on a folder of pictures of one's own; evaluate before and after; report."""
    from instructblip.experiment.tune import tune as run

    page = run(root, start, out, overrides, resume)
    print(f"\nOpen {page}. To try the model:\n  instructblip serve --model {out / 'run'}")


def quickstart(
    out: Path, overrides: Sequence[str] = (), resume: bool = False, scale: float = 1.0
) -> None:
    """From a BLIP-2 to an InstructBLIP on the embedded world, with tables, in minutes."""
    from instructblip.recipe.load import load_recipe

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
    from instructblip.core.files import write_json
    from instructblip.evaluation.result import summarise

    found = {}
    for name, results in models.items():
        means = {role: mean.value for role, mean in summarise(results).items()}
        found[name] = {**means, "datasets": {r.benchmark: r.value for r in results}}
    seconds = {**seconds, "total": sum(seconds.values())}
    rounded = {stage: round(value, 1) for stage, value in seconds.items()}
    write_json(path, {"seconds": rounded, "models": found}, indent=2)


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
