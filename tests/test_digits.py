"""The folder of the tutorial: real digits with their names, in parts that share none."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

from examples.digits import NAMES, write


def test_each_digit_is_in_one_part_under_its_name(tmp_path: Path) -> None:
    write(tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "metadata.jsonl").read_text().splitlines()]
    assert Counter(row["split"] for row in rows) == {"train": 600, "val": 100, "test": 100}
    assert len({row["file_name"] for row in rows}) == 800
    images, labels = load_digits(return_X_y=True)
    for row in rows[::50]:
        number = int(Path(row["file_name"]).stem)
        assert row["answer"] == NAMES[labels[number]]
        grey = 255 - np.asarray(Image.open(tmp_path / row["file_name"]).resize((8, 8)), float)
        assert np.corrcoef(grey.ravel(), images[number])[0, 1] > 0.9
