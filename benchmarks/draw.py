"""What the decoder draws on Scenes: fresh prompts, the exact checker, seconds per picture.

    python benchmarks/draw.py --prompts 500 [--model starter] [--answers RUN] [--out FOLDER]

``--prompts`` is the number for all kinds together. A line for each kind, the Frechet distance of
drawn and rendered pictures under our own image encoder, with ``--answers`` the cycle check by that
InstructBLIP, then one line of JSON: percent of the objects asked for that have their colour and
shape (and size, if asked for) at their place, and the seconds of one picture drawn alone.
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
    fresh_prompts,
    measure,
)
from instructblip.text_to_image.metrics import (
    cycle_check,
    frechet_distance,
    vit_features,
)
from instructblip.text_to_image.sample import Painter
from instructblip.text_to_image.tasks import DrawExample


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prompts", type=int, default=500)
    parser.add_argument("--model", default="starter")
    parser.add_argument("--answers", help="an InstructBLIP that is asked about what was drawn")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance", type=float, default=2.0)
    parser.add_argument("--out", type=Path, help="folder for pictures and a grid of each kind")
    args = parser.parse_args()
    painter = Painter.from_pretrained(args.model)
    settings = {"steps": args.steps, "guidance": args.guidance}
    measured = []
    for place, kind in enumerate(KINDS):
        number = args.prompts // len(KINDS) + (place < args.prompts % len(KINDS))
        each = measure(painter, kind, fresh_prompts(kind, number), **settings)
        figures = "  ".join(f"{name} {value}" for name, value in asdict(each.figures).items())
        print(f"{kind:13} {figures}", flush=True)
        measured.append(each)
    print_distances(painter, measured)
    if args.answers:
        print_cycle(args.answers, measured)
    if args.out:
        print(write_drawings(args.out, measured))
    found = {each.kind: each.figures.objects for each in measured}
    seconds = seconds_alone(painter, measured[0].examples[:8], **settings)
    print(json.dumps({**found, "seconds": round(seconds, 4)}))


def rendered(examples: Sequence[DrawExample]) -> list[Image.Image]:
    return [example.target() for example in examples if example.target is not None]


def print_distances(painter: Painter, measured: Sequence[Measured]) -> None:
    """Drawn against rendered, and rendered against rendered of another half, for scale."""
    features = vit_features(painter.model.instructblip, painter.transform)
    drawn = features([picture for each in measured for picture in each.pictures])
    real = features([picture for each in measured for picture in rendered(each.examples)])
    apart = frechet_distance(drawn, real)
    print(f"FD-ViT of {len(drawn)} drawn and as many rendered pictures: {apart:.2f}; ", end="")
    print(f"of two halves of the rendered: {frechet_distance(real[::2], real[1::2]):.2f}")


def print_cycle(path: str, measured: Sequence[Measured]) -> None:
    engine = Engine.from_pretrained(path, decoding={"num_beams": 1, "max_new_tokens": 8})
    for each in measured:
        things = [example.things for example in each.examples]
        drawn = cycle_check(engine, each.pictures, things)
        real = cycle_check(engine, rendered(each.examples), things)
        print(f"cycle check, {each.kind}: {drawn:.1f} % (rendered pictures: {real:.1f} %)")


def seconds_alone(painter: Painter, examples: Sequence[DrawExample], **settings) -> float:
    began = time.monotonic()
    for example in examples:
        painter.draw(example.instruction, seed=0, **settings)
    return (time.monotonic() - began) / len(examples)


if __name__ == "__main__":
    main()
