"""Answers with 5 beams, ours and transformers' InstructBLIP side by side on the same weights.

Theirs is called as its documentation shows, a batch padded on the left. Random weights end no
answer early: both generate all tokens.

    python benchmarks/generate.py --size cpu-mid --threads 2
"""

import argparse
import json

import torch
from side_by_side import QUERIES, SIZES, alternate, build, make_batch

from instructblip.model.inference import generate_responses


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", choices=SIZES, default="cpu-mid")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--beams", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    ours, theirs = build(options.size)
    ours.eval()
    theirs.eval()
    batch, inputs = make_batch(0, options.batch)
    prompts = [
        ids[mask.bool()] for ids, mask in zip(batch.prompt_ids, batch.prompt_mask, strict=True)
    ]
    width = max(map(len, prompts))
    left = {
        name: inputs[name]
        for name in ("pixel_values", "qformer_input_ids", "qformer_attention_mask")
    }
    queries = inputs["input_ids"][0, :QUERIES]
    pads = [torch.zeros(width - len(p), dtype=torch.long) for p in prompts]
    left["input_ids"] = torch.stack(
        [torch.cat([e, queries, p]) for e, p in zip(pads, prompts, strict=True)]
    )
    left["attention_mask"] = (left["input_ids"] != 0).long()
    length = {"max_new_tokens": options.tokens, "min_new_tokens": options.tokens}
    said = generate_responses(ours, batch, num_beams=options.beams, **length)
    theirs_said = theirs.generate(**left, num_beams=options.beams, do_sample=False, **length)
    equal = sum(
        ids == row[-options.tokens :].tolist() for ids, row in zip(said, theirs_said, strict=True)
    )
    seconds = alternate(
        {
            "transformers": lambda _: theirs.generate(
                **left, num_beams=options.beams, do_sample=False, **length
            ),
            "ours": lambda _: generate_responses(ours, batch, num_beams=options.beams, **length),
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
                "clock": options.clock,
                "threads": options.threads,
                "seconds": seconds,
            }
        )
    )


if __name__ == "__main__":
    main()
