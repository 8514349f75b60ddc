"""kill -9 at random moments of a real run, and resume: are the weights those of an undisturbed run?

The run is `instructblip train RECIPE`, shortened. A child process is killed at a random moment, the
next one resumes, until it has been killed often enough; then it may finish. Fails unless weights,
optimiser, exported models and metrics (timings apart) equal those of a run that was not killed.

    python benchmarks/kill.py --kills 20 data.root=data/scenes
"""

import argparse
import json
import multiprocessing
import os
import random
import signal
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from ctypes import c_char
from pathlib import Path
from typing import Any

import torch

from instructblip.experiment.train import train
from instructblip.recipe.load import load_recipe
from instructblip.recipe.schema import Recipe
from instructblip.training import train as training
from instructblip.training.checkpoint import load_latest
from instructblip.training.log import read_metrics, without_timings
from instructblip.training.run_directory import RunFiles

SHORT = (
    "training.steps=40",
    "training.batch_size=4",
    "training.warmup_steps=5",
    "training.validate_every=8",
    "training.save_every=3",
    "training.log_every=4",
    "training.precision=fp32",
    "training.device=cpu",
    "training.workers=0",
    "evaluation.validation_limit=4",
    "features.cache=off",
    "data.check=skip",
)
PHASES = {b"s": "in a step", b"v": "in a validation", b"w": "while saving", b"l": "while loading"}


def start(recipe: Recipe, out: Path, phase: Any) -> int:
    """Fork a child that trains, and notes in ``phase`` what it does; returns its process id."""
    pid = os.fork()
    if pid:
        return pid

    def noted(name: bytes, work: Callable) -> Callable:
        def call(*args: Any, **kwargs: Any) -> Any:
            before, phase.value = phase.value, name
            try:
                return work(*args, **kwargs)
            finally:
                phase.value = before

        return call

    code = 1
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        training.validate = noted(b"v", training.validate)
        training.update = noted(b"s", training.update)
        RunFiles.save = noted(b"w", RunFiles.save)
        RunFiles.export_to = noted(b"w", RunFiles.export_to)
        train(recipe, out, resume=True)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def finish(recipe: Recipe, out: Path, phase: Any) -> float:
    """Seconds of a run that nobody kills."""
    began = time.monotonic()
    _, status = os.waitpid(start(recipe, out, phase), 0)
    assert status == 0, f"the run in {out} failed"
    return time.monotonic() - began


def outcome(out: Path) -> dict[str, Any]:
    """All that two runs must share."""
    last = load_latest(out / "checkpoints")
    assert last is not None
    moments = last.optimizer["optimizer"]["state"]
    return {
        "weights": {name: value.numpy().tobytes() for name, value in last.parameters.items()},
        "optimizer": [v.numpy().tobytes() for state in moments.values() for v in state.values()],
        "progress": last.progress,
        "exports": [(out / n / "model.safetensors").read_bytes() for n in ("best", "last")],
        "metrics": [without_timings(line) for line in read_metrics(out / "metrics.jsonl")],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--recipe", default="quickstart")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("overrides", nargs="*")
    options = parser.parse_args()
    torch.set_num_threads(1)  # the order of sums is then the same in every process
    recipe = load_recipe(options.recipe, [*SHORT, *options.overrides])
    moments, phase = random.Random(options.seed), multiprocessing.Value(c_char, b"l")
    counted, runs, wrong = Counter[str](), 0, 0
    with tempfile.TemporaryDirectory() as folder:
        seconds = finish(recipe, Path(folder) / "undisturbed", phase)
        expected = outcome(Path(folder) / "undisturbed")
        while counted.total() < options.kills:
            out, runs = Path(folder) / f"killed{runs}", runs + 1
            while counted.total() < options.kills:
                phase.value = b"l"
                pid = start(recipe, out, phase)
                time.sleep(moments.uniform(0.1, 0.5) * seconds)
                ended, status = os.waitpid(pid, os.WNOHANG)
                if ended:
                    assert status == 0, f"the run in {out} failed"
                    break
                os.kill(pid, signal.SIGKILL)
                counted[PHASES[phase.value]] += 1
                os.waitpid(pid, 0)
            finish(recipe, out, phase)
            resumed = outcome(out)
            wrong += any(resumed[name] != expected[name] for name in expected)
            print(f"{runs} runs, {counted.total()} kills, {wrong} runs differ", flush=True)
    for name, count in sorted(counted.items()):
        print(f"killed {name:16} {count:3}")
    print(json.dumps({"kills": counted.total(), "runs": runs, "runs_that_differ": wrong}))
    assert not wrong, "a resumed run differs from the undisturbed one"


if __name__ == "__main__":
    main()
