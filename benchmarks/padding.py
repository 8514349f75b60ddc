"""How much of a training batch is padding, in the order drawn and in buckets of like length.

Counts token slots of each micro batch as the collator pads it; no image is read. "packed" is what
a decoder with packed rows computes on padding: nothing, so only "instruction" is left for it.

    python benchmarks/padding.py --steps 32 data.root=data/scenes
"""

import argparse
import json

from instructblip.data.loader import Loader
from instructblip.experiment.build import training_samples
from instructblip.recipe.load import load_recipe


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--recipe", default="quickstart")
    parser.add_argument("--steps", type=int, default=32)
    parser.add_argument("overrides", nargs="*")
    options = parser.parse_args()
    recipe = load_recipe(options.recipe, ["features.cache=off", *options.overrides])
    print(
        f"{'buckets':>8} {'parts':>6} {'instruction':>12} {'prompt':>8} {'response':>9} {'all':>6}"
    )
    rows = []
    for accumulate in (1, 4):
        for steps in (0, 1, 8, 32):
            data = recipe.data.model_copy(update={"bucket_steps": steps})
            training = recipe.training.model_copy(update={"accumulate": accumulate})
            changed = recipe.model_copy(update={"data": data, "training": training})
            shares = padding(training_samples(changed), options.steps)
            rows.append({"bucket_steps": steps, "accumulate": accumulate, **shares})
            cells = "{instruction:12.0%} {prompt:8.0%} {response:9.0%} {all:6.0%}".format(**shares)
            print(f"{steps:8} {accumulate:6} {cells}")
    print(json.dumps({"recipe": options.recipe, "steps": options.steps, "rows": rows}))


def padding(loader: Loader, steps: int) -> dict[str, float]:
    """Share of padded slots of each text, and of all three together."""
    names = ("instruction", "prompt", "response")
    real, slots = [0, 0, 0], [0, 0, 0]
    for step in range(steps):
        for part in loader.parts(step):
            texts = [loader.rendered(slot)[1] for slot in part]
            lengths = [list(map(len, loader.tokens.tokenize(text))) for text in texts]
            for i, counts in enumerate(zip(*lengths, strict=True)):
                real[i] += sum(counts)
                slots[i] += max(counts) * len(counts)
    shares = {name: 1 - real[i] / slots[i] for i, name in enumerate(names)}
    return {**shares, "all": 1 - sum(real) / sum(slots)}


if __name__ == "__main__":
    main()
