"""Where the queries look: attention to the cell that an instruction asks about.

    python -m runs.dense.attention WORK [--queries 4] [--images 100]

WORK is that of `claim.py`; the models are the start with some queries, and the tuned models of all
seeds. For each of some new images: the share of the attention that falls on the asked-for cell, as
the mean over queries and over the heads of the last layer that reads the image, with the
instruction and without any; for instructions by place and by look, of held-in pairs and of pairs
that no training shows. By chance it is 1 / 25. WORK/attention.json has the figures.
"""

import argparse
import random
from pathlib import Path
from statistics import fmean

import numpy as np
import torch
from torch import Tensor

from instructblip.core.files import write_json
from instructblip.evaluation.bootstrap import RESAMPLES
from instructblip.inference.engine import Engine
from instructblip.scenes.dense import (
    BY_LOOK,
    BY_PLACE,
    GRID,
    DenseScene,
    Item,
    render_dense,
    sample_dense,
)
from instructblip.scenes.world import HELD_OUT_PAIRS

PROMPT = "Question: {} Short answer:"
KINDS = {"place": BY_PLACE, "look": BY_LOOK, "look of held-out pairs": BY_LOOK}


def asked(kind: str, number: int) -> list[tuple[DenseScene, Item, str]]:
    """New images, a thing of each, and an instruction about it."""
    rng, found = random.Random(f"attention {kind}"), []
    while len(found) < number:
        scene = sample_dense(rng, "any" if "held-out" in kind else "seen")
        items = [
            i for i in scene.items if ((i.colour, i.shape) in HELD_OUT_PAIRS) == ("held" in kind)
        ]
        if items:
            item = rng.choice(items)
            question = rng.choice([*KINDS[kind].values()])(scene, item, rng)
            assert question is not None
            found.append((scene, item, PROMPT.format(question.text)))
    return found


def shares(maps: Tensor, item: Item) -> Tensor:
    """[Q] the share of each query's attention [Q, G, G] that falls on the cell of a thing."""
    side = maps.shape[-1] // GRID
    rows, columns = item.row * side, item.column * side
    return maps[:, rows : rows + side, columns : columns + side].sum((1, 2))


def measure(engines: list[Engine], number: int) -> dict[str, dict[str, float | list[float]]]:
    """Kind of instruction -> the mean share in percent, and its 95 % interval over images."""
    found = {}
    for kind in KINDS:
        values = []
        for scene, item, instruction in asked(kind, number):
            pixels = engines[0].images.transform(render_dense(scene))
            samples = [engine.sample(("image",), (pixels,), instruction) for engine in engines]
            looks = [
                shares(engine.look([sample])[0, 0], item).mean().item()
                for engine, sample in zip(engines, samples, strict=True)
            ]
            values.append(fmean(looks))
        drawn = np.random.default_rng(0).choice(values, (RESAMPLES, len(values))).mean(1)
        interval = [round(100 * float(q), 1) for q in np.quantile(drawn, (0.025, 0.975))]
        found[kind] = {"mean": round(100 * fmean(values), 1), "interval": interval}
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("work", type=Path)
    parser.add_argument("--queries", type=int, default=4)
    parser.add_argument("--images", type=int, default=100)
    args = parser.parse_args()
    torch.set_grad_enabled(False)
    tuned = sorted(args.work.glob(f"reads_{args.queries}/seed*/last"))
    models = {"before tuning": [args.work / f"start_{args.queries}_queries"], "after": tuned}
    found: dict[str, dict] = {}
    for name, folders in models.items():
        for reads, reading in ((True, "with the instruction"), (False, "without")):
            engines = [Engine.from_pretrained(str(f), instruction_aware=reads) for f in folders]
            found.setdefault(name, {})[reading] = measure(engines, args.images)
            print(name, reading, found[name][reading], flush=True)
    write_json(args.work / "attention.json", {"queries": args.queries, "shares": found})


if __name__ == "__main__":
    main()
