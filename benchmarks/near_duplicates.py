"""Near-duplicates: false alarms on a folder of images, copies that are found, and the time.

python benchmarks/near_duplicates.py FOLDER"""

import io
import random
import sys
import time
from pathlib import Path

from PIL import Image

from instructblip.data.images import decode_image
from instructblip.data.prepared.near import NEAR, near_pairs, perceptual_hash
from instructblip.data.reading.records import IMAGE_SUFFIXES, walk_files


def main(folder: Path) -> None:
    """Print how many of all pairs of different images are near, and how many saved copies are."""
    files = [path for path in walk_files(folder) if path.suffix.lower() in IMAGE_SUFFIXES]
    began = time.perf_counter()
    hashes = [perceptual_hash(decode_image(p.read_bytes(), str(p), thumbnail=True)) for p in files]
    each = (time.perf_counter() - began) / len(files)
    print(f"{len(files)} images, {1000 * each:.2f} ms each to decode and hash")
    pairs = len(files) * (len(files) - 1) / 2
    for limit in (2, 4, NEAR, 8, 10):
        near = sum((a ^ b).bit_count() <= limit for i, a in enumerate(hashes) for b in hashes[:i])
        copies = sum(
            (own ^ _copy(path)).bit_count() <= limit
            for own, path in zip(hashes[:200], files, strict=False)
        )
        print(
            f"at most {limit:2} bits: {near} of {pairs:,.0f} pairs of other images "
            f"({near / pairs:.1e}), {copies} of {min(200, len(files))} copies at half the size, "
            "JPEG quality 50"
        )
    rng = random.Random(0)
    left, right = ([rng.getrandbits(64) for _ in range(100_000)] for _ in range(2))
    began = time.perf_counter()
    count = len(list(near_pairs(left, right)))
    print(f"100,000 x 100,000 hashes: {time.perf_counter() - began:.1f} s, {count} pairs")


def _copy(path: Path) -> int:
    image = decode_image(path.read_bytes(), str(path))
    data = io.BytesIO()
    half = (max(1, image.width // 2), max(1, image.height // 2))
    image.resize(half, Image.Resampling.BICUBIC).save(data, "JPEG", quality=50)
    return perceptual_hash(decode_image(data.getvalue(), str(path), thumbnail=True))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
