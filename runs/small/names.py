"""What the queries of a model spell, without its language model: the check behind `spelling`.

    python runs/small/names.py MODEL PACKAGES

For known names in the unseen style, known names as photos, and held-out names it prints how often
the right name is the likeliest to be spelled, of all names and of four, and for pages of several
images in the unseen style how often the name at a place is, and their number.
"""

import argparse
import random
from pathlib import Path

import torch
from described import SLOTS, slots, spelled
from PIL import Image
from torch import Tensor

from instructblip.inference.engine import Engine
from instructblip.model.align import Align
from instructblip.scenes.pictures.catalog import read_catalog, single
from instructblip.scenes.pictures.world import World, composite


class Speller:
    """The likelihood of names at the queries of an image, and those of an empty place."""

    def __init__(self, engine: Engine, names: list[str]) -> None:
        self.engine, self.align = engine, Align(engine.model)
        self.queries = engine.model.config.num_query_tokens
        spellings = [spelled(engine.tokens, (name,), self.queries) for name in names]
        spellings.append(spelled(engine.tokens, (), self.queries))
        self.words, ids = torch.tensor(spellings).unique(return_inverse=True)
        self.ids = ids[:, : self.queries // SLOTS]  # [names + 1, slot]: the last is no name

    def likelihood(self, image: Image.Image) -> Tensor:
        """[places, names + 1]"""
        model, none = self.engine.model, torch.zeros(1, 0, dtype=torch.long)
        features = model.encode_image(self.engine.images.transform(image)[None])
        queries = model.project_queries(model.query_image(features, none, none))
        likelihood = self.align.scores(queries - self.align.mean, self.words).log_softmax(2)[0]
        places = likelihood.unflatten(0, (SLOTS, -1))  # [places, slot, words]
        return places[:, torch.arange(self.ids.shape[1]), self.ids].sum(2)


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("packages", type=Path)
    args = parser.parse_args()
    world = World(read_catalog(args.packages))
    engine = Engine.from_pretrained(args.model, instruction_aware=False)
    groups = {
        "unseen style": (world.unseen_style, list(world.known_names)),
        "photos": (world.photos, list(world.known_names)),
        "held-out names": (world.new, list(world.new_names)),
    }
    for title, (pictures, names) in groups.items():
        speller, rng, first, of_four = Speller(engine, names), random.Random(0), 0, 0
        for picture in pictures:
            scores = speller.likelihood(single(picture))[0, :-1].tolist()
            row = dict(zip(names, scores, strict=True))
            first += max(row, key=row.__getitem__) == picture.name
            choices = [picture.name, *world.others(picture, 3, rng)]
            of_four += max(choices, key=row.__getitem__) == picture.name
        count = len(pictures)
        print(
            f"{title}: {100 * first / count:.1f} % of {len(names)} names, "
            f"{100 * of_four / count:.1f} % of four; n {count}"
        )
    names, rng, right, placed, counted = list(world.known_names), random.Random(0), 0, 0, 0
    speller = Speller(engine, names)
    for _ in range(200):
        page, shown = composite(world, world.unseen_style, rng)
        truth = slots({where: picture.name for where, picture in shown.items()})
        likelihood = speller.likelihood(page)
        counted += int((likelihood.argmax(1) < len(names)).sum()) == len(shown)
        for name, scores in zip(truth, likelihood[:, :-1], strict=False):
            if name:
                placed += 1
                right += names[int(scores.argmax())] == name
    print(
        f"pages: {100 * right / placed:.1f} % of names, {100 * counted / 200:.1f} % counted; n 200"
    )


if __name__ == "__main__":
    main()
