"""The figures of drawing on Scenes: the checker over fresh prompts, by kind of prompt."""

import functools
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from PIL import Image

from instructblip.data.order import mix
from instructblip.scenes.language import join, phrase
from instructblip.scenes.world import render, sample_scene
from instructblip.text_to_image.checker import Verdict, check_picture
from instructblip.text_to_image.sample import Painter
from instructblip.text_to_image.tasks import DrawExample, SubjectDrawings

KINDS = ("one_object", "two_objects", "unseen_pairs", "subject")


@dataclass(frozen=True, slots=True)
class Figures:
    """Percent over the objects of one kind of prompt; ``exact`` is over pictures."""

    objects: float
    exact: float
    place: float
    colour: float
    shape: float
    pictures: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Measured:
    """One kind of prompt: what was asked for, drawn and found."""

    kind: str
    figures: Figures
    examples: list[DrawExample]
    pictures: list[Image.Image]
    verdicts: list[Verdict]


def fresh_prompts(kind: str, number: int, seed: int = 1_000_003) -> list[DrawExample]:
    """Prompts never seen in training, which has other seeds. Unseen pairs: one object each."""
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
        sized = rng.random() < 0.5
        text = join([phrase(t, size=sized, place=True) for t in things])
        asked = things if sized else [replace(t, size="") for t in things]
        target = functools.partial(render, scene)
        examples.append(DrawExample(f"draw {text}", target, None, tuple(asked)))
    return examples


def measure(
    painter: Painter, kind: str, examples: Sequence[DrawExample], seed: int = 0, **settings
) -> Measured:
    """Draw each example once and hold the pictures to what was asked for.

    Seconds are a picture's share of a batch of ``painter.batch_size``.
    """
    began = time.monotonic()
    pictures = painter.draw_examples(examples, torch.Generator().manual_seed(seed), **settings)
    seconds = (time.monotonic() - began) / len(examples)
    verdicts = [check_picture(p, e.things) for p, e in zip(pictures, examples, strict=True)]

    def percent(values: list[bool]) -> float:
        return round(100 * sum(values) / len(values), 1)

    return Measured(
        kind,
        Figures(
            objects=percent([r for v in verdicts for r in v.right]),
            exact=percent([v.exact for v in verdicts]),
            place=percent([r for v in verdicts for r in v.occupied]),
            colour=percent([r for v in verdicts for r in v.colour_right]),
            shape=percent([r for v in verdicts for r in v.shape_right]),
            pictures=len(examples),
            seconds=round(seconds, 4),
        ),
        list(examples),
        pictures,
        verdicts,
    )
