"""A teacher's worksheets: images of coloured shapes, and a CSV of questions and answers.

python examples/classroom.py [FOLDER] [A.B=C]..."""

import csv
import random
import sys
from pathlib import Path

from PIL import Image, ImageDraw

from instructblip.cli.training import tune

SIDES = {"circle": 60, "triangle": 3, "square": 4}
COLOURS = ("red", "green", "blue", "yellow", "purple", "orange")
SLIPS = [("absent.png", "what color is the circle?", "red"), ("0.png", "which is large?", "TODO")]


def story(root: Path, overrides: list[str], start: str = "starter", count: int = 200) -> None:
    """Draw sheets of one to three shapes, ask two questions about each; repair slips, then tune."""
    rng, folder, rows = random.Random(0), root / "sheets", [("file_name", "question", "answer")]
    folder.mkdir(parents=True, exist_ok=True)
    for name in (f"{number}.png" for number in range(count)):
        sheet, colours = Image.new("RGB", (192, 192), "white"), rng.sample(COLOURS, 3)
        shapes = rng.sample([*SIDES], rng.randint(1, 3))
        for cell, shape, colour in zip(rng.sample(range(9), 3), shapes, colours, strict=False):
            circle = (cell % 3 * 64 + 32, cell // 3 * 64 + 32, rng.randint(18, 30))
            ImageDraw.Draw(sheet).regular_polygon(circle, SIDES[shape], 0, colour)
        sheet.resize((64, 64), Image.Resampling.BOX).save(folder / name)
        rows.append((name, "how many shapes are there?", str(len(shapes))))
        rows.append((name, f"what color is the {shapes[0]}?", colours[0]))
    for written in (rows + SLIPS, rows):
        with (folder / "metadata.csv").open("w", newline="") as file:
            csv.writer(file).writerows(written)
        try:
            tune(folder, overrides, start, root / "tuned")
        except ValueError as error:
            print(f"{error}\nThe teacher repairs these rows.")


if __name__ == "__main__":
    story(Path(sys.argv[1] if len(sys.argv) > 1 else "out/classroom"), sys.argv[2:])
