"""Kill ranks under torchrun at random moments: is the run the one that nobody disturbed?

torchrun starts ranks of a toy model (tests/training/toy.py) over gloo. In each attempt one rank,
chosen at random, is killed with SIGKILL at a random moment. torchrun ends the others and starts all
again, which resume from the last checkpoint. After the kills of one phase the next continues with
another number of ranks, as when machines leave or join. Fails unless the weights are those of a
single undisturbed rank, up to the order of sums, and no step is missing in the metrics.

    python -m benchmarks.faults --kills 10 --ranks 4 2 3
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
from itertools import pairwise
from pathlib import Path

import torch
from safetensors.torch import load_file

from instructblip.core import distributed
from instructblip.training.log import read_metrics
from instructblip.training.run_directory import claim
from instructblip.training.train import train
from tests.training.toy import Toy, ToyBatches, toy_config, toy_score

STEPS = 120
FAULT = "FAULT"
"""In the environment of a rank: seed, attempts that are killed, most seconds until the kill."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--ranks", type=int, nargs="+", default=[4, 2, 3])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--within", type=float, default=2.0, help="seconds until a kill")
    options = parser.parse_args()
    kills = [options.kills // len(options.ranks)] * len(options.ranks)
    kills[0] += options.kills - sum(kills)
    with tempfile.TemporaryDirectory() as folder:
        alone, killed = Path(folder) / "alone", Path(folder) / "killed"
        torch.set_num_threads(1)
        work(alone)
        died = 0
        for number, (ranks, count) in enumerate(zip(options.ranks, kills, strict=True)):
            last = number == len(kills) - 1
            fault = [options.seed + number, count, options.within]
            status = start(ranks, count if last else count - 1, fault, killed)
            assert (status == 0) == last, f"phase {number} of {ranks} ranks ended with {status}"
            died += count
            print(f"{ranks} ranks: {count} kills", flush=True)
        apart = difference(alone, killed)
    print(json.dumps({"kills": died, "ranks": options.ranks, "largest_difference": apart}))
    assert apart < 1e-4, "the weights are not those of an undisturbed run"


def start(ranks: int, restarts: int, fault: list[float], folder: Path) -> int:
    """Run ranks under torchrun until they finish, or until no restart is left."""
    settings = ["standalone", "monitor-interval=0.2", f"nproc-per-node={ranks}"]
    settings += [f"max-restarts={restarts}"]
    launcher = [sys.executable, "-m", "torch.distributed.run", *(f"--{each}" for each in settings)]
    environment = os.environ | {FAULT: json.dumps(fault), "OMP_NUM_THREADS": "1"}
    command = [*launcher, "-m", "benchmarks.faults", "--rank", str(folder)]
    return subprocess.run(command, env=environment, stdout=subprocess.DEVNULL).returncode


def work(folder: Path) -> None:
    """What each rank runs: a resumed training that may be killed."""
    with distributed.process_group("gloo"), claim(folder):
        attempt = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))
        seed, kills, within = json.loads(os.environ.get(FAULT, "[0, 0, 0]"))
        if attempt < kills:
            dice = random.Random(f"{seed} {attempt}")  # the same on all ranks
            victim, seconds = dice.randrange(distributed.world_size()), dice.uniform(0, within)
            if distributed.rank() == victim:
                clock = threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGKILL))
                clock.daemon = True
                clock.start()
        config = toy_config(steps=STEPS, batch_size=12, validate_every=30, save_every=5)
        model = Toy(dropout=0.0)
        batches = ToyBatches(config, distributed.rank(), distributed.world_size())
        train(model, batches, toy_score, config, folder, resume=True, export=model.save_pretrained)
        if attempt < kills:  # it was faster than its kill
            os.kill(os.getpid(), signal.SIGKILL)


def difference(alone: Path, killed: Path) -> float:
    """The largest difference of a weight; fails where the metrics lack a step."""
    steps = [[line["step"] for line in read_metrics(f / "metrics.jsonl")] for f in (alone, killed)]
    assert steps[0] == steps[1], "the metrics have other steps"
    assert all(before <= after for before, after in pairwise(steps[1]))
    one, other = (load_file(f / "last" / "model.safetensors") for f in (alone, killed))
    return max((one[name] - other[name]).abs().max().item() for name in one)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--rank"]:
        work(Path(sys.argv[2]))
    else:
        main()
