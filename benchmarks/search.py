"""Seconds of a search among stored embeddings, by their number and size.

    python benchmarks/search.py [--images 100000] [--folder FOLDER]

Random embeddings stand for those of a model: time does not depend on their values. The first search
maps the files, which are then in the system's cache; the text is embedded before.
"""

import argparse
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F

from instructblip.data.features import FeatureStore
from instructblip.inference.search import similarities

SIZES = {"the starter's": (16, 256), "BLIP-2's": (32, 256)}
PART = 10_000


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--images", type=int, default=100_000)
    parser.add_argument("--folder", type=Path, help="where to store them; else a temporary folder")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    print(f"{args.images:,} images, {args.threads} thread(s), stored in bf16")
    for name, (queries, width) in SIZES.items():
        with tempfile.TemporaryDirectory(dir=args.folder) as folder:
            store = FeatureStore(Path(folder), "bf16")
            for start in range(0, args.images, PART):
                count = min(PART, args.images - start)
                vectors = F.normalize(torch.randn(count, queries, width), dim=-1)
                store.write([f"{start + i}" for i in range(count)], vectors)
            store.refresh()
            text = F.normalize(torch.randn(width), dim=0)
            times = []
            for _ in range(5):
                began = time.perf_counter()
                similarities(store.shards(), text).topk(32)
                times.append(time.perf_counter() - began)
        size = args.images * queries * width * 2 / 2**30
        first, best = times[0], min(times[1:])
        print(
            f"{name} [{queries}, {width}], {size:.2f} GiB: first {first:.2f} s, then {best:.2f} s"
        )


if __name__ == "__main__":
    main()
