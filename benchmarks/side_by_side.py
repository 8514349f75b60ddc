"""What the benchmarks share: one model twice, ours and transformers', and the same batches."""

import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import InstructBlipConfig, InstructBlipForConditionalGeneration

from instructblip.batch import Batch
from instructblip.model.instructblip import InstructBlip

LLAMA = {"model_type": "llama", "vocab_size": 32_001, "pad_token_id": 0}
SIZES: dict[str, dict[str, Any]] = {
    "tiny": {  # to see that a program runs; its ratios mean nothing
        "vision": (2, 64, 2, 128),
        "qformer": (2, 64, 2, 128),
        "language": {
            **LLAMA,
            "num_hidden_layers": 2,
            "hidden_size": 64,
            "num_attention_heads": 2,
            "intermediate_size": 128,
        },
    },
    "cpu-mid": {
        "vision": (12, 384, 6, 1536),
        "qformer": (6, 384, 6, 1536),
        "language": {
            **LLAMA,
            "num_hidden_layers": 8,
            "hidden_size": 512,
            "num_attention_heads": 8,
            "intermediate_size": 1408,
        },
    },
    "vicuna7b": {
        "vision": (39, 1408, 16, 6144),
        "qformer": (12, 768, 12, 3072),
        "language": {
            **LLAMA,
            "num_hidden_layers": 32,
            "hidden_size": 4096,
            "num_attention_heads": 32,
            "intermediate_size": 11_008,
        },
    },
}
IMAGE_TOKEN = 32_000
QUERIES = 32


def build(size: str) -> tuple[InstructBlip, Any]:
    """Ours and transformers' model with the same random weights, nothing dropped out."""
    names = ("num_hidden_layers", "hidden_size", "num_attention_heads", "intermediate_size")
    shape = SIZES[size]
    config = InstructBlipConfig(
        vision_config=dict(zip(names, shape["vision"], strict=True)),
        qformer_config={
            **dict(zip(names, shape["qformer"], strict=True)),
            "hidden_dropout_prob": 0.0,
            "attention_probs_dropout_prob": 0.0,
        },
        text_config=shape["language"],
        num_query_tokens=QUERIES,
        image_token_index=IMAGE_TOKEN,
    )
    torch.manual_seed(0)
    theirs = InstructBlipForConditionalGeneration(config)
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(folder)
        ours = InstructBlip.from_pretrained(folder)
    return ours, theirs


def make_batch(seed: int, samples: int) -> tuple[Batch, dict[str, torch.Tensor]]:
    """The same samples in both layouts: lengths vary, so that about 30 % of the slots are padding.

    Every sample has a picture of its own; theirs is padded on the right, as a collator would.
    """
    generator = torch.Generator().manual_seed(seed)

    def rows(low: int, high: int, top: int) -> list[torch.Tensor]:
        lengths = torch.randint(low, high + 1, (samples,), generator=generator)
        lengths[0] = high
        return [torch.randint(4, top, (int(n),), generator=generator) for n in lengths]

    prompts, responses = rows(4, 34, 32_000), rows(4, 30, 32_000)
    instructions = rows(8, 34, 30_000)
    pixels = torch.randn(samples, 3, 224, 224, generator=generator)

    def padded(values: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        mask = pad_sequence([torch.ones_like(v) for v in values], batch_first=True)
        return pad_sequence(values, batch_first=True), mask

    queries = torch.full((QUERIES,), IMAGE_TOKEN)
    text = [torch.cat([queries, p, r]) for p, r in zip(prompts, responses, strict=True)]
    labels = [
        torch.cat([torch.full((QUERIES + len(p),), -100), r])
        for p, r in zip(prompts, responses, strict=True)
    ]
    input_ids, attention_mask = padded(text)
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
        "input_ids": input_ids,
        "attention_mask": attention_mask,
        "labels": pad_sequence(labels, batch_first=True, padding_value=-100),
    }
    return ours, theirs


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


def matrix_peak(clock: str) -> float:
    """FLOP per second of a large fp32 matrix product on this machine."""
    a = torch.randn(1024, 1024)
    seconds = alternate({"matmul": lambda _: a @ a}, 4, clock)["matmul"]
    return 2 * 1024**3 / seconds
