"""Speed of the input pipeline: `prepare`, `check`, decoding, and the loader with 1 and 2 workers.

    python benchmarks/input_pipeline.py [--rows 1000000] [--folder DIR] [--only-decoding | --shards]

Rows are VQAv2's two files with ten answers each; images are noisy 640 x 480 JPEGs. ``--shards``
times Web CapFilt's tar shards instead: their index, `prepare`, and reading images from them.
"""

import argparse
import io
import json
import os
import random
import resource
import statistics
import tarfile
import tempfile
import time
import tracemalloc
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
from instructblip.data.reading.members import read_image
from instructblip.data.reading.shards import read_shard
from instructblip.data.samples import ImageReader
from instructblip.data.sources import SOURCES
from instructblip.data.tokens import Tokens
from instructblip.model.checkpoints.directory import model_directory

IMAGES = 20_000
MEMBERS = 100_000
"""Members of the tar shard."""
DIFFERENT = 200
"""Images that are drawn; the others are links to them."""
WORDS = ("what", "is", "the", "colour", "of", "this", "red", "car", "near", "green", "hats")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--only-decoding", action="store_true")
    parser.add_argument("--shards", action="store_true")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = arguments.folder or Path(scratch)
        if arguments.only_decoding:
            write_images(folder / "images", DIFFERENT)
            return time_decoding(folder / "images")
        if arguments.shards:
            return time_shards(folder / "web_capfilt")
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


def time_shards(root: Path) -> None:
    write_shard(root / "00000.tar")
    size = (root / "00000.tar").stat().st_size / 1e6
    print(f"{os.cpu_count()} cores, a shard of {MEMBERS:,} members and {size:,.0f} MB")
    tracemalloc.start()
    sum(1 for _ in read_shard(root / "00000.tar", "00000.tar"))
    print(f"peak memory of the index: {tracemalloc.get_traced_memory()[1] / 2**20:.2f} MiB")
    tracemalloc.stop()
    began = time.process_time()  # other programs may run on this machine
    sum(1 for _ in read_shard(root / "00000.tar", "00000.tar"))
    seconds = time.process_time() - began
    print(f"index: {seconds:.2f} s of one core, {MEMBERS / seconds:,.0f} members/s")
    began = time.process_time()
    examples = list(SOURCES["web_capfilt"].read(root, "train"))
    seconds = time.process_time() - began
    print(
        f"index and examples: {seconds:.2f} s of one core, {len(examples) / seconds:,.0f} images/s"
    )
    seconds, dataset = timed(lambda: prepare("web_capfilt", root, "train", root.parent / "out"))
    print(f"prepare: {seconds:.1f} s, {len(dataset) / seconds:,.0f} images/s")
    names = random.Random(0).sample([example.images[0] for example in examples], 10_000)
    paths = [dataset.image_root / name for name in names]
    (root / "files").mkdir()
    files = [root / "files" / f"{i}.jpg" for i in range(len(paths))]
    for path, file in zip(paths, files, strict=True):
        file.write_bytes(read_image(path))
    for what, these in (("shard", paths), ("files", files)):
        seconds, _ = timed(lambda these=these: [read_image(path) for path in these])
        print(f"random reads from {what}: {len(these) / seconds:,.0f} images/s")


def write_shard(path: Path) -> None:
    """A shard as img2dataset writes it: images and captions, here two members a sample."""
    path.parent.mkdir(parents=True)
    rng = np.random.default_rng(0)
    jpegs = []
    for _ in range(DIFFERENT):
        file = io.BytesIO()
        noise = rng.integers(0, 256, (96, 128, 3), dtype=np.uint8)
        Image.fromarray(noise).save(file, "JPEG", quality=80)
        jpegs.append(file.getvalue())
    with tarfile.open(path, "w") as archive:
        for i in range(MEMBERS // 2):
            parts = {"jpg": jpegs[i % DIFFERENT], "txt": f"a red car near hat {i}".encode()}
            for suffix, data in parts.items():
                member = tarfile.TarInfo(f"{i:09d}.{suffix}")
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))


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
