"""Step 4: assemble the trained parts as a BLIP-2 directory in transformers' format, in fp16.

    python runs/dense/assemble.py OUT --vision RUN --words RUN --qformer RUN

It ships as src/instructblip/dense.
"""

import argparse
import json
from pathlib import Path

from hidden_words import load_trained, start

from instructblip.data.images import ImageTransform
from instructblip.model.checkpoints.transformers import save_text_branch
from instructblip.model.instructblip import InstructBlip

CARD = """# dense: a BLIP-2 for images that hold more than queries can carry

The start of the recipe `dense`. {parameters:.1f} M parameters: an image encoder of 100 tokens, a
Q-Former of four layers and 16 queries, and the language model of the starter. It reads images of
the dense world alone (`instructblip scenes --dense`): 20 to 25 things on a 5x5 grid, each with a
colour, a shape, a size and a digit.

It was made by `runs/dense.sh` in about 20 minutes on two CPU cores, from images of that world
without the held-out pairs of colour and shape, and was asked no question. The encoder learned what
stands in which cell. Then queries and a phrase of which one word is hidden read each other, and the
best query had to mean that word. Then the language model completed phrases from the queries.
`text_branch.safetensors` is the part of the Q-Former that reads text. `docs/dense.md` has what
tuning makes of it.

Hidden words found in 256 new images of 20 to 25 things, in percent:

{table}
"""


def card(words: Path, parameters: int) -> str:
    """Return the model card with the accuracy of step 2."""
    scores = json.loads((words / "accuracy.json").read_text())
    kinds = [*next(iter(scores.values()))]
    lines = ["| queries | " + " | ".join(kinds) + " |", "|---|" + "---:|" * len(kinds)]
    lines += [
        f"| {queries} | " + " | ".join(f"{found[kind]:.0f}" for kind in kinds) + " |"
        for queries, found in scores.items()
    ]
    return CARD.format(parameters=parameters / 1e6, table="\n".join(lines))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--vision", type=Path, required=True)
    parser.add_argument("--words", type=Path, required=True, help="the run of step 2")
    parser.add_argument("--qformer", type=Path, required=True, help="the run of step 3")
    args = parser.parse_args()
    aware, tokens = start(args.vision, args.words)
    load_trained(aware, args.qformer)
    config = aware.config.model_copy(update={"instruction_aware": False})
    plain = InstructBlip(config, generation_settings=aware.generation_settings)
    kept = plain.state_dict().keys()
    plain.load_state_dict({k: v for k, v in aware.state_dict().items() if k in kept})
    plain.half().eval().save_pretrained(args.out, assets=aware.assets)
    save_text_branch(aware.half().qformer, args.out / "text_branch.safetensors")
    tokens.save_pretrained(args.out)
    side = aware.config.vision.image_size
    ImageTransform(image_size=side, mean=(0.5,) * 3, std=(0.5,) * 3).save_pretrained(args.out)
    parameters = sum(p.numel() for p in plain.parameters())
    (args.out / "README.md").write_text(card(args.words, parameters))


if __name__ == "__main__":
    main()
