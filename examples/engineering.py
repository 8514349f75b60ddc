"""Inspected plates in ms-swift's JSON lines: short answers and reports, one recipe for both.

python examples/engineering.py [FOLDER] [A.B=C]..."""

import json
import random
import sys
from pathlib import Path

from PIL import Image, ImageDraw

from instructblip.cli.data import check
from instructblip.cli.evaluation import compare, evaluate
from instructblip.cli.training import train

RECIPE = str(Path(__file__).with_suffix(".yaml"))
SIZES = {"small": 16, "large": 28}
SIDES = {"circle": 60, "triangle": 3, "square": 4}
COLOURS = ("red", "green", "blue", "yellow", "purple", "orange")
PLACES = ("at the top left", "at the top right", "at the bottom left", "at the bottom right")
SPLITS = ["test", "test", "val", *["train"] * 7]


def story(root: Path, overrides: list[str], start: str = "starter", count: int = 300) -> None:
    """Draw plates of two or three parts; check; train with early stopping; evaluate; compare."""
    rng, folder = random.Random(0), root / "plates"
    (folder / "images").mkdir(parents=True, exist_ok=True)
    lines: dict[str, list[str]] = {}
    for number, split in enumerate(SPLITS[n % 10] for n in range(count)):
        plate, report, name = Image.new("RGB", (192, 192), "black"), [], f"images/{number}.png"
        for cell in sorted(rng.sample(range(4), rng.randint(2, 3))):
            size, colour, shape = map(rng.choice, ([*SIZES], COLOURS, [*SIDES]))
            circle = (cell % 2 * 128 + 32, cell // 2 * 128 + 32, SIZES[size])
            ImageDraw.Draw(plate).regular_polygon(circle, SIDES[shape], 0, colour)
            report.append(f"there is a {size} {colour} {shape} {PLACES[cell]}.")
        plate.resize((64, 64), Image.Resampling.BOX).save(folder / name)
        short, long = f"what shape is {PLACES[cell]}?", "describe the picture in detail."
        for kind, asked, answer in (("short", short, shape), ("report", long, " ".join(report))):
            turns = {"user": f"<image>{asked}", "assistant": answer}
            messages = [{"role": role, "content": text} for role, text in turns.items()]
            line = json.dumps({"messages": messages, "images": [name]})
            lines.setdefault(f"{kind}_{split}.jsonl", []).append(line)
    for file, each in lines.items():
        (folder / file).write_text("\n".join(each))
    settings = [f"data.root={root}", f"model.start={start}", *overrides]
    check(RECIPE, settings)
    train(RECIPE, settings, out=root / "run")
    models = {"before": start, "after": str(root / "run"), "blind": str(root / "run")}
    for name, model in models.items():
        evaluate([RECIPE, model, *settings], out=root / "results" / name, blind=name == "blind")
    compare([root / "results" / name for name in models], intervals=True)


if __name__ == "__main__":
    story(Path(sys.argv[1] if len(sys.argv) > 1 else "out/engineering"), sys.argv[2:])
