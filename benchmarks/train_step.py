"""One optimiser step, ours and transformers' InstructBLIP side by side.

Same weights, batches, number type, trainable set and optimiser settings; the losses must agree.
Theirs is the step of a training loop as users write it: the model called with labels, AdamW.

    python benchmarks/train_step.py --size cpu-mid --threads 2
    python benchmarks/train_step.py --size cpu-mid --threads 1 --clock cpu   # a shared machine
"""

import argparse
import json
from dataclasses import replace
from typing import Any

import torch
from side_by_side import SIZES, alternate, build, make_batch, matrix_peak
from torch.utils.flop_counter import FlopCounterMode

from instructblip.batch import Batch
from instructblip.training.config import TrainingConfig
from instructblip.training.optim import make_optimizer, trainable_parameters


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", choices=SIZES, default="cpu-mid")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    config = TrainingConfig(learning_rate=1e-5, precision="fp32")
    ours, theirs = build(options.size)
    names = set(trainable_parameters(ours))
    for name, parameter in theirs.named_parameters():
        parameter.requires_grad_(name in names)
    assert {n for n, p in theirs.named_parameters() if p.requires_grad} == names
    ours.train()
    theirs.train()
    our_optimizer = make_optimizer(trainable_parameters(ours), config)
    their_optimizer = torch.optim.AdamW(
        [p for p in theirs.parameters() if p.requires_grad], lr=1e-5, weight_decay=0.05
    )

    def our_step(batch: Batch) -> float:
        output = ours.loss(batch)
        loss = output.loss_sum / output.num_tokens
        loss.backward()
        our_optimizer.step()
        our_optimizer.zero_grad()
        return loss.item()

    def their_step(inputs: dict[str, Any]) -> float:
        loss = theirs(**inputs).loss
        loss.backward()
        their_optimizer.step()
        their_optimizer.zero_grad()
        return loss.item()

    pairs = [make_batch(seed, options.batch) for seed in range(options.rounds + 1)]
    with torch.no_grad():
        cached = [
            replace(
                b, image_features=ours.encode_image(b.pixel_values, norm=False), pixel_values=None
            )
            for b, _ in pairs
        ]
        apart = abs(losses(ours, pairs[0][0]) - theirs(**pairs[0][1]).loss.item())
        apart_cached = abs(losses(ours, pairs[0][0]) - losses(ours, cached[0]))
    assert apart < 1e-4, f"the losses differ by {apart}"
    assert apart_cached < 1e-4, f"the loss from stored features differs by {apart_cached}"
    with FlopCounterMode(display=False) as counter:
        our_step(pairs[0][0])
    seconds = alternate(
        {
            "transformers": lambda turn: their_step(pairs[turn][1]),
            "ours": lambda turn: our_step(pairs[turn][0]),
            "ours_cached": lambda turn: our_step(cached[turn]),
        },
        options.rounds,
        options.clock,
    )
    parts = where_time_goes(ours, pairs[0][0], our_optimizer, options)
    peak = matrix_peak(options.clock)
    mask = torch.cat([inputs["attention_mask"] for _, inputs in pairs[1:]])
    print(
        f"{options.size}, fp32, batch {options.batch}, {options.threads} threads, "
        f"{options.clock} clock, median of {options.rounds}; "
        f"{1 - mask.float().mean().item():.0%} of the language model's slots are padding"
    )
    print(f"{'':14} {'ms/step':>9} {'samples/s':>10} {'ratio':>6}")
    for name, value in seconds.items():
        ratio = seconds["transformers"] / value
        print(f"{name:14} {value * 1000:9.0f} {options.batch / value:10.2f} {ratio:6.2f}")
    print(
        f"matrix peak {peak / 1e9:.0f} GFLOP/s; ours reaches "
        f"{counter.get_total_flops() / seconds['ours'] / peak:.0%} of it"
    )
    print("ours by part, ms: " + ", ".join(f"{n} {v * 1000:.0f}" for n, v in parts.items()))
    print(
        json.dumps(
            {
                "ratio": round(seconds["transformers"] / seconds["ours"], 3),
                "ratio_cached": round(seconds["transformers"] / seconds["ours_cached"], 3),
                "size": options.size,
                "threads": options.threads,
                "clock": options.clock,
                "loss_difference": apart,
                "seconds": {name: round(value, 4) for name, value in seconds.items()},
            }
        )
    )


def losses(model: Any, batch: Batch) -> float:
    output = model.loss(batch)
    return (output.loss_sum / output.num_tokens).item()


def where_time_goes(model: Any, batch: Batch, optimizer: Any, options: Any) -> dict[str, float]:
    """Median seconds of the parts of our step, run one after the other."""
    state: dict[str, Any] = {}

    def vision(_: int) -> None:
        state["features"] = model.encode_image(batch.pixel_values, norm=False)

    def queries(_: int) -> None:
        known = replace(batch, image_features=state["features"], pixel_values=None)
        state["queries"] = model.encode_queries(known)

    def language(_: int) -> None:
        state["loss"] = model.language.loss(model.language.join(state["queries"], batch)).sum()

    works = {
        "vision": vision,
        "q-former": queries,
        "language and head": language,
        "backward": lambda _: state["loss"].backward(),
        "optimiser": lambda _: optimizer.step(),
    }
    return alternate(works, 2, options.clock)


if __name__ == "__main__":
    main()
