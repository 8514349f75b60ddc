"""What to run first where there is a GPU: checks, then steps of the full-size models; see the shell
script of this name.

Models have random weights, data random pixels. Lengths vary as those of the paper's data do: every
step brings new ones. Samples per second are those of `instructblip train` without the reading of
data, since batches are prepared before.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import date
from itertools import count
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.side_by_side import PAPER_STEPS, QUERIES, SIZES, config_of, matrix_peak, padded
from instructblip.core import distributed
from instructblip.core.batch import Batch
from instructblip.core.files import read_json
from instructblip.data.loader import cut
from instructblip.model.config import InstructBlipConfig
from instructblip.model.instructblip import InstructBlip
from instructblip.model.language.fast.attention import _kernel_agrees
from instructblip.recipe.load import load_recipe
from instructblip.recipe.schema import Recipe
from instructblip.training.config import TrainingConfig
from instructblip.training.log import read_metrics
from instructblip.training.profile import TABLE
from instructblip.training.train import train

RECIPES = {"vicuna7b": "instructblip_vicuna7b", "flant5xl": "instructblip_flant5xl"}
TOKENS = 13_312
"""Most tokens of a micro batch: 32 of the recipes' longest rows."""
LONGEST = 128
"""Most tokens of an instruction, a prompt or a response."""
WIDTHS = (64, 88, 128)
"""Of the heads of T5 and the Q-Former, ViT-g, and LLaMA."""
NEW_WIDTHS = 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=[*RECIPES])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch", type=int, help="samples of a step; the recipe's by default")
    parser.add_argument("--tokens", type=int, default=TOKENS)
    parser.add_argument("--out", type=Path, default=Path("benchmarks"))
    options = parser.parse_args()
    device = distributed.resolve_device(options.device)
    on_gpu = device.type == "cuda"
    name = torch.cuda.get_device_name(device) if on_gpu else "cpu"
    began = time.perf_counter()
    lines = [f"# {name}, torch {torch.__version__}, {date.today()}", "", "## Checks", ""]
    lines += [f"- {line}" for line in checks(device)]
    peak = matrix_peak("wall", device.type, torch.bfloat16)
    lines += ["", "## Training", "", f"Matrix peak {peak / 1e12:.1f} bf16 TFLOP/s.", ""]
    lines += ["| model | images | samples a step | ms a step | samples/s | of peak | paper, h |"]
    lines += ["|---|---|---|---|---|---|---|"]
    profiles = []
    for size in options.sizes:
        rows, profile = train_all(size, device, peak, options)
        lines += rows
        profiles += ["", f"## Where the time of {size} goes", "", "```", profile, "```"]
    lines += profiles
    lines += ["", f"All of it took {time.perf_counter() - began:.0f} s."]
    text = "\n".join(lines) + "\n"
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / f"gpu_first_{name.lower().replace(' ', '-')}_{date.today()}.md"
    path.write_text(text, encoding="utf-8")
    print(f"{text}\nwritten to {path}")


# --- checks --------------------------------------------------------------------------------------


def checks(device: torch.device) -> Iterator[str]:
    """One line for each question that only a GPU can answer."""
    for width in WIDTHS:
        agrees = _kernel_agrees(device, torch.bfloat16, width)
        yield f"flash attention for packed rows of heads of width {width}: " + (
            "agrees" if agrees else "DIFFERS or fails, attention reads padded rows"
        )
    for on in (False, True):
        torch.backends.cuda.enable_cudnn_sdp(on)
        named = f"attention {'with' if on else 'without'} cuDNN"
        first, again = new_widths(device)
        yield f"{named}: {first:.1f} ms for a new width, {again:.1f} ms for a known one"
        for what, broken in nan_gradients(device).items():
            yield f"{named}, {what}: {'NaN' if broken else 'finite'}"
    torch.backends.cuda.enable_cudnn_sdp(False)
    for aligned in (False, True):
        fits = can_read_bias(device, aligned)
        yield f"T5's bias, {'' if aligned else 'not '}aligned, in a fused kernel: {fits}"


