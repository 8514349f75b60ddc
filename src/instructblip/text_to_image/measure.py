"""How good drawings are: the exact checker on Scenes, and measures for any images.

``measure`` draws fresh prompts and checks each object. The others are the Frechet distance, the
CLIP score and the cycle check. A Frechet distance is called FID only with Inception's features;
with those of our own image encoder it is FD-ViT. It is biased for small sets: report the number of
images with it.
"""

import functools
import random
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image

from instructblip.core.drawings import Figures
from instructblip.data.images import ImageTransform
from instructblip.data.order import mix
from instructblip.model.instructblip import InstructBlip
from instructblip.scenes.language import at
from instructblip.scenes.world import Thing, render, sample_scene
from instructblip.text_to_image.checker import Verdict, check_image
from instructblip.text_to_image.sample import Painter
from instructblip.text_to_image.tasks import DrawExample, SubjectDrawings, describe

KINDS = ("one_object", "two_objects", "unseen_pairs", "subject")

Extractor = Callable[[Sequence[Image.Image]], Float[np.ndarray, "N X"]]
"""Images -> features."""


@runtime_checkable
class Answering(Protocol):
    """What the cycle check needs of an engine."""

    def answer(self, images: list, instructions: list[str]) -> list[str]: ...


@dataclass(frozen=True, slots=True)
class Measured:
    """One kind of prompt: examples, what was drawn for them, and the checker's verdicts."""

    kind: str
    figures: Figures
    examples: list[DrawExample]
    images: list[Image.Image]
    verdicts: list[Verdict]


def fresh_prompts(kind: str, number: int, seed: int = 1_000_003) -> list[DrawExample]:
    """Prompts that training, with other seeds, does not see. Unseen pairs: one object each."""
    if kind == "subject":
        drawings = SubjectDrawings(seed)
        return [drawings[i] for i in range(number)]
    shapes = (2, 2) if kind == "two_objects" else (1, 1)
    pairs = "unseen" if kind == "unseen_pairs" else "seen"
    examples = []
    for index in range(number):
        rng = random.Random(mix(seed, KINDS.index(kind), index))
        scene = sample_scene(rng, shapes=shapes, pairs=pairs)
        things = list(scene.things)
        rng.shuffle(things)
        text, expected = describe(things, with_size=rng.random() < 0.5)
        target = functools.partial(render, scene)
        examples.append(DrawExample(f"draw {text}", target, None, expected))
    return examples


def measure(
    painter: Painter, kind: str, examples: Sequence[DrawExample], seed: int = 0, **settings
) -> Measured:
    """Draw each example once, in batches of ``painter.batch_size``, and check the images."""
    start = time.monotonic()
    images = painter.draw_examples(examples, torch.Generator().manual_seed(seed), **settings)
    seconds = (time.monotonic() - start) / len(examples)
    verdicts = [check_image(i, e.things) for i, e in zip(images, examples, strict=True)]

    def percent(values: Iterable[bool]) -> float:
        values = list(values)
        return round(100 * sum(values) / len(values), 1)

    figures = Figures(
        objects=percent(each for v in verdicts for each in v.right),
        exact=percent(v.exact for v in verdicts),
        place=percent(each for v in verdicts for each in v.occupied),
        colour=percent(each for v in verdicts for each in v.colour_right),
        shape=percent(each for v in verdicts for each in v.shape_right),
        pictures=len(examples),
        seconds=round(seconds, 4),
    )
    return Measured(kind, figures, list(examples), images, verdicts)


def frechet_distance(left: Float[np.ndarray, "..."], right: Float[np.ndarray, "..."]) -> float:
    """Squared Frechet distance of the Gaussians fitted to features [N, X] and [M, X].

    Raises ValueError for fewer than two rows or unequal widths.
    """
    for features in (left, right):
        if features.ndim != 2 or len(features) < 2:
            raise ValueError(f"expected at least 2 rows of features; got shape {features.shape}")
    if left.shape[1] != right.shape[1]:
        raise ValueError(f"features differ in width: {left.shape[1]} and {right.shape[1]}")
    first, second = (np.atleast_2d(np.cov(each, rowvar=False)) for each in (left, right))
    # the trace of the root of first @ second: its eigenvalues are those of a symmetric matrix
    values, vectors = np.linalg.eigh(first)
    root = (vectors * np.sqrt(np.clip(values, 0, None))) @ vectors.T
    product = np.linalg.eigvalsh(root @ second @ root)
    overlap = np.sqrt(np.clip(product, 0, None)).sum()
    means = ((left.mean(0) - right.mean(0)) ** 2).sum()
    return float(means + np.trace(first) + np.trace(second) - 2 * overlap)


def vit_features(model: InstructBlip, transform: ImageTransform, batch: int = 64) -> Extractor:
    """The mean of the tokens of the model's image encoder: the extractor of FD-ViT."""

    def extract(images: Sequence[Image.Image]) -> Float[np.ndarray, "N X"]:
        features = []
        for start in range(0, len(images), batch):
            pixels = torch.stack([transform(image) for image in images[start : start + batch]])
            with torch.no_grad():
                tokens = model.encode_image(pixels.to(model.query_tokens.device))
                tokens = model.vision_model.norm(tokens)
            features.append(tokens.float().mean(1).cpu())
        return torch.cat(features).numpy().astype(np.float64)

    return extract


def clip_score(images: Sequence[Image.Image], texts: Sequence[str], path: str | Path) -> float:
    """100 max(0, cosine) of image and text, the mean over pairs, with a CLIP in a local directory.

    Hessel et al. 2021 scale by 2.5 instead of 100; papers on generation report this scale.
    """
    from transformers import AutoProcessor, CLIPModel

    if len(images) != len(texts):
        raise ValueError(f"got {len(images)} images and {len(texts)} texts")
    if not (Path(path) / "config.json").is_file():
        raise FileNotFoundError(f"{path} holds no CLIP; expected a local transformers directory")
    model = CLIPModel.from_pretrained(str(path), local_files_only=True).eval()
    processor = AutoProcessor.from_pretrained(str(path), local_files_only=True)
    inputs = processor(
        text=list(texts), images=list(images), return_tensors="pt", padding=True, truncation=True
    )
    with torch.no_grad():
        output = model(**inputs)
    cosine = torch.cosine_similarity(output.image_embeds, output.text_embeds)
    return float(100 * cosine.clamp(min=0).mean())


def cycle_check(
    engine: Answering, images: Sequence[Image.Image], things: Sequence[Sequence[Thing]]
) -> float:
    """Percent of questions about drawn scenes that ``engine`` answers as the prompt would.

    It asks for the colour and the shape of every object of a prompt. Compare the figure with the
    engine's score on rendered scenes, its upper bound.
    """
    asked: list[Image.Image] = []
    questions: list[str] = []
    expected: list[str] = []
    for image, prompted in zip(images, things, strict=True):
        for thing in prompted:
            asked += [image, image]
            questions.append(f"Question: what color is the shape {at(thing.place)}? Short answer:")
            questions.append(f"Question: what shape is {at(thing.place)}? Short answer:")
            expected += [thing.colour, thing.name]
    if not questions:
        raise ValueError("nothing to ask: no image comes with the objects of its prompt")
    answers = engine.answer(asked, questions)
    right = [a.strip().lower() == e for a, e in zip(answers, expected, strict=True)]
    return 100 * sum(right) / len(right)
