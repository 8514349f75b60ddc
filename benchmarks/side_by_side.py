"""What the benchmarks share: one model twice, ours and transformers', and the same batches."""

import argparse
import contextlib
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import InstructBlipConfig, InstructBlipForConditionalGeneration

from instructblip.core.batch import Batch
from instructblip.model.instructblip import InstructBlip
from instructblip.training.optim import trainable_parameters

LLAMA = {"model_type": "llama", "vocab_size": 32_001, "pad_token_id": 0}
T5 = {  # as Flan-T5: two matrices for input and head, gated feed-forwards
    "model_type": "t5",
    "vocab_size": 32_128,
    "feed_forward_proj": "gated-gelu",
    "tie_word_embeddings": False,
    "dropout_rate": 0.0,
    "decoder_start_token_id": 0,
    "pad_token_id": 0,
    "eos_token_id": 1,
}
CPU_MID = {"vision": (12, 384, 6, 1536), "qformer": (6, 384, 6, 1536)}
TINY = {"vision": (2, 64, 2, 128), "qformer": (2, 64, 2, 128)}
PAPER = {"vision": (39, 1408, 16, 6144), "qformer": (12, 768, 12, 3072)}


def layer_sizes(layers: int, width: int, heads: int, inner: int) -> dict[str, int]:
    """As the config of a vision model, a Q-Former or a LLaMA names them."""
    names = ("num_hidden_layers", "hidden_size", "num_attention_heads", "intermediate_size")
    return dict(zip(names, (layers, width, heads, inner), strict=True))


