"""What the decoder draws on Scenes: fresh prompts, the exact checker, seconds per picture.

    python benchmarks/draw.py --prompts 500 [--model starter] [--out FOLDER]

``--prompts`` is the number for all kinds together. A line for each kind, then one line of JSON in
percent: of the objects asked for, how many have their colour and shape at their place.
"""

import argparse
import json
from dataclasses import asdict
from pathlib import Path

from instructblip.text_to_image.gallery import write_gallery
from instructblip.text_to_image.measure import KINDS, fresh_prompts, measure
from instructblip.text_to_image.sample import Painter


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prompts", type=int, default=500)
    parser.add_argument("--model", default="starter")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance", type=float, default=2.0)
    parser.add_argument("--out", type=Path, help="folder for a grid of each kind")
    args = parser.parse_args()
    painter = Painter.from_pretrained(args.model)
    found, seconds = {}, []
    for place, kind in enumerate(KINDS):
        number = args.prompts // len(KINDS) + (place < args.prompts % len(KINDS))
        examples = fresh_prompts(kind, number)
        figures, pictures, verdicts = measure(
            painter, examples, steps=args.steps, guidance=args.guidance
        )
        print(f"{kind:13} " + "  ".join(f"{k} {v}" for k, v in asdict(figures).items()), flush=True)
        found[kind] = figures.objects
        seconds.append(figures.seconds)
        if args.out:
            write_gallery(
                args.out / f"{kind}.png",
                pictures[:24],
                [e.instruction for e in examples[:24]],
                [v.exact for v in verdicts[:24]],
                [e.image() if e.image else None for e in examples[:24]],
            )
    print(json.dumps({**found, "seconds": round(sum(seconds) / len(seconds), 4)}))


if __name__ == "__main__":
    main()
