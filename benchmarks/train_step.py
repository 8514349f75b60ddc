"""One optimiser step, ours and transformers' InstructBLIP side by side.

Same weights, batches, number type, trainable set and optimiser settings; the losses must agree.
Theirs is the step of transformers' Trainer: the model called with labels, and the fused AdamW that
is its default; no gradient is clipped in either.

    python benchmarks/train_step.py --size cpu-mid --threads 2
    python benchmarks/train_step.py --size cpu-mid --threads 1 --clock cpu   # a shared machine
    python benchmarks/train_step.py --size flant5xl --device cuda --dtype bf16 --answer 20
"""

import json
from dataclasses import replace
from typing import Any

import torch
from side_by_side import (
    DTYPES,
    PAPER_STEPS,
    SIZES,
    alternate,
    autocast,
    build,
    make_batch,
    matrix_peak,
    parse,
)
from torch.utils.flop_counter import FlopCounterMode

from instructblip.core.batch import Batch
from instructblip.training.config import TrainingConfig
from instructblip.training.optim import make_optimizer


def main() -> None:
    options = parse(
        __doc__,
        rounds={"type": int, "default": 3},
        answer={"type": int, "help": "tokens of every response; else 4 to 30"},
    )
    dtype = DTYPES[options.dtype]
    config = TrainingConfig(learning_rate=1e-5, precision=options.dtype)
    ours, theirs = build(options.size, options.device, dtype)
    ours.train()
    theirs.train()
    our_optimizer = make_optimizer(ours, config)
    their_optimizer = torch.optim.AdamW(
        [p for p in theirs.parameters() if p.requires_grad], lr=1e-5, weight_decay=0.05, fused=True
    )

    def our_step(batch: Batch) -> float:
        output = ours.loss(batch)
        loss = output.loss_sum / output.num_tokens
        loss.backward()
        our_optimizer.step()
        our_optimizer.zero_grad()
        return loss.item()

    def their_step(inputs: dict[str, Any]) -> float:
        with autocast(options):
            loss = theirs(**inputs).loss
        loss.backward()
        their_optimizer.step()
        their_optimizer.zero_grad()
        return loss.item()

    pairs = [
        make_batch(seed, options.batch, options.size, options.answer, options.device)
        for seed in range(options.rounds + 1)
    ]
    with torch.no_grad(), autocast(options):
        cached = [
            replace(b, image_features=ours.encode_image(b.pixel_values), pixel_values=None)
            for b, _ in pairs
        ]
        apart = abs(losses(ours, pairs[0][0]) - theirs(**pairs[0][1]).loss.item())
        apart_cached = abs(losses(ours, pairs[0][0]) - losses(ours, cached[0]))
    # Losses are about 10 nats, and bf16 has 8 bits.
    close = 1e-4 if options.dtype == "fp32" else 5e-2
    assert apart < close, f"the losses differ by {apart}"
    assert apart_cached < close, f"the loss from stored features differs by {apart_cached}"
    flops = {}
    for name, batch in (("ours", pairs[0][0]), ("ours_cached", cached[0])):
        with FlopCounterMode(display=False) as counter:
            our_step(batch)
        flops[name] = counter.get_total_flops()
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
    peak = matrix_peak(options.clock, options.device, dtype)
    masks = [text_masks(inputs) for _, inputs in pairs[1:]]
    padding = 1 - torch.cat(masks).float().mean().item()
    print(
        f"{options.size}, {options.device}, {options.dtype}, batch {options.batch}, "
        f"{options.threads} threads, {options.clock} clock, median of {options.rounds}; "
        f"{padding:.0%} of the language model's slots are padding"
    )
    shares = {name: value / seconds[name] / peak for name, value in flops.items()}
    report(options, seconds, shares)
    print(f"measured {options.dtype} matrix peak {peak / 1e12:.2f} TFLOP/s")
    print("ours by part, ms: " + ", ".join(f"{n} {v * 1000:.1f}" for n, v in parts.items()))
    print(json.dumps(result(options, seconds, shares, apart)))


def report(options: Any, seconds: dict[str, float], shares: dict[str, float]) -> None:
    """The table, and the hours of the paper's run at full shapes."""
    print(f"{'':14} {'ms/step':>9} {'samples/s':>10} {'ratio':>6} {'of peak':>8}")
    for name, value in seconds.items():
        ratio = seconds["transformers"] / value
        share = f"{shares[name]:8.0%}" if name in shares else ""
        print(f"{name:14} {value * 1000:9.1f} {options.batch / value:10.2f} {ratio:6.2f} {share}")
    for name, value in paper_hours(options, seconds).items():
        print(f"the paper's {PAPER_STEPS:,} steps, by arithmetic: {name} {value:.1f} hours")


def result(
    options: Any, seconds: dict[str, float], shares: dict[str, float], apart: float
) -> dict[str, Any]:
    """The last line of the output."""
    rates = {name: round(options.batch / value, 2) for name, value in seconds.items()}
    hours = paper_hours(options, seconds)
    return {
        "ratio": round(seconds["transformers"] / seconds["ours"], 3),
        "ratio_cached": round(seconds["transformers"] / seconds["ours_cached"], 3),
        **{
            name: getattr(options, name) for name in ("size", "device", "dtype", "threads", "clock")
        },
        "loss_difference": apart,
        "seconds": {name: round(value, 4) for name, value in seconds.items()},
        "samples_per_second": rates,
        "share_of_peak": {name: round(value, 4) for name, value in shares.items()},
        "paper_hours": {name: round(value, 2) for name, value in hours.items()},
    }


def text_masks(inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """Which slots of a batch are tokens: of the rows read and, for T5, of those answered."""
    read, labels = inputs["attention_mask"].flatten(), inputs["labels"]
    if labels.shape == inputs["attention_mask"].shape:
        return read
    return torch.cat([read, (labels != -100).long().flatten()])


def paper_hours(options: Any, seconds: dict[str, float]) -> dict[str, float]:
    """Hours for as many samples as the paper's run saw, at the speed measured; full shapes only."""
    samples = PAPER_STEPS * SIZES[options.size].get("paper_batch", 0)
    return {name: samples * s / options.batch / 3600 for name, s in seconds.items() if samples}


def losses(model: Any, batch: Batch) -> float:
    output = model.loss(batch)
    return (output.loss_sum / output.num_tokens).item()


def where_time_goes(model: Any, batch: Batch, optimizer: Any, options: Any) -> dict[str, float]:
    """Median seconds of the parts of our step, run one after the other."""
    state: dict[str, Any] = {}

    def vision(_: int) -> None:
        state["features"] = model.encode_image(batch.pixel_values)

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
