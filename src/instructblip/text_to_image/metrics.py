"""How good pictures are where no exact checker can say: Frechet distance, CLIP score, cycle check.

A Frechet distance is called FID only over Inception's features; over those of our own image encoder
it is FD-ViT. It is biased for small sets: give the number of pictures with it.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image

from instructblip.data.images import ImageTransform
from instructblip.model.instructblip import InstructBlip
from instructblip.scenes.language import at
from instructblip.scenes.world import Thing

Extractor = Callable[[Sequence[Image.Image]], np.ndarray]
"""Pictures -> features [N, X]."""


class Answering(Protocol):
    """What the cycle check needs of an engine."""

    def answer(self, images: list, instructions: list[str]) -> list[str]: ...


def frechet_distance(left: Float[np.ndarray, "N X"], right: Float[np.ndarray, "M X"]) -> float:
    """Squared Frechet distance of the Gaussians fitted to two sets of features.

    Raises ValueError for fewer than two rows or unequal widths.
    """
    for features in (left, right):
        if features.ndim != 2 or len(features) < 2:
            raise ValueError(f"expected at least 2 rows of features; got shape {features.shape}")
    if left.shape[1] != right.shape[1]:
        raise ValueError(f"features differ in width: {left.shape[1]} and {right.shape[1]}")
    first, second = np.cov(left, rowvar=False), np.cov(right, rowvar=False)
    first, second = np.atleast_2d(first), np.atleast_2d(second)
    # trace of the root of the product: its eigenvalues are those of a symmetric matrix
    values, vectors = np.linalg.eigh(first)
    root = (vectors * np.sqrt(np.clip(values, 0, None))) @ vectors.T
    product = np.linalg.eigvalsh(root @ second @ root)
    overlap = np.sqrt(np.clip(product, 0, None)).sum()
    apart = ((left.mean(0) - right.mean(0)) ** 2).sum()
    return float(apart + np.trace(first) + np.trace(second) - 2 * overlap)


def vit_features(model: InstructBlip, transform: ImageTransform, batch: int = 64) -> Extractor:
    """The mean of our image encoder's tokens: the extractor of FD-ViT."""

    def extract(pictures: Sequence[Image.Image]) -> np.ndarray:
        device, found = model.query_tokens.device, []
        for start in range(0, len(pictures), batch):
            pixels = torch.stack([transform(p) for p in pictures[start : start + batch]])
            with torch.no_grad():
                found.append(model.encode_image(pixels.to(device)).float().mean(1).cpu())
        return torch.cat(found).numpy().astype(np.float64)

    return extract


def clip_score(pictures: Sequence[Image.Image], texts: Sequence[str], path: str | Path) -> float:
    """100 max(0, cosine) of picture and text, the mean over pairs, by a CLIP in a local directory.

    Hessel et al. 2021 scale by 2.5 instead; the generation literature reports this one.
    """
    from transformers import AutoProcessor, CLIPModel

    if len(pictures) != len(texts):
        raise ValueError(f"got {len(pictures)} pictures and {len(texts)} texts")
    if not (Path(path) / "config.json").is_file():
        raise FileNotFoundError(f"{path} holds no CLIP; expected a local transformers directory")
    model = CLIPModel.from_pretrained(str(path), local_files_only=True).eval()
    processor = AutoProcessor.from_pretrained(str(path), local_files_only=True)
    inputs = processor(
        text=list(texts), images=list(pictures), return_tensors="pt", padding=True, truncation=True
    )
    with torch.no_grad():
        output = model(**inputs)
    cosine = torch.cosine_similarity(output.image_embeds, output.text_embeds)
    return float(100 * cosine.clamp(min=0).mean())


def cycle_check(
    engine: Answering, pictures: Sequence[Image.Image], things: Sequence[Sequence[Thing]]
) -> float:
    """Percent of questions about drawn scenes that our own model answers as the prompt would.

    Asked are the colour and the shape of everything that was to be drawn. Read it beside the same
    model's score on rendered scenes: it can be no better than the model's sight.
    """
    images, questions, wanted = [], [], []
    for picture, asked in zip(pictures, things, strict=True):
        for thing in asked:
            for text, answer in (
                (f"what color is the shape {at(thing.place)}?", thing.colour),
                (f"what shape is {at(thing.place)}?", thing.name),
            ):
                images.append(picture)
                questions.append(f"Question: {text} Short answer:")
                wanted.append(answer)
    if not questions:
        raise ValueError("nothing to ask: no picture comes with the things it was to show")
    answers = engine.answer(images, questions)
    right = [a.strip().lower() == w for a, w in zip(answers, wanted, strict=True)]
    return 100 * sum(right) / len(right)
