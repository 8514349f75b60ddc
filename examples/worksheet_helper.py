"""A classroom worksheet helper: is the sum on the sheet right, and what is the right result?

python examples/worksheet_helper.py [FOLDER]"""

import json
import random
import sys
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from instructblip.cli.training import tune


def draw(folder: Path, count: int = 240) -> None:
    """Write sheets with one sum each, half of them wrong, and two questions about each."""
    rng, font, rows = random.Random(0), ImageFont.load_default(15), []
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        a, b = rng.randint(1, 5), rng.randint(1, 4)
        right = rng.random() < 0.5
        shown = a + b if right else a + b + rng.choice((-1, 1))
        sheet = Image.new("RGB", (64, 64), "white")
        pen = ImageDraw.Draw(sheet)
        for line in range(8, 64, 14):
            pen.line((0, line, 64, line), fill="lightblue")
        pen.text((4 + rng.randint(0, 4), rng.randint(8, 34)), f"{a}+{b}={shown}", "black", font)
        sheet.save(folder / f"{number}.png")
        for question, answer in (
            ("is the sum right?", "yes" if right else "no"),
            ("what is the right result?", str(a + b)),
        ):
            rows.append({"file_name": f"{number}.png", "question": question, "answer": answer})
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))


if __name__ == "__main__":
    root = Path(sys.argv[1] if len(sys.argv) > 1 else "out/worksheets")
    draw(root / "pictures")
    tune(root / "pictures", sys.argv[2:], out=root / "tuned")