def t5(layers: int, width: int, heads: int, inner: int) -> dict[str, Any]:
    """``layers`` in the encoder and as many in the decoder."""
    names = ("num_layers", "d_model", "num_heads", "d_ff", "d_kv")
    values = (layers, width, heads, inner, width // heads)
    return {**T5, **dict(zip(names, values, strict=True))}


SIZES: dict[str, dict[str, Any]] = {
    # to see that a program runs; the ratios of these two mean nothing
    "tiny": {**TINY, "language": {**LLAMA, **layer_sizes(2, 64, 2, 128)}},
    "tiny-t5": {**TINY, "language": t5(2, 64, 2, 128)},
    "cpu-mid": {**CPU_MID, "language": {**LLAMA, **layer_sizes(8, 512, 8, 1408)}},
    "cpu-t5": {**CPU_MID, "language": t5(8, 512, 8, 1408)},
    "vicuna7b": {
        **PAPER,
        "language": {**LLAMA, **layer_sizes(32, 4096, 32, 11_008)},
        "paper_batch": 128,
    },
    "flant5xl": {**PAPER, "language": t5(24, 2048, 32, 5120), "paper_batch": 192},
}
"""Layers, width, heads and inner width of each part; ``paper_batch`` is the paper's batch size."""

PAPER_STEPS = 60_000
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
IMAGE_TOKEN = 32_000
QUERIES = 32


def parse(description: str | None, **more: dict[str, Any]) -> argparse.Namespace:
    """The options that all programs share, and ``more``; sets the number of threads."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--size", choices=SIZES, default="cpu-mid")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    for name, settings in more.items():
        parser.add_argument(f"--{name}", **settings)
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: this torch sees no GPU; leave it out to run on the CPU")
    if options.device == "cuda" and options.clock == "cpu":
        parser.error("--clock cpu does not count what a GPU does; leave it out")
    torch.set_num_threads(options.threads)
    return options


def build(
    size: str, device: str = "cpu", dtype: torch.dtype = torch.float32
) -> tuple[InstructBlip, Any]:
    """Ours and transformers' model with the same random weights, nothing dropped out.

    Image encoder and language model are ``dtype``, all the rest is fp32, as our training has it: a
    step wants `autocast` around theirs.
    """
    torch.manual_seed(0)
    with torch.device(device):
        theirs = InstructBlipForConditionalGeneration(config_of(size))
    if is_seq2seq(size):  # drawn as T5 draws it, its softmax would underflow: slow, and no model's
        theirs.get_output_embeddings().weight.data *= theirs.config.text_config.d_model**-0.5
    theirs.to(dtype)
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(folder)
        ours = InstructBlip.from_pretrained(folder)
    half = None if dtype == torch.float32 else dtype
    ours.to_training_dtypes(frozen_dtype=half, compute_dtype=half).to(device)
    dtypes = {name: parameter.dtype for name, parameter in ours.named_parameters()}
    names = set(trainable_parameters(ours))
    for name, parameter in theirs.named_parameters():
        parameter.requires_grad_(name in names)
        parameter.data = parameter.data.to(dtypes[name])
    assert {n for n, p in theirs.named_parameters() if p.requires_grad} == names
    return ours, theirs


def config_of(size: str) -> InstructBlipConfig:
    """A model of that size as transformers describes it; nothing is dropped out."""
    shape = SIZES[size]
    return InstructBlipConfig(
        # transformers would draw its weights at 1e-10: no image could change a loss
        vision_config={**layer_sizes(*shape["vision"]), "initializer_range": 0.02},
        qformer_config={
            **layer_sizes(*shape["qformer"]),
            "hidden_dropout_prob": 0.0,
            "attention_probs_dropout_prob": 0.0,
        },
        text_config=shape["language"],
        num_query_tokens=QUERIES,
        image_token_index=IMAGE_TOKEN,
    )


def autocast(options: argparse.Namespace) -> contextlib.AbstractContextManager:
    """The autocast of a user's loop around a model whose trained weights are fp32."""
    if options.dtype == "fp32":
        return contextlib.nullcontext()
    return torch.autocast(options.device, dtype=DTYPES[options.dtype])


def is_seq2seq(size: str) -> bool:
    return SIZES[size]["language"]["model_type"] == "t5"


def make_batch(
    seed: int,
    samples: int,
    size: str = "cpu-mid",
    answer: int | None = None,
    device: str = "cpu",
) -> tuple[Batch, dict[str, torch.Tensor]]:
    """The same samples in both layouts: lengths vary, so that about 30 % of the slots are padding.

    Every sample has a different image; theirs is padded on the right, as a collator would.
    ``answer`` asks for responses of so many tokens each.
    """
    generator = torch.Generator().manual_seed(seed)

    def rows(low: int, high: int, top: int) -> list[torch.Tensor]:
        share = torch.rand(samples, generator=generator) ** 1.5  # more are short than long
        lengths = (low + (high - low) * share).round().long()
        return [torch.randint(4, top, (int(n),), generator=generator) for n in lengths]

    prompts, responses = rows(4, 34, 32_000), rows(answer or 4, answer or 30, 32_000)
    instructions = rows(8, 34, 30_000)
    pixels = torch.randn(samples, 3, 224, 224, generator=generator)
    qformer_ids, qformer_mask = padded(instructions)
    prompt_ids, prompt_mask = padded(prompts)
    response_ids, response_mask = padded(responses)
    ours = Batch(
        pixel_values=pixels,
        image_index=torch.arange(samples)[:, None],
        qformer_ids=qformer_ids,
        qformer_mask=qformer_mask,
        prompt_ids=prompt_ids,
        prompt_mask=prompt_mask,
        response_ids=response_ids,
        response_mask=response_mask,
    )
    theirs = {
        "pixel_values": pixels,
        "qformer_input_ids": qformer_ids,
        "qformer_attention_mask": qformer_mask,
        **their_text(prompts, responses, is_seq2seq(size)),
    }
    return ours.to(device), {name: value.to(device) for name, value in theirs.items()}


def their_text(
    prompts: list[torch.Tensor], responses: list[torch.Tensor], seq2seq: bool
) -> dict[str, torch.Tensor]:
    """What transformers' model reads: image tokens, prompt and, but for T5, the response."""
    queries = torch.full((QUERIES,), IMAGE_TOKEN)
    read = [torch.cat([queries, prompt]) for prompt in prompts]
    labels = responses
    if not seq2seq:
        labels = [
            torch.cat([torch.full_like(before, -100), response])
            for before, response in zip(read, responses, strict=True)
        ]
        read = [torch.cat(pair) for pair in zip(read, responses, strict=True)]
    input_ids, attention_mask = padded(read)
    return {
        "input_ids": input_ids,
        "attention_mask": attention_mask,
        "labels": pad_sequence(labels, batch_first=True, padding_value=-100),
    }


def padded(values: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of one length, and their mask."""
    mask = pad_sequence([torch.ones_like(v) for v in values], batch_first=True)
    return pad_sequence(values, batch_first=True), mask


def alternate(works: dict[str, Callable[[int], Any]], rounds: int, clock: str) -> dict[str, float]:
    """Median seconds of each work, after one round to warm up.

    Taken in turns, so that whatever else the machine does hits all of them alike; ``clock`` "cpu"
    counts the processor time of all threads instead of the time on the wall.
    """
    now = time.process_time if clock == "cpu" else time.perf_counter
    seconds: dict[str, list[float]] = {name: [] for name in works}
    for turn in range(rounds + 1):
        for name, work in works.items():
            began = now()
            work(turn)
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if turn:
                seconds[name].append(now() - began)
    return {name: statistics.median(values) for name, values in seconds.items()}


def matrix_peak(clock: str, device: str = "cpu", dtype: torch.dtype = torch.float32) -> float:
    """FLOP per second of a large matrix product on this machine."""
    side = 8192 if device == "cuda" else 1024
    a = torch.randn(side, side, device=device, dtype=dtype)
    seconds = alternate({"matmul": lambda _: a @ a}, 4, clock)["matmul"]
    return 2 * side**3 / seconds
