"""Answers with 5 beams, ours and transformers' InstructBLIP side by side on the same weights.

transformers' model is called as its documentation shows, with a batch padded on the left (T5: on
the right, where its relative positions are those of training). Random weights end no answer early:
both generate all tokens.

    python benchmarks/generate.py --size cpu-mid --threads 2
    python benchmarks/generate.py --size flant5xl --device cuda --dtype bf16
"""

import json
from typing import Any

import torch
from side_by_side import (
    DTYPES,
    IMAGE_TOKEN,
    QUERIES,
    alternate,
    autocast,
    build,
    is_seq2seq,
    make_batch,
    parse,
)
from torch.nn.utils.rnn import pad_sequence

from instructblip.model.decoding import GREEDY
from instructblip.model.inference import generate_responses


def main() -> None:
    options = parse(
        __doc__,
        beams={"type": int, "default": 5},
        tokens={"type": int, "default": 10},
        rounds={"type": int, "default": 2},
    )
    ours, theirs = build(options.size, options.device, DTYPES[options.dtype])
    ours.eval()
    theirs.eval()
    batch, inputs = make_batch(0, options.batch, options.size, device=options.device)
    prompts = [
        ids[mask.bool()] for ids, mask in zip(batch.prompt_ids, batch.prompt_mask, strict=True)
    ]
    inputs = {
        name: inputs[name]
        for name in ("pixel_values", "qformer_input_ids", "qformer_attention_mask")
    } | rows_of(prompts, left=not is_seq2seq(options.size))
    length: dict[str, Any] = {"max_new_tokens": options.tokens, "min_new_tokens": options.tokens}
    decoding = GREEDY.override(num_beams=options.beams, **length)
    our_ids = generate_responses(ours, batch, decoding=decoding)

    def their_answers() -> torch.Tensor:
        with autocast(options):
            return theirs.generate(**inputs, num_beams=options.beams, do_sample=False, **length)

    their_ids = their_answers()
    equal = sum(
        ids == row[-options.tokens :].tolist() for ids, row in zip(our_ids, their_ids, strict=True)
    )
    seconds = alternate(
        {
            "transformers": lambda _: their_answers(),
            "ours": lambda _: generate_responses(ours, batch, decoding=decoding),
        },
        options.rounds,
        options.clock,
    )
    print(f"{equal} of {options.batch} answers are equal, token for token")
    for name, value in seconds.items():
        print(f"{name:14} {value:8.2f} s {options.batch / value:8.2f} answers/s")
    ratio = round(seconds["transformers"] / seconds["ours"], 3)
    print(
        json.dumps(
            {
                "ratio": ratio,
                "equal": equal,
                "of": options.batch,
                "size": options.size,
                "device": options.device,
                "dtype": options.dtype,
                "clock": options.clock,
                "threads": options.threads,
                "seconds": seconds,
            }
        )
    )


def rows_of(prompts: list[torch.Tensor], left: bool) -> dict[str, torch.Tensor]:
    """[image tokens; prompt] of each sample, padded on the left or on the right."""
    queries = torch.full_like(prompts[0][:1], IMAGE_TOKEN).expand(QUERIES)
    rows = [torch.cat([queries, prompt]) for prompt in prompts]
    ids = pad_sequence(rows, batch_first=True, padding_side="left" if left else "right")
    return {"input_ids": ids, "attention_mask": (ids != 0).long()}


if __name__ == "__main__":
    main()
