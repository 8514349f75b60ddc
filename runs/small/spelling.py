"""Step 1: the queries learn to spell the names of what an image shows.

    python runs/small/spelling.py START PACKAGES OUT --features FILE --steps 600

START is what `combine` wrote. No layer of its language model runs: the stage is `align`, and its
texts are the words of `described`. The Q-Former reads a question beside the point in half of the
samples, so that its text branch learns not to disturb the queries. FILE keeps the features of all
images of the training world, each in twelve views, and of pages of several. OUT is a run directory:
it resumes.
"""

import argparse
import random
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count, islice
from pathlib import Path

import torch
from described import described, slots, spelled
from PIL import Image, ImageEnhance, ImageFilter, ImageOps
from stage import run_stage
from torch import Tensor

from instructblip.core.batch import Batch
from instructblip.core.files import replacing
from instructblip.data.samples import pad
from instructblip.data.tokens import Tokens
from instructblip.inference.engine import Engine
from instructblip.model.align import Align
from instructblip.model.instructblip import InstructBlip
from instructblip.model.trainable import ALIASES
from instructblip.scenes.pictures.catalog import SIDE, read_catalog, single
from instructblip.scenes.pictures.world import World, composite

SAMPLES = 256  # of a step
PAGES_OF_STEP = 64  # among them
VIEWS, PAGES = 12, 5000
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
                yield redrawn(page, rng)

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
    """The image turned, moved, cut or made smaller, mirrored in half of the cases, and redrawn."""
    if rng.random() < 0.5:
        angle = rng.uniform(-15, 15)
        image = image.rotate(angle, Image.Resampling.BICUBIC, fillcolor="white")
    side = round(SIDE * rng.uniform(0.65, 1.15))
    left, top = (rng.randint(min(0, SIDE - side), max(0, SIDE - side)) for _ in range(2))
    part = Image.new("RGB", (side, side), "white")
    part.paste(image, (-left, -top))
    part = part.resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    if rng.random() < 0.5:
        part = part.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return redrawn(part, rng)


def redrawn(image: Image.Image, rng: random.Random) -> Image.Image:
    """The image in other colors, and with softer, harder or fewer edges, as another style may."""
    if rng.random() < 0.8:
        image = ImageEnhance.Color(image).enhance(rng.uniform(0.3, 1.7))
        image = ImageEnhance.Brightness(image).enhance(rng.uniform(0.75, 1.2))
        image = ImageEnhance.Contrast(image).enhance(rng.uniform(0.6, 1.4))
        hue, *others = image.convert("HSV").split()
        turn = rng.randint(-12, 12)
        hue = hue.point([(value + turn) % 256 for value in range(256)])
        image = Image.merge("HSV", (hue, *others)).convert("RGB")
    if rng.random() < 0.15:
        image = ImageOps.grayscale(image).convert("RGB")
    what = rng.random()
    if what < 0.2:
        return image.filter(ImageFilter.GaussianBlur(rng.uniform(0.5, 2)))
    if what < 0.3:
        return ImageOps.posterize(image, 3)
    return image.filter(ImageFilter.EDGE_ENHANCE_MORE) if what < 0.4 else image


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
class Questions:
    """What the Q-Former reads beside an image."""

    world: World
    tokens: Tokens

    def beside(self, rng: random.Random) -> list[int]:
        """The tokens of a question about another image; in half of the cases none."""
        text = described(self.world, rng).text.instruction
        return self.tokens.instruction(text) if rng.random() < 0.5 else []


@dataclass(frozen=True)
class Spelled:
    """Batches that nothing but the number of their step decides, so that a run resumes."""

    features: Features
    of_singles: Tensor  # [N, Q]
    of_pages: Tensor  # [M, Q]
    questions: Questions

    def iterate(self, step: int) -> Iterator[list[Batch]]:
        return ([self.make(number)] for number in count(step))

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
        rng = random.Random(f"questions {step}")
        ids, mask = pad([self.questions.beside(rng) for _ in range(SAMPLES)])
        return Batch(
            image_index=torch.arange(SAMPLES)[:, None],
            image_features=augmented(seen, generator),
            qformer_ids=ids,
            qformer_mask=mask,
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
    parser.add_argument("--steps", type=int, default=600)
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
        Questions(World(read_catalog(args.packages)), tokens),
    )
    export = lambda path: model.save_pretrained(path, whole=False)  # noqa: E731
    run_stage(Align(model), batches, args.out, export, args.steps, learning_rate=1e-3)


if __name__ == "__main__":
    main()
