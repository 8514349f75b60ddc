"""Candidates ranked per second: the shared prefix and its tree against repeating the prompt.

Three ways to score the same candidates of one question, measured in turn in one process, the
fastest of ``--repeats`` rounds counted for each, the image encoded beforehand for all:

- ``loop``: one forward of [queries; prompt; candidate] per candidate;
- ``batched``: the same, ``--chunk`` candidates padded into a batch, each with its own prompt;
- ``shared``: ``rank_candidates``, the prompt once and the candidates as a prefix tree.

Seconds are the CPU time of the process, so that a machine shared with others gives the same figure;
``--clock wall`` takes the time of day. Random weights: the time does not depend on them, and the
scores are compared all the same. The last line of the output is JSON; ``ratio`` is shared over loop
for the decoder-only model.
"""

import argparse
import json
import random
import time
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from instructblip.core.batch import Batch
from instructblip.data.samples import pad
from instructblip.model.config import (
    InstructBlipConfig,
    QFormerConfig,
    VisionConfig,
)
from instructblip.model.inference import rank_candidates
from instructblip.model.instructblip import InstructBlip

VOCABULARY = 4000
END = 2


def build(kind: str, width: int, layers: int) -> InstructBlip:
    """A model with random weights, of which only the language model is measured."""
    torch.manual_seed(0)
    heads = max(1, width // 64)
    shared = {"vocab_size": VOCABULARY, "pad_token_id": 0, "eos_token_id": END}
    if kind == "t5":
        language = {
            "model_type": "t5",
            "d_model": width,
            "d_kv": width // heads,
            "d_ff": 2 * width,
            "num_layers": layers,
            "num_heads": heads,
            "feed_forward_proj": "gated-gelu",
            "decoder_start_token_id": 0,
            **shared,
        }
    else:
        language = {
            "model_type": "llama",
            "hidden_size": width,
            "intermediate_size": 2 * width,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": heads,
            **shared,
        }
    config = InstructBlipConfig(
        vision=VisionConfig(hidden_size=64, intermediate_size=64, num_hidden_layers=1,
                            num_attention_heads=2, image_size=32, patch_size=16),
        qformer=QFormerConfig(vocab_size=100, hidden_size=64, intermediate_size=64,
                              num_hidden_layers=2, num_attention_heads=2, encoder_hidden_size=64,
                              max_position_embeddings=64),
        language=language,
        num_query_tokens=32,
    )  # fmt: skip
    return InstructBlip(config).requires_grad_(False).eval()


def question(prompt_tokens: int) -> Batch:
    """One image, one prompt."""
    prompt = torch.randint(3, VOCABULARY, (1, prompt_tokens))
    text = torch.randint(3, 100, (1, 8))
    empty = torch.zeros(1, 0, dtype=torch.long)
    return Batch(
        pixel_values=torch.randn(1, 3, 32, 32),
        image_index=torch.zeros(1, 1, dtype=torch.long),
        qformer_ids=text,
        qformer_mask=torch.ones_like(text),
        prompt_ids=prompt,
        prompt_mask=torch.ones_like(prompt),
        response_ids=empty,
        response_mask=empty,
    )


def answers(number: int) -> list[list[int]]:
    """Different answers of one to three tokens and the end token, short ones more often, as in an
    answer vocabulary."""
    rng = random.Random(0)
    drawn: dict[tuple[int, ...], None] = {}
    while len(drawn) < number:
        length = rng.choices((1, 2, 3), (5, 3, 2))[0]
        drawn[tuple(rng.randrange(3, VOCABULARY) for _ in range(length))] = None
    return [[*ids, END] for ids in drawn]


def repeated(
    model: InstructBlip, queries: Tensor, batch: Batch, candidates: list[list[int]]
) -> Tensor:
    """Log-likelihoods by the training loss, the prompt written out for every candidate."""
    rows = len(candidates)
    ids, mask = pad(candidates)
    many = replace(
        batch,
        image_index=batch.image_index.expand(rows, -1),
        prompt_ids=batch.prompt_ids.expand(rows, -1),
        prompt_mask=batch.prompt_mask.expand(rows, -1),
        response_ids=ids,
        response_mask=mask,
    )
    joined = model.language.join(queries.expand(rows, -1, -1), many)
    return -torch.zeros(rows).index_add(0, joined.rows, model.language.loss(joined))


def measure(kind: str, options: argparse.Namespace) -> dict[str, float]:
    """Candidates per second of the three ways, and the largest difference of their scores."""
    model = build(kind, options.width, options.layers)
    batch, candidates = question(options.prompt), answers(options.candidates)
    queries = model.encode_queries(batch)
    model.encode_queries = lambda batch: queries

    def in_batches(size: int) -> Tensor:
        parts = (candidates[i : i + size] for i in range(0, len(candidates), size))
        return torch.cat([repeated(model, queries, batch, part) for part in parts])

    ways: dict[str, Callable[[], Tensor]] = {
        "shared": lambda: rank_candidates(model, batch, [candidates])[0],
        "batched": lambda: in_batches(options.chunk),
        "loop": lambda: in_batches(1),
    }
    clock = time.process_time if options.clock == "cpu" else time.perf_counter
    seconds = dict.fromkeys(ways, float("inf"))
    scores: dict[str, Tensor] = {}
    ways["shared"]()  # the first call pays for what is set up once
    for _ in range(options.repeats):
        for name, way in ways.items():
            began = clock()
            scores[name] = way()
            seconds[name] = min(seconds[name], clock() - began)
    for name, taken in seconds.items():
        rate = options.candidates / taken
        print(f"{kind:6} {name:8} {rate:10,.0f} candidates/s {seconds['loop'] / taken:7.1f} x loop")
    error = max(float((scores["shared"] - scores[way]).abs().max()) for way in ways)
    print(f"{kind:6} largest difference of a score: {error:.1e} nats")
    assert error < 1e-4, "the ways disagree"
    return {
        "ratio": round(seconds["loop"] / seconds["shared"], 1),
        "ratio_batched": round(seconds["batched"] / seconds["shared"], 1),
        "max_error": error,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--candidates", type=int, default=1000)
    parser.add_argument("--prompt", type=int, default=24, help="tokens of the prompt")
    parser.add_argument("--chunk", type=int, default=64, help="candidates per repeated batch")
    parser.add_argument("--width", type=int, default=256, help="width of the language model")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--clock", choices=("cpu", "wall"), default="cpu")
    parser.add_argument("--repeats", type=int, default=2)
    options = parser.parse_args()
    print(
        f"{options.candidates} candidates, 32 query tokens, {options.prompt} prompt tokens, "
        f"{options.layers} layers of width {options.width}, torch {torch.__version__}, "
        f"{torch.get_num_threads()} threads"
    )
    with torch.no_grad():
        causal, seq2seq = measure("llama", options), measure("t5", options)
    print(json.dumps({**causal, "seq2seq": seq2seq}))


if __name__ == "__main__":
    main()
