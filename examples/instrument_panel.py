"""Reading an instrument panel: what does the dial show, and is it in the red?

python examples/instrument_panel.py [FOLDER]"""

import json
import math
import random
import sys
from pathlib import Path

from PIL import Image, ImageDraw

from instructblip.cli.training import tune


def draw(folder: Path, count: int = 240) -> None:
    """Write dials from 0 to 8 with a red zone above 6, and two questions about each."""
    folder.mkdir(parents=True, exist_ok=True)
    rng, rows = random.Random(0), []
    for number in range(count):
        value = rng.randint(0, 8)
        panel = Image.new("RGB", (64, 64), rng.choice(("white", "lightgrey")))
        pen = ImageDraw.Draw(panel)
        pen.arc((6, 10, 58, 62), 180, 360, fill="black", width=3)
        pen.arc((6, 10, 58, 62), 315, 360, fill="red", width=5)
        angle = math.pi * (1 - value / 8) + rng.uniform(-0.05, 0.05)
        tip = (32 + 24 * math.cos(angle), 36 - 24 * math.sin(angle))
        pen.line(((32, 36), tip), "blue", 3)
        panel.save(folder / f"{number}.png")
        red = "yes" if value > 6 else "no"
        questions = {"what does the dial show?": str(value), "is the needle in the red?": red}
        for question, answer in questions.items():
            rows.append({"file_name": f"{number}.png", "question": question, "answer": answer})
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))


if __name__ == "__main__":
    root = Path(sys.argv[1] if len(sys.argv) > 1 else "out/panel")
    draw(root / "pictures")
    tune(root / "pictures", sys.argv[2:], out=root / "tuned")