def attention(query: Tensor, key: Tensor, mask: Tensor) -> list[Tensor]:
    """The result and the gradients of a masked attention."""
    states = [query.requires_grad_(), key.requires_grad_()]
    result = F.scaled_dot_product_attention(query, key, key, attn_mask=mask)
    return [result, *torch.autograd.grad(result.float().sum(), states)]


def new_widths(device: torch.device) -> tuple[float, float]:
    """Median milliseconds of a masked attention, forward and backward, at a width that is new and
    at the same one again."""
    taken: tuple[list[float], list[float]] = ([], [])
    for width in range(33, 33 + 7 * NEW_WIDTHS, 7):
        for times in taken:
            states = [torch.randn(2, 4, width, 64, device=device).bfloat16() for _ in range(2)]
            mask = torch.rand(2, 1, width, width, device=device) < 0.9
            synchronize(device)
            began = time.perf_counter()
            attention(*states, mask)
            synchronize(device)
            times.append((time.perf_counter() - began) * 1000)
    return statistics.median(taken[0]), statistics.median(taken[1])


def nan_gradients(device: torch.device) -> dict[str, bool]:
    """Whether rows that attend to nothing, and rows of width 64 with scores far below zero, have a
    result or a gradient that is NaN."""
    masks = {
        "a row without a token": torch.arange(64, device=device)[:, None] >= 8,
        "scores below -88": torch.ones(64, 1, dtype=torch.bool, device=device),
    }
    broken = {}
    for name, mask in masks.items():
        query = torch.full((2, 4, 64, 64), 8.0, device=device).bfloat16()
        key = torch.full((2, 4, 64, 64), -8.0, device=device).bfloat16()
        results = attention(query, key, mask.expand(2, 1, 64, 64))
        broken[name] = any(bool(result.isnan().any()) for result in results)
    return broken


def can_read_bias(device: torch.device, aligned: bool) -> bool:
    """Whether the memory-efficient kernel accepts T5's bias [B, H, X, X], of 16-aligned rows or
    not; torch prints why not."""
    from torch.backends.cuda import SDPAParams, can_use_efficient_attention

    states = torch.randn(2, 32, 75, 64, device=device).bfloat16().requires_grad_()
    rows = torch.randn(2, 32, 75, 80 if aligned else 75, device=device).bfloat16()
    params = SDPAParams(states, states, states, rows[..., :75], 0.0, False, False)
    return can_use_efficient_attention(params, debug=True)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


# --- training ------------------------------------------------------------------------------------


@dataclass
class Prepared:
    """Steps that are made before the clock starts; what comes after them repeats them."""

    steps: list[list[Batch]]

    def iterate(self, step: int) -> Iterator[list[Batch]]:
        return (self.steps[number % len(self.steps)] for number in count(step))


def train_all(size: str, device: torch.device, peak: float, options: Any) -> tuple[list[str], str]:
    """Rows of the table for a model: with its images, with stored features, and of one sample,
    which takes as long as its kernels take to start. Then the profile of three steps."""
    recipe = load_recipe(RECIPES.get(size, "quickstart"))
    model = build(size, device)
    rows, profile = [], ""
    samples = options.batch or recipe.training.batch_size
    pixels = torch.randn(samples, 3, 224, 224)
    with torch.no_grad():
        one = model.encode_image(pixels[:1].to(device)).cpu()
    images = {
        "in the step": ("pixel_values", pixels, samples, False),
        "stored features": ("image_features", one.expand(samples, -1, -1), samples, False),
        "in the step, one sample": ("pixel_values", pixels, 1, False),
        "profiled": ("pixel_values", pixels, samples, True),
    }
    for name, (field, values, number, profiled) in images.items():
        length = 6 if profiled else options.steps
        steps = [step_of(seed, number, {field: values}, options.tokens) for seed in range(length)]
        with tempfile.TemporaryDirectory() as folder:
            seconds = run(model, steps, recipe, device, Path(folder), profiled)
            if profiled:
                profile = (Path(folder) / TABLE).read_text(encoding="utf-8").strip()
                continue
        rate = number / seconds
        share = flops(model, steps[0], device) / seconds / peak
        hours = PAPER_STEPS * SIZES[size].get("paper_batch", samples) / rate / 3600
        hours = f"{hours:.1f}" if number > 1 else ""
        rows.append(
            f"| {size} | {name} | {number} | {seconds * 1000:.1f} | {rate:.1f} | {share:.0%} "
            f"| {hours} |"
        )
        print(rows[-1], flush=True)
    return rows, profile


