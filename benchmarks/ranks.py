"""Two gloo ranks against one rank, one thread each: the same global batches, the same losses.

Runs the update of the training loop alone. The losses must agree to 1e-6; what is printed is
the throughput of the ranks over that of one, by the clock asked for: "cpu" counts the processor
time of the busiest rank, waiting left out, for machines that do other work meanwhile.

    python benchmarks/ranks.py --size cpu-mid --ranks 2
"""

import argparse
import json
import os
import socket
import statistics
import tempfile
import time
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
from side_by_side import SIZES, build, make_batch
from torch import Tensor, multiprocessing

from instructblip.core import distributed
from instructblip.core.batch import Batch
from instructblip.training.config import TrainingConfig
from instructblip.training.optim import make_optimizer, trainable_parameters
from instructblip.training.run_directory import Progress, RunFiles
from instructblip.training.train import losses, update


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", choices=SIZES, default="cpu-mid")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall")
    options = parser.parse_args()
    torch.set_num_threads(1)
    model, _ = build(options.size)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    alone = run(model, options)
    model.load_state_dict(state)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        multiprocessing.start_processes(
            rank_of,
            args=(model, options, port, folder),
            nprocs=options.ranks,
            start_method="fork",
        )
        parts = [json.loads((Path(folder) / str(r)).read_text()) for r in range(options.ranks)]
    apart = max(abs(a - b) for a, b in zip(alone["losses"], parts[0]["losses"], strict=True))
    assert apart < 1e-6, f"the losses differ by {apart}"
    slowest = [max(each) for each in zip(*(part["seconds"] for part in parts), strict=True)]
    one, many = (statistics.median(s[1:]) for s in (alone["seconds"], slowest))
    print(
        f"{options.size}, batch {options.batch}, {options.clock} clock, {options.steps - 1} steps"
    )
    for ranks, seconds in ((1, one), (options.ranks, many)):
        print(f"{ranks} rank(s) {seconds:7.2f} s a step {options.batch / seconds:7.2f} samples/s")
    summary = {"ratio": round(one / many, 3), "ranks": options.ranks, "loss_difference": apart}
    print(json.dumps({**summary, "clock": options.clock, "batch": options.batch}))


def rank_of(rank: int, model: Any, options: Any, port: int, folder: str) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "MASTER_PORT": str(port)}
    os.environ |= {"WORLD_SIZE": str(options.ranks), "MASTER_ADDR": "127.0.0.1"}
    with distributed.process_group("gloo"):
        (Path(folder) / str(rank)).write_text(json.dumps(run(model, options)))


def run(model: Any, options: Any) -> dict[str, list[float]]:
    """Loss and seconds of each step of this rank."""
    now = time.process_time if options.clock == "cpu" else time.perf_counter
    config = TrainingConfig(learning_rate=1e-5, precision="fp32", batch_size=options.batch)
    model.train()
    parameters = trainable_parameters(model)
    optimizer = make_optimizer(model, config)
    taken: dict[str, list[float]] = {"losses": [], "seconds": []}
    with tempfile.TemporaryDirectory() as folder:
        files = RunFiles(Path(folder), 1, None, {})
        for step in range(options.steps):
            batch = part_of(make_batch(step, options.batch)[0])
            progress = Progress()
            distributed.barrier()
            began = now()
            outcome = update(model, parameters, optimizer, [batch], 1e-5, step, files, config)
            outcome.add_to(progress, files)
            taken["seconds"].append(now() - began)
            windows = distributed.gather_objects(progress.window["data"])
            progress.window = {"data": [sum(values) for values in zip(*windows, strict=True)]}
            taken["losses"].append(losses(progress)["loss"])
    return taken


def part_of(batch: Batch) -> Batch:
    """This rank's samples, each with a different image."""
    share = slice(distributed.rank(), None, distributed.world_size())
    parts = {
        field.name: value[share]
        for field in fields(batch)
        if isinstance(value := getattr(batch, field.name), Tensor)
    }
    count = len(parts["image_index"])
    return replace(batch, **{**parts, "image_index": torch.arange(count)[:, None]})


if __name__ == "__main__":
    main()
