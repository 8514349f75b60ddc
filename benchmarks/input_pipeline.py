"""Speed of the input pipeline: `prepare`, `check`, decoding, and the loader with 1 and 2 workers.

    python benchmarks/input_pipeline.py [--rows 1000000] [--folder DIR] [--only-decoding]

Rows are VQAv2's two files with ten answers each; images are noisy 640 x 480 JPEGs.
"""

import argparse
import json
import os
import random
import resource
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageFilter

from instructblip.data import images as images_module
from instructblip.data.images import ImageTransform
from instructblip.data.loader import Loader
from instructblip.data.order import Mixture
from instructblip.data.prepared.check import check_dataset
from instructblip.data.prepared.dataset import PreparedDataset
from instructblip.data.prepared.prepare import prepare
from instructblip.data.samples import ImageReader
from instructblip.data.tokens import Tokens
from instructblip.model.checkpoints.directory import model_directory

IMAGES = 20_000
DIFFERENT = 200
"""Images that are drawn; the others are links to them."""
WORDS = ("what", "is", "the", "colour", "of", "this", "red", "car", "near", "green", "hats")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--only-decoding", action="store_true")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = arguments.folder or Path(scratch)
        if arguments.only_decoding:
            write_images(folder / "images", DIFFERENT)
            return time_decoding(folder / "images")
        write_images(folder / "vqav2" / "images")
        write_annotations(folder / "vqav2" / "annotations", arguments.rows)
        print(f"{os.cpu_count()} cores, {arguments.rows:,} rows, {IMAGES:,} images 640 x 480")
        dataset = time_prepare(folder)
        seconds, _ = timed(lambda: check_dataset(dataset))
        print(f"check: {seconds:.1f} s")
        time_decoding(folder / "vqav2" / "images")
        for workers in (1, 2):
            time_loader(dataset, workers)


def time_prepare(folder: Path) -> PreparedDataset:
    def run() -> PreparedDataset:
        return prepare("vqav2", folder / "vqav2", "train", folder / "prepared")

    began = time.process_time()
    seconds, dataset = timed(run)
    one_core = time.process_time() - began
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    rate = len(dataset) / seconds
    print(f"prepare: {seconds:.1f} s ({one_core:.1f} s of one core), {rate:,.0f} rows/s")
    print(f"peak memory of the process: {peak:.2f} GiB")
    print(f"prepare again: {timed(run)[0]:.2f} s")
    return dataset


def time_decoding(images: Path) -> None:
    """The median of one image: exact as in evaluation, and as training reads it."""
    exact = ImageTransform()
    training, crops = exact.for_training(crop=False, mirror=False), exact.for_training()
    simplejpeg, pillow = images_module._simplejpeg, lambda: None
    ways = {
        "exact filter, Pillow (evaluation)": (exact, pillow),
        "torch's filter, Pillow": (training, pillow),
        "torch's filter, simplejpeg": (training, simplejpeg),
        "crop and mirror, exact filter, Pillow (before)": (replace(crops, filter="pillow"), pillow),
        "crop and mirror, torch's filter, Pillow": (crops, pillow),
        "crop and mirror, torch's filter, simplejpeg": (crops, simplejpeg),
    }
    rng = random.Random(0)
    seconds: dict[str, list[float]] = {how: [] for how in ways}
    for path in sorted(images.iterdir())[:DIFFERENT]:
        for how, (transform, decoder) in ways.items():  # in turn: other programs may run here
            images_module._simplejpeg = decoder
            began = time.process_time()
            transform.resize(transform.read(str(path)), rng)
            seconds[how].append(time.process_time() - began)
    images_module._simplejpeg = simplejpeg
    for how, measured in seconds.items():
        print(f"decode and resize, {how}: {1000 * statistics.median(measured):.2f} ms of one core")


def time_loader(dataset: PreparedDataset, workers: int, steps: int = 20) -> None:
    loader = Loader(
        {"vqav2": dataset},
        Mixture({"vqav2": len(dataset)}),
        Tokens.from_pretrained(model_directory("starter")),
        ImageReader(ImageTransform().for_training(), cache_images_mb=0),
        batch_size=64,
        workers=workers,
    )
    batches = loader.iterate(0)
    next(batches)  # the workers are up
    seconds, _ = timed(lambda: [next(batches) for _ in range(steps)])
    print(f"loader, {workers} workers: {steps * loader.batch_size / seconds:.0f} samples/s")


def timed(run: Callable[[], Any]) -> tuple[float, Any]:
    began = time.perf_counter()
    result = run()
    return time.perf_counter() - began, result


def write_images(folder: Path, count: int = IMAGES) -> None:
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for i in range(count):
        path = folder / f"COCO_train2014_{i:012d}.jpg"
        if i >= DIFFERENT:
            path.hardlink_to(folder / f"COCO_train2014_{i % DIFFERENT:012d}.jpg")
            continue
        coarse = rng.integers(0, 256, (30, 40, 3), dtype=np.uint8)
        image = Image.fromarray(coarse).resize((640, 480), Image.Resampling.BICUBIC)
        noise = Image.fromarray(rng.integers(0, 256, (480, 640, 3), dtype=np.uint8))
        image = Image.blend(image, noise.filter(ImageFilter.GaussianBlur(1)), 0.2)
        image.save(path, quality=90)


def write_annotations(folder: Path, rows: int) -> None:
    """As the owner writes them, on one line."""
    folder.mkdir(parents=True)
    rng = random.Random(0)
    questions = folder / "v2_OpenEnded_mscoco_train2014_questions.json"
    annotations = folder / "v2_mscoco_train2014_annotations.json"
    with questions.open("w") as asked, annotations.open("w") as annotated:
        asked.write('{"info": {}, "questions": [')
        annotated.write('{"info": {}, "annotations": [')
        for i in range(rows):
            ids = {"question_id": i, "image_id": i % IMAGES}
            answers = [
                {"answer": rng.choice(WORDS), "answer_confidence": "yes", "answer_id": k}
                for k in range(1, 11)
            ]
            kinds = {"question_type": "what is", "answer_type": "other"}
            comma = ", " if i else ""
            text = " ".join(rng.choices(WORDS, k=7)) + f" {i}?"
            asked.write(comma + json.dumps({**ids, "question": text}))
            annotated.write(comma + json.dumps({**ids, **kinds, "answers": answers}))
        asked.write("]}")
        annotated.write("]}")


if __name__ == "__main__":
    main()
