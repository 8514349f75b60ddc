"""Tune and evaluate every condition of the paper's claims on Scenes, several seeds each.

``WORK/<condition>/seed<N>`` holds a run, its results, its output (``log.txt``) and, once it is
finished, ``done.json``. Finished jobs are skipped, interrupted jobs resume, and jobs of other
settings are refused. ``--processes`` jobs run in parallel, each on its share of the cores: two jobs
of one thread are faster than one job of two.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch

from instructblip.core.files import write_json
from instructblip.experiment.datasets import benchmarks_of, prepare_benchmarks
from instructblip.experiment.evaluate import evaluate, load_answerer, score
from instructblip.experiment.train import cache, train
from instructblip.model.checkpoints.directory import model_directory
from instructblip.model.instructblip import InstructBlip
from instructblip.recipe.load import differences, load_recipe
from instructblip.recipe.schema import RECIPE_FILE, Recipe
from instructblip.scenes.official import write_scenes
from runs.claims.conditions import DOWNSTREAM, FEW, Job, Plan

DONE = "done.json"
P = TypeVar("P", bound=Plan)


def recipe_of(plan: Plan, job: Job) -> Recipe:
    """The recipe of a job; ValueError if its folder holds the results of another recipe."""
    recipe = load_recipe(plan.base, job.overrides)
    folder = plan.work / job.name
    for path in (folder / RECIPE_FILE, folder / "results" / RECIPE_FILE):
        changes = differences(load_recipe(path), recipe) if path.is_file() else []
        if changes:
            raise ValueError(
                f"{path} was written with other settings ({'; '.join(changes)}); choose another "
                "work folder, or delete this one"
            )
    return recipe


def prepare(plan: Plan, scale: float) -> None:
    """Write and check the data, store the image features, write the start with few queries, and
    evaluate BLIP-2.

    BLIP-2 is evaluated in every session, which refuses its predictions if the starter has changed.
    """
    recipe_of(plan, plan.baseline())  # before anything is written
    write_scenes(plan.work / "scenes", scale=scale)
    extra = [f"data.sets.{name}={{}}" for name in DOWNSTREAM]
    cache(load_recipe(plan.base, [*plan.common, *extra, "data.check=run"]))
    keep_queries(plan.start, FEW, plan.few_queries)
    job = plan.baseline()
    began = time.monotonic()
    folder = plan.work / job.name
    answer(plan, job, plan.start)
    if not (folder / DONE).is_file():
        write_json(folder / DONE, {"seconds": round(time.monotonic() - began, 1)})


def keep_queries(start: str, number: int, out: Path) -> None:
    """Write the model ``start`` with the first ``number`` of its query tokens."""
    model = InstructBlip.from_pretrained(model_directory(start))
    model.config = model.config.model_copy(update={"num_query_tokens": number})
    model.query_tokens = torch.nn.Parameter(model.query_tokens.detach()[:, :number].clone())
    model.save_pretrained(out)


def answer(plan: Plan, job: Job, model: str) -> None:
    """Evaluate ``model`` on the benchmarks of a job."""
    results, recipe = plan.work / job.name / "results", recipe_of(plan, job)
    aware = False if job.reads == "none" else None  # None: the model's setting
    if job.reads == "other":
        evaluate_misread(recipe, model, results)
    else:
        evaluate(recipe, model, results, instruction_aware=aware)


def evaluate_misread(recipe: Recipe, model: str, out: Path) -> None:
    """As `evaluate`, with a Q-Former that reads the instruction of another sample of the batch; the
    language model reads the right one."""
    held = prepare_benchmarks(recipe, benchmarks_of(recipe, recipe.evaluation.benchmarks))
    answerer = load_answerer(recipe, model, [each.dataset for each in held])
    misread(answerer.model)  # type: ignore[union-attr]
    for each in held:
        folder = out / each.benchmark.name
        result = score(answerer, each, recipe.evaluation, limit=recipe.evaluation.limit, out=folder)
        print(result.describe(), flush=True)


def misread(model: InstructBlip) -> None:
    """Let each row of a batch read the instruction of the row half a batch away. Samples of a batch
    are in order: a neighbour may ask the same."""
    read = model.query_image

    def query_image(features, ids, mask, index=None):
        half = len(ids) // 2
        return read(
            features, ids.roll(half, 0), None if mask is None else mask.roll(half, 0), index
        )

    model.query_image = query_image  # type: ignore[method-assign]


def do(plan: Plan, job: Job) -> None:
    """Tune and evaluate, and record the seconds of this session."""
    began = time.monotonic()
    recipe, folder = recipe_of(plan, job), plan.work / job.name
    model = job.model
    if model is None:
        stopped = train(recipe, folder, resume=True).stopped
        if stopped == "terminated":
            raise SystemExit(f"{job.name}: terminated; the same command resumes it")
        model = f"{folder}/last"
    answer(plan, job, model)
    write_json(folder / DONE, {"seconds": round(time.monotonic() - began, 1)})


def do_all(
    plan: Plan, processes: int, arguments: list[str], module: str = "runs.claims.measure"
) -> None:
    """Run all unfinished jobs, ``processes`` at a time, each in a process of ``module``."""

    def finished(name: str | None) -> bool:
        return name is None or (plan.work / name / DONE).is_file()

    jobs = plan.jobs()
    waiting = deque(job for job in jobs if not finished(job.name))
    threads = max(1, (os.cpu_count() or 1) // processes)
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    running: dict[str, subprocess.Popen[bytes]] = {}
    try:
        while waiting or running:
            job = next((job for job in waiting if finished(job.needs)), None)
            if job and len(running) < processes:
                waiting.remove(job)
                log = plan.work / job.name / "log.txt"
                log.parent.mkdir(parents=True, exist_ok=True)
                command = [sys.executable, "-m", module, *arguments]
                with log.open("ab") as file:
                    running[job.name] = subprocess.Popen(
                        [*command, "--job", job.name], env=environment, stdout=file, stderr=file
                    )
                continue
            time.sleep(0.2)
            for name in [name for name, child in running.items() if child.poll() is not None]:
                if running.pop(name).returncode:
                    raise SystemExit(f"{name} failed; see {plan.work / name / 'log.txt'}")
                seconds = json.loads((plan.work / name / DONE).read_text())["seconds"]
                left = len(waiting) + len(running)
                print(f"{len(jobs) - left}/{len(jobs)} {name}, {seconds:.0f} s", flush=True)
    finally:
        for child in running.values():
            child.terminate()  # training saves a checkpoint
        for child in running.values():
            child.wait()


def run_plan(
    about: str | None,
    module: str,
    kind: type[P],
    prepare: Callable[[P, float], None],
    add: Callable[[argparse.ArgumentParser], object] = lambda parser: None,
) -> P | None:
    """The command line of ``module``: prepare, then do all jobs of a plan of some kind, or the one
    of ``--job``. ``about`` is its docstring, ``add`` adds arguments for further fields of the plan.
    Returns the plan when all of it is done, and None after a single job."""
    parser = argparse.ArgumentParser(description=(about or "").split("\n")[0])
    parser.add_argument("work", type=Path)
    parser.add_argument("--start", default=kind.start, help="the BLIP-2 to start from")
    parser.add_argument("--seeds", type=int, default=kind.seeds)
    parser.add_argument("--steps", type=int, default=kind.steps)
    parser.add_argument("--limit", type=int, default=kind.limit, help="samples of each benchmark")
    parser.add_argument("--scale", type=float, default=1.0, help="size of the data sets")
    parser.add_argument("--processes", type=int, default=os.cpu_count(), help="jobs in parallel")
    parser.add_argument("--job", help="run only this job, in this process")
    add(parser)
    given = vars(parser.parse_intermixed_args())
    scale, processes, only = given.pop("scale"), given.pop("processes"), given.pop("job")
    plan = kind(**{k: tuple(v) if isinstance(v, list) else v for k, v in given.items()})
    if only:
        do(plan, next(job for job in plan.jobs() if job.name == only))
        return None
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    began = time.monotonic()
    for job in plan.jobs():
        recipe_of(plan, job)  # all are checked before any starts
    prepare(plan, scale)
    settings = {**given, "scale": scale, "processes": processes}
    settings = {k: str(v) if isinstance(v, Path) else v for k, v in settings.items()}
    write_json(plan.work / "settings.json", settings)
    print(f"data and starts: {time.monotonic() - began:.0f} s", flush=True)
    do_all(plan, processes, sys.argv[1:], module)
    print(f"{(time.monotonic() - began) / 60:.1f} minutes in all")
    return plan


def _more(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--finetune-steps", type=int, default=Plan.finetune_steps)
    parser.add_argument("overrides", nargs="*", help="further overrides of every recipe")


if __name__ == "__main__":
    run_plan(__doc__, "runs.claims.measure", Plan, prepare, _more)
