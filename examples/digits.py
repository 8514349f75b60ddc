"""Handwritten digits of scikit-learn as a folder of images with a question about each.

python examples/digits.py [FOLDER]"""

import json
import sys
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

NAMES = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
SPLITS = {"train": range(600), "val": range(1000, 1100), "test": range(1400, 1500)}


def write(folder: Path) -> None:
    """Writes images and metadata.jsonl with the column `split` to ``folder``.

    The splits are parts of scikit-learn's file that are far from each other, because the digits of
    one writer seem to be beside each other there."""
    folder.mkdir(parents=True, exist_ok=True)
    images, labels = load_digits(return_X_y=True)
    rows = []
    for split, numbers in SPLITS.items():
        for number in numbers:
            grey = 255 - images[number].reshape(8, 8) * (255 / 16)
            image = Image.fromarray(grey.astype(np.uint8))
            image.resize((128, 128), Image.Resampling.BICUBIC).save(folder / f"{number}.png")
            answer = NAMES[labels[number]]
            row = {"question": "which digit is this?", "answer": answer, "split": split}
            rows.append({"file_name": f"{number}.png", **row})
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))


if __name__ == "__main__":
    write(Path(sys.argv[1] if len(sys.argv) > 1 else "digits"))
