"""Near-duplicates: false alarms on a folder of images, copies that are found, and the time.

python benchmarks/near_duplicates.py FOLDER [SAME]   SAME is a regular expression over file names
whose parentheses find what belongs together, such as '(p\\d+)_': such pairs are no false alarms."""

import io
import random
import re
import sys
import time
from itertools import combinations
from pathlib import Path

import numpy as np
from PIL import Image, ImageEnhance

from instructblip.data.prepared.near import NEAR, Look, look_of, near_duplicates
from instructblip.data.reading.decode import decode_image
from instructblip.data.reading.records import IMAGE_SUFFIXES, walk_files


def main(folder: Path, same: str) -> None:
    """Print how many pairs of different images are alike, and how many changed copies are found,
    by the hash alone and by hash and colors."""
    files = [path for path in walk_files(folder) if path.suffix.lower() in IMAGE_SUFFIXES]
    began = time.perf_counter()
    looks = {p: look_of(decode_image(p.read_bytes(), str(p), thumbnail=True)) for p in files}
    each = (time.perf_counter() - began) / len(files)
    print(f"{len(files)} images, {1000 * each:.2f} ms each to decode and look at")
    whole = {p: decode_image(p.read_bytes(), str(p)).convert("RGB") for p in files}
    kind = {p: found[1] if same and (found := re.search(same, p.name)) else p.name for p in files}
    pairs = [
        (a, b)
        for a, b in combinations(files, 2)
        if kind[a] != kind[b] and whole[a].tobytes() != whole[b].tobytes()
    ]
    _print_alike("pairs of other images", [(looks[a], looks[b]) for a, b in pairs])
    for name, change in CHANGES.items():
        copies = [(looks[p], look_of(change(whole[p]))) for p in files[:200]]
        _print_alike(f"copies, {name}", copies)
    rng, colours = random.Random(0), np.random.default_rng(0)
    left, right = (
        {f"{side}{i}": Look(rng.getrandbits(64), colours.bytes(192)) for i in range(100_000)}
        for side in "ab"
    )
    right |= {f"b{i}": look for i, look in enumerate([*left.values()][:10_000])}
    began = time.perf_counter()
    count = len(list(near_duplicates(left, right)))
    print(f"100,000 x 100,000 images: {time.perf_counter() - began:.1f} s, {count} pairs")


def _print_alike(title: str, pairs: list[tuple[Look, Look]]) -> None:
    close = [(a, b) for a, b in pairs if (a.hash ^ b.hash).bit_count() <= NEAR]
    both = sum(bool([*near_duplicates({"a": a}, {"b": b})]) for a, b in close)
    print(f"{title}: {len(close)} of {len(pairs)} by the hash alone, {both} by hash and colors")


def _jpeg(image: Image.Image) -> Image.Image:
    data = io.BytesIO()
    image.save(data, "JPEG", quality=50)
    return Image.open(data)


CHANGES = {
    "JPEG quality 50": _jpeg,
    "half the size": lambda i: i.resize((max(1, i.width // 2), max(1, i.height // 2))),
    "10 % brighter": lambda i: ImageEnhance.Brightness(i).enhance(1.1),
    "10 % darker": lambda i: ImageEnhance.Brightness(i).enhance(0.9),
    "2 % cut off left and above": lambda i: i.crop(
        (round(0.02 * i.width), round(0.02 * i.height), i.width, i.height)
    ),
}


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2] if len(sys.argv) > 2 else "")
