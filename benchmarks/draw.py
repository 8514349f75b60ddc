"""How well the decoder draws Scenes: fresh prompts, the exact checker, seconds per image.

    python benchmarks/draw.py --prompts 500 [--model starter] [--answers RUN] [--clip DIR]
        [--out FOLDER]

``--prompts`` is the number for all kinds together. Prints a line for each kind, the Frechet
distance of drawn and rendered images with our image encoder, with ``--answers`` the cycle check by
that InstructBLIP, with ``--clip`` the CLIP score, then one line of JSON: percent of the prompted
objects with their colour and shape (and size, if prompted) at their place, and the seconds of one
image drawn alone.
"""

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from PIL import Image

from instructblip.inference.engine import Engine
from instructblip.text_to_image.gallery import write_drawings
from instructblip.text_to_image.measure import (
    KINDS,
    Measured,
    clip_score,
    cycle_check,
    frechet_distance,
    fresh_prompts,
    measure,
    vit_features,
)
from instructblip.text_to_image.sample import Painter
from instructblip.text_to_image.tasks import DrawExample


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prompts", type=int, default=500)
    parser.add_argument("--model", default="starter")
    parser.add_argument("--answers", help="an InstructBLIP that answers questions about the images")
    parser.add_argument("--clip", help="local directory of a CLIP that scores the images")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance", type=float, default=2.0)
    parser.add_argument("--out", type=Path, help="folder for images and a grid of each kind")
    args = parser.parse_args()
    painter = Painter.from_pretrained(args.model)
    settings = {"steps": args.steps, "guidance": args.guidance}
    measured = []
    for index, kind in enumerate(KINDS):
        number = args.prompts // len(KINDS) + (index < args.prompts % len(KINDS))
        each = measure(painter, kind, fresh_prompts(kind, number), **settings)
        figures = "  ".join(f"{name} {value}" for name, value in asdict(each.figures).items())
        print(f"{kind:13} {figures}", flush=True)
        measured.append(each)
    print_distances(painter, measured)
    if args.answers:
        print_cycle(args.answers, measured)
    if args.clip:
        print_clip(args.clip, measured)
    if args.out:
        print(write_drawings(args.out, measured))
    scores = {each.kind: each.figures.objects for each in measured}
    seconds = seconds_alone(painter, measured[0].examples[:8], **settings)
    print(json.dumps({**scores, "seconds": round(seconds, 4)}))


def rendered(examples: Sequence[DrawExample]) -> list[Image.Image]:
    return [example.target() for example in examples if example.target is not None]


def print_distances(painter: Painter, measured: Sequence[Measured]) -> None:
    """Drawn and rendered images; and, for scale, two halves of the rendered ones."""
    features = vit_features(painter.model.instructblip, painter.transform)
    drawn = features([image for each in measured for image in each.images])
    real = features([image for each in measured for image in rendered(each.examples)])
    distance = frechet_distance(drawn, real)
    print(f"FD-ViT of {len(drawn)} drawn and as many rendered images: {distance:.2f}; ", end="")
    print(f"of two halves of the rendered: {frechet_distance(real[::2], real[1::2]):.2f}")


def print_cycle(path: str, measured: Sequence[Measured]) -> None:
    engine = Engine.from_pretrained(path, decoding={"num_beams": 1, "max_new_tokens": 8})
    for each in measured:
        things = [example.things for example in each.examples]
        drawn = cycle_check(engine, each.images, things)
        real = cycle_check(engine, rendered(each.examples), things)
        print(f"cycle check, {each.kind}: {drawn:.1f} % (rendered images: {real:.1f} %)")


def print_clip(path: str, measured: Sequence[Measured]) -> None:
    for each in measured:
        prompts = [example.instruction for example in each.examples]
        drawn = clip_score(each.images, prompts, path)
        real = clip_score(rendered(each.examples), prompts, path)
        print(f"CLIP score, {each.kind}: {drawn:.1f} (rendered images: {real:.1f})")


def seconds_alone(painter: Painter, examples: Sequence[DrawExample], **settings) -> float:
    began = time.monotonic()
    for example in examples:
        painter.draw(example.instruction, seed=0, **settings)
    return (time.monotonic() - began) / len(examples)


if __name__ == "__main__":
    main()
