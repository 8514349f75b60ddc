"""Samples per second of the paper's recipes on H200 GPUs, modelled: nothing here runs on a GPU.

    python -m benchmarks.modelled

What a GPU computes is read from the model's own code at full size: its parameters and batches have
shapes and no values (torch's device "meta"), and each operation of a step is priced by its floating
point operations or its bytes. What the CPU does meanwhile, Python and the start of kernels, is
measured at full depth and toy width. One step's work is launched while the GPU computes that of the
step before, and only its losses are waited for, so that a step takes the longer of the two.
"""

import argparse
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from datetime import date
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.side_by_side import QUERIES, SIZES, padded
from instructblip.core.batch import Batch
from instructblip.data.loader import cut, deal
from instructblip.model.config import InstructBlipConfig, QFormerConfig, VisionConfig
from instructblip.model.instructblip import InstructBlip
from instructblip.model.language import causal, seq2seq
from instructblip.model.language.fast import attention
from instructblip.recipe.load import load_recipe
from instructblip.training.optim import gradient_values, make_optimizer, trainable_parameters

RATE = 790e12
"""bf16 operations a second of a large matrix product: 80 % of the 989e12 of NVIDIA's data sheet."""
TF32 = RATE / 2
BANDWIDTH = 4.0e12
"""Bytes a second of an element-wise kernel: 83 % of the 4.8e12 of the data sheet."""
SMS = 132
"""Streaming multiprocessors, each of which computes one tile of a product at a time."""
TILES = {(128, 256): 1.0, (128, 128): 0.85, (64, 128): 0.65, (64, 64): 0.5}
"""Tiles of a product, and the share of `RATE` that they reach: assumed, smaller tiles read more."""
SPLITS = (1, 2, 4, 8, 16)
"""Into how many parts the sum of a product may be split where there are few tiles."""
SHORTEST_SUM = 512
ATTENTION = 300e12
"""Operations a second of flash attention and the memory-efficient kernel: assumed."""
BACKWARD = 2.5
"""Attention backward, in forward passes (FlashAttention-2, arXiv 2307.08691, section 4.1)."""
LINK = 0.8 * 450e9
"""Bytes a second that leave a GPU over NVLink: 80 % of 900e9 in both directions (data sheet)."""
SHORTEST = 2e-6
"""Seconds of the smallest kernel: assumed."""
LAUNCH = 2.5e-6
"""Seconds of the driver for the start of a kernel, which a CPU without a GPU does not spend:
assumed."""
FAST_HOST = 0.55
"""Time that Python takes on a fast server, of that on the machine of the measurement: assumed."""
ROUNDS = 15
"""Micro batches that the launch is measured with."""
TOKENS = 37_440
"""What ``training.tokens_per_micro_batch: auto`` takes of Vicuna-7B on an H200 (docs/scale.md); a
step of FlanT5-XL, which fits more, is one micro batch with it too."""
ADAMW = 4 + 8 + 28
"""Bytes a trained number: norm of the gradient, clipping, and the fused AdamW."""
BUCKETS = 4 * 4
"""Bytes a trained number: gradients are copied into buckets and back."""

