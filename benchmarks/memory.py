"""Peak memory of one training step, ours and transformers' InstructBLIP side by side.

Weights, optimiser and allocator are alike, so the difference is what forward and backward keep. On
a GPU PyTorch's own peak is read; on a CPU the bytes of tensors are summed as they come and go, and
what the process grows by is shown too: each step runs in a forked process, whose high-water mark is
reset before it (Linux). Ours is also compared with what `instructblip memory` predicts.

    python benchmarks/memory.py --size cpu-mid
    python benchmarks/memory.py --size flant5xl --device cuda --dtype bf16
"""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peak import tensor_peak
from side_by_side import DTYPES, autocast, build, make_batch, parse

from instructblip.experiment.memory import (
    Memory,
    encoder_bytes,
    logits_bytes,
    saved_bytes,
)
from instructblip.training.config import TrainingConfig
from instructblip.training.optim import make_optimizer, trainable_parameters


def main() -> None:
    options = parse(__doc__)
    if options.device == "cpu":
        torch.set_num_threads(1)  # a forked process has no other threads
    ours, theirs = build(options.size, options.device, DTYPES[options.dtype])
    batch, inputs = make_batch(0, options.batch, options.size, device=options.device)
    ours.train()
    theirs.train()
    config = TrainingConfig(learning_rate=1e-5, precision=options.dtype)

    def step(model: Any, loss: Callable[[], torch.Tensor]) -> None:
        optimizer = make_optimizer(model, config)
        for _ in range(2):  # the second step has the optimiser's moments
            loss().backward()
            optimizer.step()
            optimizer.zero_grad()

    def our_loss() -> torch.Tensor:
        output = ours.loss(batch)
        return output.loss_sum / output.num_tokens

    def their_loss() -> torch.Tensor:
        with autocast(options):
            return theirs(**inputs).loss

    works = {
        "transformers": lambda: step(theirs, their_loss),
        "ours": lambda: step(ours, our_loss),
    }
    on_cpu = options.device == "cpu"
    # first, while no heap has been used yet that a forked process would find
    grown = {name: process_peak_of(work) for name, work in works.items()} if on_cpu else {}
    peak_of = tensor_peak if on_cpu else gpu_peak_of
    peaks = {name: peak_of(work) for name, work in works.items()}
    trained = sum(p.nbytes for p in trainable_parameters(ours).values())
    counted = Memory(
        frozen=0,
        trained=0,
        optimizer=2 * trained,
        gradients=trained,
        activations=saved_bytes(our_loss, ours),
        passing=logits_bytes(ours, batch.num_response_tokens),
        encoder=encoder_bytes(ours, options.batch),
    ).peak
    for name, value in peaks.items():
        print(f"{name:14} {value / 2**20:7.0f} MiB of tensors above the weights")
    print(f"{'counted':14} {counted / 2**20:7.0f} MiB: moments, and the fullest moment of a step")
    result = {
        "ratio": round(peaks["ours"] / peaks["transformers"], 3),
        "predicted_over_measured": round(counted / peaks["ours"], 3),
        **{name: getattr(options, name) for name in ("size", "device", "dtype")},
        "bytes": peaks,
        "process_bytes": grown,
    }
    for name, value in grown.items():
        print(f"{name:14} {value / 2**20:7.0f} MiB by which the process grows")
    print(json.dumps(result))


def gpu_peak_of(work: Callable[[], None]) -> int:
    """Bytes of tensors on the GPU at most while it works, above those before."""
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    work()
    peak = torch.cuda.max_memory_allocated() - before
    torch.cuda.empty_cache()
    return peak


def process_peak_of(work: Callable[[], None]) -> int:
    """Bytes by which a forked process grows at most while it works."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            before = status("VmRSS")
            Path("/proc/self/clear_refs").write_text("5")
            work()
            os.write(write, str(status("VmHWM") - before).encode())
            code = 0
        finally:
            os._exit(code)
    os.close(write)
    _, code = os.waitpid(pid, 0)
    assert code == 0, "the step failed"
    return int(os.read(read, 20))


def status(key: str) -> int:
    """A line of this process's status, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:"))


if __name__ == "__main__":
    main()
