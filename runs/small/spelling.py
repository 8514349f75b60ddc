"""Step 1: the queries learn to spell the names of what an image shows.

    python runs/small/spelling.py START PACKAGES OUT --features FILE --steps 400

START is what `combine` wrote. No layer of its language model runs: the stage is `align`, and its
texts are the words of `described`. FILE keeps the features of all images of the training world,
each in five views, and of pages of several. OUT is a run directory: it resumes.
"""

import argparse
import random
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count, islice
from pathlib import Path

import torch
from described import slots, spelled
from PIL import Image
from stage import run_stage
from torch import Tensor

from instructblip.core.batch import Batch
from instructblip.core.files import replacing
from instructblip.data.tokens import Tokens
from instructblip.inference.engine import Engine
from instructblip.model.align import Align
from instructblip.model.instructblip import InstructBlip
from instructblip.model.trainable import ALIASES
from instructblip.scenes.pictures.catalog import SIDE, read_catalog, single
from instructblip.scenes.pictures.world import World, composite

SAMPLES = 256  # of a step
PAGES_OF_STEP = 64  # among them
VIEWS, PAGES = 5, 2500
NOISE, HIDDEN = 0.3, 0.2
"""In training: noise on the features, in their deviation, and the share of tokens left out."""


@dataclass(frozen=True)
class Features:
    """What the image encoder gives, in fp16, and the names of what is there."""

    names: list[str]
    singles: Tensor  # [VIEWS, N, P, V]
    shown: list[tuple[str | None, ...]]
    pages: Tensor  # [M, P, V]


def read_features(model: Path, packages: Path, file: Path) -> Features:
    """The features in ``file``, which are computed where it does not exist (minutes)."""
    if not file.exists():
        world, rng = World(read_catalog(packages)), random.Random(0)
        engine = Engine.from_pretrained(str(model), instruction_aware=False)
        images = [single(picture) for picture in world.train]
        views = [encode(engine, iter(images))]
        for i in range(VIEWS - 1):
            print(f"features of view {i + 2} of {VIEWS}", flush=True)
            views.append(encode(engine, (varied(image, rng) for image in images)))
        shown: list[tuple[str | None, ...]] = []

        def pages() -> Iterator[Image.Image]:
            for _ in range(PAGES):
                page, pictures = composite(world, world.train, rng)
                shown.append(slots({place: p.name for place, p in pictures.items()}))
                yield page

        print(f"features of {PAGES} pages", flush=True)
        values = {
            "names": [picture.name for picture in world.train],
            "singles": torch.stack(views),
            "pages": encode(engine, pages()),
            "shown": shown,
        }
        with replacing(file) as temporary:
            torch.save(values, temporary)
    return Features(**torch.load(file, weights_only=True))


def varied(image: Image.Image, rng: random.Random) -> Image.Image:
    """A part of the image, mirrored in half of the cases."""
    side = round(SIDE * rng.uniform(0.7, 1.0))
    left, top = rng.randint(0, SIDE - side), rng.randint(0, SIDE - side)
    part = image.resize(
        (SIDE, SIDE), Image.Resampling.BICUBIC, (left, top, left + side, top + side)
    )
    return part.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if rng.random() < 0.5 else part


def augmented(features: Tensor, generator: torch.Generator) -> Tensor:
    """Features [B, P, V] as training sees them."""
    features = features.float()
    noise = NOISE * features.std() * torch.randn(features.shape, generator=generator)
    return (features + noise) * (
        torch.rand((*features.shape[:2], 1), generator=generator) >= HIDDEN
    )


@torch.no_grad()
def encode(engine: Engine, images: Iterator[Image.Image]) -> Tensor:
    """[N, P, V] features in fp16."""
    features = []
    while some := [*islice(images, 64)]:
        pixels = torch.stack([engine.images.transform(image) for image in some])
        features.append(engine.model.encode_image(pixels).half())
    return torch.cat(features)


@dataclass(frozen=True)
class Spelled:
    """Batches that nothing but the number of their step decides, so that a run resumes."""

    features: Features
    of_singles: Tensor  # [N, Q]
    of_pages: Tensor  # [M, Q]

    def iterate(self, step: int) -> Iterator[Batch]:
        return map(self.make, count(step))

    def make(self, step: int) -> Batch:
        generator = torch.Generator().manual_seed(step)
        views, number = self.features.singles.shape[:2]
        singles = SAMPLES - PAGES_OF_STEP
        which = torch.randint(number, (singles,), generator=generator)
        view = torch.randint(views, (singles,), generator=generator)
        page = torch.randint(len(self.of_pages), (PAGES_OF_STEP,), generator=generator)
        seen = torch.cat([self.features.singles[view, which], self.features.pages[page]])
        texts = torch.cat([self.of_singles[which], self.of_pages[page]])
        none = torch.zeros(SAMPLES, 0, dtype=torch.long)
        return Batch(
            image_index=torch.arange(SAMPLES)[:, None],
            image_features=augmented(seen, generator),
            qformer_ids=none,
            qformer_mask=none,
            prompt_ids=none,
            prompt_mask=none,
            response_ids=texts,
            response_mask=torch.ones_like(texts),
            datasets=("spelled",) * SAMPLES,
            ids=tuple(f"{step}/{i}" for i in range(SAMPLES)),
        )


def main() -> None:
    parser = argparse.ArgumentParser()
    for name in ("start", "packages", "out"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--features", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=400)
    args = parser.parse_args()
    features = read_features(args.start, args.packages, args.features)
    torch.manual_seed(0)
    model = InstructBlip.from_pretrained(args.start)
    model.set_trainable(tuple(p for p in ALIASES["qformer"] if p != "qformer_text_embeddings"))
    model.to_training_dtypes(torch.bfloat16, torch.bfloat16)
    tokens, queries = Tokens.from_pretrained(args.start), model.config.num_query_tokens
    batches = Spelled(
        features,
        torch.tensor([spelled(tokens, (name,), queries) for name in features.names]),
        torch.tensor([spelled(tokens, names, queries) for names in features.shown]),
    )
    export = lambda path: model.save_pretrained(path, whole=False)  # noqa: E731
    run_stage(Align(model), batches, args.out, export, args.steps, learning_rate=1e-3)


if __name__ == "__main__":
    main()
