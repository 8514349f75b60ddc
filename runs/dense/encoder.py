"""Step 1: an image encoder learns what stands in which cell of the dense world.

    python runs/dense/encoder.py OUT --steps 500

As `starter/vision.py`, whose heads it has, on images of the dense world without a held-out
colour-shape pair. OUT is a run directory: it resumes.
"""

import argparse
import json
import random
import sys
from pathlib import Path

import numpy as np
import torch
from lessons import Lesson, teach
from safetensors.torch import save_file
from torch import Tensor
from vision import Encoder, accuracy

from instructblip.model.config import VisionConfig
from instructblip.scenes.dense import DIGITS, GRID, DenseScene, render_dense, sample_dense
from instructblip.scenes.world import COLOURS, SHAPES, SIZES

CONFIG = VisionConfig(
    hidden_size=160,
    intermediate_size=640,
    num_hidden_layers=4,
    num_attention_heads=5,
    image_size=120,
    patch_size=12,
)
IMAGES = 32  # a step
LOOKS = (tuple(COLOURS), SHAPES, SIZES, DIGITS)
NAMES = ("colour", "shape", "size", "digit")


def targets(scene: DenseScene) -> np.ndarray:
    """[cells, 4] class of each attribute in each cell; the last class where there is nothing."""
    cells = np.array([[len(look) for look in LOOKS]] * GRID**2)
    for item in scene.items:
        for k, (look, name) in enumerate(zip(LOOKS, NAMES, strict=True)):
            cells[GRID * item.row + item.column, k] = look.index(getattr(item, name))
    return cells


def pixels_of(scenes: list[DenseScene]) -> Tensor:
    """[N, 3, S, S], scaled to -1..1."""
    pixels = np.stack([np.asarray(render_dense(scene)) for scene in scenes])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1


def batch(rng: random.Random, number: int) -> tuple[Tensor, Tensor]:
    scenes = [sample_dense(rng) for _ in range(number)]
    return pixels_of(scenes), torch.from_numpy(np.stack([targets(s) for s in scenes]))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=500)
    args = parser.parse_args()
    torch.manual_seed(0)
    model = Encoder(CONFIG, LOOKS, GRID)

    def make(step: int) -> Lesson:
        content = batch(random.Random(step), IMAGES)
        return Lesson.of("dense", step, content, torch.ones(IMAGES, 1, dtype=torch.long))

    def export(folder: Path) -> None:
        save_file(model.tower.state_dict(), folder / "vision.safetensors")

    if not teach(model, make, args.out, args.steps, 5e-3, export):
        sys.exit("stopped: run it again to resume")
    fresh = batch(random.Random("fresh"), 256)
    scores = {"images": args.steps * IMAGES, **accuracy(model.eval(), NAMES, LOOKS, fresh)}
    (args.out / "vision_accuracy.json").write_text(json.dumps(scores, indent=1))
    print(scores)


if __name__ == "__main__":
    main()