def build(size: str, device: torch.device) -> InstructBlip:
    """A model of random weights, in the types of training on a GPU."""
    with tempfile.TemporaryDirectory() as folder:
        config_of(size).save_pretrained(folder)
        config = InstructBlipConfig.from_transformers(read_json(Path(folder) / "config.json"))
    torch.manual_seed(0)
    with torch.device(device):
        model = InstructBlip(config)
    model.set_trainable(("qformer",))
    return model.to_training_dtypes(frozen_dtype=torch.bfloat16, compute_dtype=torch.bfloat16)


def step_of(seed: int, samples: int, images: dict[str, Tensor], tokens: int) -> list[Batch]:
    """The micro batches of a step. Texts have some 20 tokens, as the paper's data have, and one
    response of eight is long."""
    generator = torch.Generator().manual_seed(seed)

    def rows(low: int, mean: float) -> list[Tensor]:
        spread = torch.empty(samples).log_normal_(0, 0.6, generator=generator)
        lengths = (low + (mean - low) * spread).round().long().clamp(low, LONGEST)
        return [torch.randint(4, 30_000, (int(n),), generator=generator) for n in lengths]

    texts = {"qformer": rows(6, 18.0), "prompt": rows(4, 18.0), "response": rows(2, 6.0)}
    for i in range(seed % 8, samples, 8):
        texts["response"][i] = torch.randint(4, 30_000, (100,), generator=generator)
    lengths = [
        QUERIES + len(a) + len(b) for a, b in zip(texts["prompt"], texts["response"], strict=True)
    ]
    batches = []
    for part in cut(lengths, tokens):
        values: dict[str, Any] = {n: value[: len(part)] for n, value in images.items()}
        for name, ids in texts.items():
            values[f"{name}_ids"], values[f"{name}_mask"] = padded([ids[i] for i in part])
        batches.append(Batch(image_index=torch.arange(len(part))[:, None], **values))
    return batches


def run(
    model: InstructBlip,
    steps: list[list[Batch]],
    recipe: Recipe,
    device: torch.device,
    folder: Path,
    profiled: bool,
) -> float:
    """Median seconds of a step of the training loop, the first two left out."""
    settings = {
        "steps": len(steps),
        "batch_size": sum(map(len, steps[0])),
        "device": str(device),
        "precision": "bf16",
        "validate_every": None,
        "log_every": 1,
        "profile": profiled,
        "accumulate": 1,
        "tokens_per_micro_batch": None,
    }
    training = TrainingConfig.model_validate(recipe.training.model_dump() | settings)
    if device.type == "cuda":
        steps = [[batch.pin_memory() for batch in step] for step in steps]
    train(model, Prepared(steps), None, training, folder)
    lines = [line for line in read_metrics(folder / "metrics.jsonl") if "loss" in line]
    return statistics.median(line["seconds_per_step"] for line in lines[2:])


def flops(model: InstructBlip, step: list[Batch], device: torch.device) -> int:
    """Floating point operations of a step, counted in its own code; a kernel for packed attention
    counts nothing."""
    with FlopCounterMode(display=False) as counter:
        for batch in step:
            model.loss(batch.to(device)).loss_sum.backward()
    model.zero_grad()
    return counter.get_total_flops()


if __name__ == "__main__":
    main()
