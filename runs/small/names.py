"""What the queries of a model name, without its language model: the check behind `align`.

    python runs/small/names.py MODEL PACKAGES

For known names in the unseen style, known names as photos, and held-out names it prints how often
the best query is nearest to the words of the right name, of all names and of four.
"""

import argparse
import random
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from instructblip.inference.engine import Engine
from instructblip.scenes.pictures.catalog import Picture, read_catalog, single
from instructblip.scenes.pictures.world import World


class Namer:
    """A model, and the directions of names among its word embeddings (as in `model.align`)."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.words = engine.model.language_model.get_input_embeddings().weight.float()
        self.mean = self.words.mean(0)

    def direction(self, name: str) -> Tensor:
        ids = self.engine.tokens.response(name)[:-1]  # with the space in front of it, as trained
        return F.normalize((self.words[ids] - self.mean).sum(0), dim=0)

    def similarity(self, picture: Picture, directions: Tensor) -> Tensor:
        """[names] the cosine of the best query with each name."""
        model = self.engine.model
        features = model.encode_image(self.engine.images.transform(single(picture))[None])
        none = torch.zeros(1, 0, dtype=torch.long)
        queries = model.project_queries(model.query_image(features, none, none))[0] - self.mean
        return (F.normalize(queries, dim=-1) @ directions.T).amax(0)


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("packages", type=Path)
    args = parser.parse_args()
    world = World(read_catalog(args.packages))
    engine = Engine.from_pretrained(args.model, instruction_aware=False)
    namer = Namer(engine)
    groups = {
        "unseen style": (world.unseen_style, list(world.known_names)),
        "photos": (world.photos, list(world.known_names)),
        "held-out names": (world.new, list(world.new_names)),
    }
    for title, (pictures, names) in groups.items():
        directions = torch.stack([namer.direction(name) for name in names])
        rng, first, of_four = random.Random(0), 0, 0
        for picture in pictures:
            row = dict(zip(names, namer.similarity(picture, directions).tolist(), strict=True))
            first += max(row, key=row.__getitem__) == picture.name
            choices = [picture.name, *world.others(picture, 3, rng)]
            of_four += max(choices, key=row.__getitem__) == picture.name
        count = len(pictures)
        print(
            f"{title}: {100 * first / count:.1f} % of {len(names)} names, "
            f"{100 * of_four / count:.1f} % of four; n {count}"
        )


if __name__ == "__main__":
    main()