RECIPES = {"vicuna7b": "instructblip_vicuna7b", "flant5xl": "instructblip_flant5xl"}
TOYS: dict[str, dict[str, int]] = {
    "vicuna7b": {
        **{"vocab_size": 96, "hidden_size": 32, "intermediate_size": 48},
        **{"num_attention_heads": 4},
    },
    "flant5xl": {"vocab_size": 96, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_heads": 4},
}
"""What differs in a language model of full depth and toy width."""
GATHERS = {"index_select", "index", "embedding", "gather"}
"""Operations that read as much as they write, whatever the size of their table."""
SCATTERS = {"index_add", "index_put", "index_copy", "scatter", "embedding_dense_backward"}
WHOLE = ("head", "optimiser")
"""Parts that are not compiled."""


# --- a GPU by arithmetic -------------------------------------------------------------------------


def product_seconds(m: int, n: int, k: int, batch: int = 1, itemsize: int = 2) -> float:
    """Seconds of ``batch`` matrix products [m, k] x [k, n]: by tiles, of which the GPU computes
    `SMS` at a time, in the best of the shapes, or by bytes."""
    rate = (RATE if itemsize == 2 else TF32) / SMS
    read = batch * itemsize * (m * k + k * n + m * n) / BANDWIDTH
    best = math.inf
    for (high, wide), share in TILES.items():
        tiles = math.ceil(m / high) * math.ceil(n / wide) * batch
        for parts in SPLITS:
            if parts > 1 and k < parts * SHORTEST_SUM:
                break
            waves = math.ceil(tiles * parts / SMS)
            sums = 2 * 4 * parts * batch * m * n / BANDWIDTH if parts > 1 else 0.0
            best = min(best, waves * 2 * high * wide * (k / parts) / (rate * share) + sums)
    return max(best, read, SHORTEST)


@dataclass
class Kernel:
    """An operation: ``reads`` and ``writes`` are bytes by storage."""

    part: str
    kind: str
    seconds: float
    reads: dict[int, int] = field(default_factory=dict)
    writes: dict[int, int] = field(default_factory=dict)


class Meter(TorchDispatchMode):
    """Prices the operations on meta tensors that run within it."""

    running: "Meter | None" = None

    def __init__(self) -> None:
        super().__init__()
        self.kernels: list[Kernel] = []
        self.part = ""
        self.living: list[Tensor] = []  # so that no storage gets the address of another

    def __enter__(self) -> "Meter":
        Meter.running = self
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        Meter.running = None
        super().__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        made = [x for x in tree_leaves(result) if isinstance(x, Tensor)]
        if not any(x.is_meta for x in made) or name.startswith(("empty", "new_empty")):
            return result
        self.living += made
        reads, writes = _by_storage(given), _by_storage(made)
        if not func._schema.is_mutable and writes.keys() <= reads.keys():
            return result  # a view
        kernel = Kernel(self.part, "element-wise", 0.0, reads, writes)
        if (shape := _product(name.rstrip("_"), args, result)) is not None:
            kernel.kind = "product"
            kernel.seconds = product_seconds(*shape, itemsize=made[0].element_size())
        else:
            read, written = sum(reads.values()), sum(writes.values())
            if name in GATHERS:
                kernel.kind, read = "gather", written
            elif name.rstrip("_") in SCATTERS:
                kernel.kind = "gather"
            kernel.seconds = max((read + written) / BANDWIDTH, SHORTEST)
        self.kernels.append(kernel)
        return result

    def attention(self, pairs: float, width: int, tensors: Sequence[Tensor], passes: float) -> None:
        """Price a fused attention over ``pairs`` of queries and keys of all heads."""
        used = _by_storage(tensors)
        seconds = max(
            4 * pairs * width * passes / ATTENTION, sum(used.values()) / BANDWIDTH, SHORTEST
        )
        self.kernels.append(Kernel(self.part, "attention", seconds, used, _by_storage(tensors[:1])))


def _by_storage(tensors: Sequence[Tensor]) -> dict[int, int]:
    """The bytes of each storage that exist: an expanded dimension is read once."""
    sizes: dict[int, int] = {}
    for x in tensors:
        count = math.prod(n for n, step in zip(x.shape, x.stride(), strict=True) if step)
        key = x.untyped_storage()._cdata
        sizes[key] = max(sizes.get(key, 0), count * x.element_size())
    return sizes


def _product(name: str, args: Any, result: Any) -> tuple[int, ...] | None:
    """m, n, k and the number of products of an operation; None if it is not one."""
    if name in ("mm", "addmm"):
        a, b = args[-2:]
        return a.shape[0], b.shape[1], a.shape[1]
    if name in ("bmm", "baddbmm"):
        a, b = args[-2:]
        return a.shape[1], b.shape[2], a.shape[2], a.shape[0]
    if name == "convolution":
        return result.numel() // result.shape[1], result.shape[1], args[1][0].numel()
    return None


def fuse(kernels: Sequence[Kernel]) -> list[Kernel]:
    """The kernels after torch.compile: element-wise operations between two products, attentions
    or gathers are one, which reads what others have made and writes what others read."""
    readers: dict[int, int] = {}  # of each storage the last
    for place, kernel in enumerate(kernels):
        readers |= dict.fromkeys(kernel.reads, place)
    fused: list[Kernel] = []
    group: list[Kernel] = []

    def close(end: int) -> None:
        if group:
            fused.append(_join(group, {key for key, place in readers.items() if place >= end}))
            group.clear()

    for place, kernel in enumerate(kernels):
        plain = kernel.kind == "element-wise" and kernel.part not in WHOLE
        if not plain or (group and group[-1].part != kernel.part):
            close(place)
        if plain:
            group.append(kernel)
        else:
            fused.append(kernel)
    close(len(kernels))
    return fused


def _join(group: list[Kernel], read_later: set[int]) -> Kernel:
    reads: dict[int, int] = {}
    writes: dict[int, int] = {}
    for kernel in group:
        for key, size in kernel.reads.items():
            if key not in writes:
                reads[key] = max(reads.get(key, 0), size)
        for key, size in kernel.writes.items():
            writes[key] = max(writes.get(key, 0), size)
    moved = sum(reads.values()) + sum(n for key, n in writes.items() if key in read_later)
    return Kernel(group[0].part, "element-wise", max(moved / BANDWIDTH, SHORTEST), reads, writes)


class Half(TorchFunctionMode):
    """CUDA's autocast to bf16, which meta tensors do not have."""

    active = False

    def __enter__(self) -> "Half":
        Half.active = True
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        Half.active = False
        super().__exit__(*error)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.linear:
            args = [x if x is None else x.bfloat16() for x in args]
        elif func is F.layer_norm:
            args = [args[0].float(), *args[1:]]
        return func(*args, **kwargs)


class _Attention(torch.autograd.Function):
    """A fused attention that has the right shapes and computes nothing."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, pairs: float
    ) -> Tensor:
        result = torch.empty_like(query)
        ctx.save_for_backward(query, key, value, result)
        ctx.mask, ctx.pairs = mask, pairs
        used = [result, query, key, value, *([] if mask is None else [mask])]
        if Meter.running is not None:
            Meter.running.attention(pairs, query.shape[-1], used, 1)
        return result

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, result = ctx.saved_tensors
        gradients = [torch.empty_like(x) for x in (query, key, value)]
        used = [*gradients, query, key, value, result, outer[0]]
        used += [] if ctx.mask is None else [ctx.mask]
        if Meter.running is not None:
            Meter.running.attention(ctx.pairs, query.shape[-1], used, BACKWARD)
        return *gradients, None, None


@contextmanager
def gpu_paths(lengths: Sequence[int]) -> Iterator[None]:
    """Let "meta" and the CPU take the ways of a GPU; ``lengths`` are those of the packed rows."""

    def packed(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Tensor:
        pairs = query.shape[1] * sum(n * n for n in lengths) / 2  # causal
        return _Attention.apply(query, key, value, None, pairs)

    def of_rows(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        *_: Any,
        **__: Any,
    ) -> Tensor:
        if Half.active:
            query, key, value = (x.bfloat16() for x in (query, key, value))
        pairs = query.shape[:-1].numel() * key.shape[-2]
        # a fused kernel returns the tokens first, then the heads
        rows = (x.transpose(1, 2) for x in (query, key, value))
        return _Attention.apply(*rows, attn_mask, pairs).transpose(1, 2)

    def head(*inputs: Any) -> Tensor:
        meter = Meter.running
        if meter is None:
            return token_losses(*inputs)
        before, meter.part = meter.part, "head"
        losses = token_losses(*inputs)
        meter.part = before
        return losses

    enabled, token_losses = torch.is_autocast_enabled, causal.token_losses

    def autocasts(*device: str) -> bool:
        return Half.active or ("meta" not in device and enabled(*device))

    def precision(model: InstructBlip, part: nn.Module) -> Any:
        weight = next(part.parameters())
        half = model.compute_dtype is not None and weight.dtype == torch.float32
        if weight.is_meta:
            return Half() if half else ExitStack()
        return torch.autocast("cpu", torch.bfloat16, enabled=half)

    with ExitStack() as stack:
        for owner, name, value in (
            (attention, "ONE_BY_ONE", ()),
            (attention, "KERNEL_DEVICES", ("meta", "cpu")),
            (attention, "_kernel_agrees", lambda *_: True),
            (attention, "varlen_attn", packed),
            (F, "scaled_dot_product_attention", of_rows),
            (torch, "is_autocast_enabled", autocasts),
            (InstructBlip, "precision", precision),
            (causal, "token_losses", head),
            (seq2seq, "token_losses", head),
        ):
            stack.enter_context(patch.object(owner, name, value))
        yield


# --- the model and its batches -------------------------------------------------------------------


def config_of(size: str, toy: bool = False) -> InstructBlipConfig:
    language = SIZES[size]["language"]
    if not toy:
        return InstructBlipConfig(vision=VisionConfig(), qformer=QFormerConfig(), language=language)
    narrow: dict[str, Any] = dict(hidden_size=32, intermediate_size=48, num_attention_heads=4)
    return InstructBlipConfig(
        vision=VisionConfig(**narrow, image_size=28, patch_size=14),
        qformer=QFormerConfig(**narrow, vocab_size=96, encoder_hidden_size=32),
        language=language | TOYS[size],
        num_query_tokens=4,
    )


def build(config: InstructBlipConfig, device: str) -> InstructBlip:
    with torch.device(device):
        model = InstructBlip(config)
    model.set_trainable(("qformer",)).train()
    return model.to_training_dtypes(frozen_dtype=torch.bfloat16, compute_dtype=torch.bfloat16)


@dataclass
class Texts:
    """Tokens of each sample's instruction, prompt and response."""

    instructions: list[int]
    prompts: list[int]
    responses: list[int]

    @classmethod
    def draw(cls, samples: int, seed: int = 0) -> "Texts":
        """Lengths of 20 in the mean, with a tail: a Gamma distribution of shape 2."""
        generator = torch.Generator().manual_seed(seed)

        def lengths(low: int, longest: int, mean: int = 20) -> list[int]:
            drawn = -torch.rand(2, samples, generator=generator).log().sum(0) * (mean - low) / 2
            return (low + drawn).long().clamp(max=longest).tolist()

        return cls(lengths(6, 128), lengths(6, 128), lengths(2, 256))

    def __len__(self) -> int:
        return len(self.prompts)

    def rows(self) -> list[int]:
        """Tokens of each sample, as micro batches are cut by them."""
        pairs = zip(self.prompts, self.responses, strict=True)
        return [QUERIES + prompt + response for prompt, response in pairs]

    def take(self, samples: Sequence[int]) -> "Texts":
        fields = (self.instructions, self.prompts, self.responses)
        return Texts(*([lengths[i] for i in samples] for lengths in fields))

    def batch(self, images: dict[str, Tensor]) -> Batch:
        values: dict[str, Any] = {}
        for name, lengths in (
            ("qformer", self.instructions),
            ("prompt", self.prompts),
            ("response", self.responses),
        ):
            ids = [torch.full((length,), 7) for length in lengths]
            values[f"{name}_ids"], values[f"{name}_mask"] = padded(ids)
        return Batch(image_index=torch.arange(len(self))[:, None], **images, **values)


def works(model: InstructBlip, batch: Batch) -> Iterator[tuple[str, Callable[[], None]]]:
    """The parts of a micro batch, in order."""
    state: dict[str, Any] = {}

    def vision() -> None:
        with torch.no_grad():
            state["features"] = model.encode_image(batch.pixel_values)  # pyright: ignore

    def queries() -> None:
        known = replace(batch, image_features=state["features"], pixel_values=None)
        state["queries"] = model.encode_queries(known)

    def language() -> None:
        state["read"] = state["queries"].detach().requires_grad_()
        losses, _ = model.token_losses(state["read"], batch)
        state["loss"] = losses.sum()

    yield "vision", vision
    yield "q-former", queries
    yield "language", language
    yield "language backward", lambda: state["loss"].backward()
    yield "q-former backward", lambda: state["queries"].backward(state["read"].grad)


# --- GPU and CPU of a micro batch ----------------------------------------------------------------


def micro_batch_kernels(model: InstructBlip, texts: Texts) -> list[Kernel]:
    """What a GPU runs for a micro batch of one image each, operation by operation."""
    size = model.config.vision.image_size
    pixels = torch.empty(len(texts), 3, size, size, device="meta")
    batch = texts.batch({"pixel_values": pixels}).to("meta")
    rows = [length - 1 for length in texts.rows()]  # the last token is not read
    with gpu_paths(rows), Meter() as meter:
        for part, work in works(model, batch):
            meter.part = part
            work()
    model.zero_grad(set_to_none=True)
    return meter.kernels


def launch_seconds(size: str, compiled: bool) -> dict[str, float]:
    """Seconds of one core for Python and the dispatch of each part of a micro batch, and of the
    optimiser: at full depth and toy width, where the numbers themselves cost little. The least of
    all rounds, because other programs on the machine only add to it."""
    torch.manual_seed(0)
    model = build(config_of(size, toy=True), "cpu")
    if compiled:
        model.compile_layers()
    recipe = load_recipe(RECIPES[size])
    parameters = trainable_parameters(model)
    optimizer = make_optimizer(model, recipe.training)
    taken: dict[str, list[float]] = {}

    def lap(part: str, work: Callable[[], None]) -> None:
        began = time.process_time()
        work()
        taken.setdefault(part, []).append(time.process_time() - began)

    def update() -> None:
        norm = nn.utils.get_total_norm(gradient_values(parameters.values()))
        nn.utils.clip_grads_with_norm_(parameters.values(), 1.0, norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    for turn in range(ROUNDS + 2):  # the first two compile and fill caches
        texts = Texts([3 + turn, 2, 4], [2, 3 + turn, 2], [2, 1, 3 + turn])
        batch = texts.batch({"pixel_values": torch.randn(3, 3, 28, 28)})
        with gpu_paths(
            [4 + p + r - 1 for p, r in zip(texts.prompts, texts.responses, strict=True)]
        ):
            for part, work in works(model, batch):
                lap(part, work)
        lap("optimiser", update)
    return {part: min(values[2:]) for part, values in taken.items()}


# --- steps ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class MicroBatch:
    samples: int
    kernels: list[Kernel]


@dataclass(frozen=True)
class Step:
    """Seconds of a step of one rank: of its GPU, of the sum of gradients over the ranks, and of its
    CPU on the machine of the measurement and on a fast one."""

    gpu: float
    reduce: float
    slow_cpu: float
    fast_cpu: float

    def rates(self, samples: int) -> tuple[float, float]:
        """Samples a second of all ranks, with the slow CPU and with the fast one."""
        gpu = self.gpu + self.reduce
        return samples / max(gpu, self.slow_cpu), samples / max(gpu, self.fast_cpu)


def micro_batches(model: InstructBlip, texts: Texts, ranks: int, budget: int) -> list[MicroBatch]:
    """Those of the rank with the most tokens, of ``ranks`` that share ``texts``."""
    rows = texts.rows()
    hand = max(deal(rows, ranks), key=lambda samples: sum(rows[i] for i in samples))
    mine = texts.take(hand)
    parts = cut(mine.rows(), budget)
    return [MicroBatch(len(part), micro_batch_kernels(model, mine.take(part))) for part in parts]


def reduce_seconds(numbers: int, ranks: int) -> float:
    """A ring all-reduce of fp32 gradients, and their copies into buckets and back."""
    if ranks == 1:
        return 0.0
    return 2 * (ranks - 1) / ranks * 4 * numbers / LINK + BUCKETS * numbers / BANDWIDTH


def step_of(
    model: InstructBlip,
    parts: Sequence[MicroBatch],
    ranks: int,
    launch: dict[str, float],
    compiled: bool = True,
    stored: bool = False,
) -> Step:
    """The step of a rank; with ``stored`` features no image encoder runs."""
    numbers = sum(p.numel() for _, p in model.trainable_parameters())
    gpu, python, starts = ADAMW * numbers / BANDWIDTH, launch["optimiser"], 0
    for part in parts:
        kernels = [x for x in part.kernels if not (stored and x.part == "vision")]
        kernels = fuse(kernels) if compiled else kernels
        gpu += sum(kernel.seconds for kernel in kernels)
        chunks = 0 if stored else math.ceil(part.samples / model.image_chunk)
        times = {"vision": chunks, "optimiser": 0}
        python += sum(times.get(name, 1) * seconds for name, seconds in launch.items())
        starts += len(kernels)
    slow, fast = (share * python + starts * LAUNCH for share in (1, FAST_HOST))
    return Step(gpu, reduce_seconds(numbers, ranks), slow, fast)


# --- the table -----------------------------------------------------------------------------------


def parts_of(kernels: Sequence[Kernel]) -> dict[tuple[str, str], float]:
    """Milliseconds by part and kind of kernel; a backward pass counts with its part."""
    sums: dict[tuple[str, str], float] = {}
    for kernel in kernels:
        key = kernel.part.removesuffix(" backward"), kernel.kind
        sums[key] = sums.get(key, 0.0) + 1000 * kernel.seconds
    return sums


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", nargs="+", choices=RECIPES, default=[*RECIPES])
    parser.add_argument("--ranks", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--seeds", type=int, default=3, help="batches of other lengths")
    parser.add_argument("--toy", action="store_true", help="toy width, to see that this runs")
    parser.add_argument("--plain", action="store_true", help="plain layers alone, in one minute")
    parser.add_argument(
        "--busy", type=float, default=1.0, help="time of a core that others share, of one alone"
    )
    parser.add_argument("--out", type=Path, default=Path("benchmarks"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    steps = [HEADER, "|---" * HEADER.count(" | ") + "|---|"]
    shares, launches = [], []
    for size in options.sizes:
        kinds = (False,) if options.plain else (False, True)
        launch = {
            compiled: {
                part: seconds / options.busy
                for part, seconds in launch_seconds(size, compiled).items()
            }
            for compiled in kinds
        }
        for compiled, parts in launch.items():
            name = "compiled" if compiled else "plain"
            listed = ", ".join(f"{part} {1000 * value:.1f}" for part, value in parts.items())
            launches.append(f"- {size}, {name}: {listed}")
        model = build(config_of(size, options.toy), "meta")
        rows, share = table(size, model, launch, options)
        steps += rows
        shares += share
    path = options.out / f"modelled_h200_{date.today()}.md"
    lines = [f"# Samples/s on H200, modelled, {date.today()}", "", *steps, ""]
    lines += ["## Milliseconds of the GPU in a step of one GPU, modelled", "", *shares]
    lines += ["## Milliseconds of one core here, measured at toy width", "", *launches]
    text = "\n".join(lines) + "\n"
    path.write_text(text, encoding="utf-8")
    print(f"{text}\nwritten to {path}")


HEADER = (
    "| model | GPUs | images | layers | micro batches | GPU ms | all-reduce ms | CPU ms, fast to "
    "slow host | **samples/s, modelled** |"
)


def table(
    size: str, model: InstructBlip, launch: dict[bool, dict[str, float]], options: Any
) -> tuple[list[str], list[str]]:
    """The rows of the table for a model, and where the time of its GPU goes."""
    samples = load_recipe(RECIPES[size]).training.batch_size
    rows, shares = [], []
    for ranks in options.ranks:
        drawn = [
            micro_batches(model, Texts.draw(samples, seed), ranks, TOKENS)
            for seed in range(options.seeds)
        ]
        for stored in (True, False):
            for compiled, parts in launch.items():
                steps = [step_of(model, each, ranks, parts, compiled, stored) for each in drawn]
                step = sorted(steps, key=lambda step: step.gpu)[len(steps) // 2]
                slow, fast = step.rates(samples)
                cells = [size, ranks, "stored" if stored else "encoded"]
                cells += ["compiled" if compiled else "plain", len(drawn[0])]
                cells += [f"{1000 * step.gpu:.0f}", f"{1000 * step.reduce:.1f}"]
                cells += [f"{1000 * step.fast_cpu:.0f} to {1000 * step.slow_cpu:.0f}"]
                low, high = f"{slow:,.0f}", f"{fast:,.0f}"
                cells.append(low if low == high else f"{low}-{high}")
                rows.append("| " + " | ".join(map(str, cells)) + " |")
                print(rows[-1], flush=True)
        if ranks == 1:
            kernels = [kernel for part in drawn[0] for kernel in part.kernels]
            fused = fuse(kernels)
            plain, joined = parts_of(kernels), parts_of(fused)
            shares += [f"| {size} | kernels | plain | compiled |", "|---|---|---|---|"]
            for (part, kind), value in plain.items():
                shares.append(f"| {part} | {kind} | {value:.1f} | {joined[part, kind]:.1f} |")
            cells = [f"{len(kernels):,} or {len(fused):,}"]
            cells += [f"{sum(sums.values()):.1f}" for sums in (plain, joined)]
            shares += ["| all | " + " | ".join(cells) + " |", ""]
    return rows, shares


if __name__ == "__main__":
    main()
