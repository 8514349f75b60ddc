"""A narrator for game scenes: one sentence for a player who cannot see the screen.

python examples/game_narrator.py [FOLDER]"""

import random
import sys
from pathlib import Path

from PIL import Image, ImageDraw

from instructblip.cli.training import tune

SKIES = {"day": "lightblue", "night": "midnightblue"}


def draw(folder: Path, count: int = 240) -> None:
    """Write side views of a hero before a gap, a wall or nothing, each with its narration."""
    rng = random.Random(0)
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        sky, hero = rng.choice(list(SKIES)), rng.choice(("red", "green", "yellow"))
        danger = rng.choice(("a gap", "a wall", "nothing"))
        scene = Image.new("RGB", (64, 64), SKIES[sky])
        pen = ImageDraw.Draw(scene)
        pen.rectangle((0, 48, 64, 64), fill="saddlebrown")
        if danger != "nothing":
            gap = danger == "a gap"
            pen.rectangle((40, 48 - 24 * (not gap), 52, 48 + 16 * gap), "black" if gap else "grey")
        x = rng.randint(4, 20)
        pen.ellipse((x, 36, x + 12, 48), fill=hero)
        scene.save(folder / f"{number}.png")
        narration = f"it is {sky} . the {hero} circle has {danger} on the right"
        (folder / f"{number}.txt").write_text(narration)


if __name__ == "__main__":
    root = Path(sys.argv[1] if len(sys.argv) > 1 else "out/game")
    draw(root / "pictures")
    tune(root / "pictures", sys.argv[2:], out=root / "tuned")
