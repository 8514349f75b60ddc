"""Step 2: the starter's image encoder learns what stands where in an image.

    python runs/starter/vision.py OUT --steps 1600

Dense supervision: a head that is discarded afterwards reads the tokens around each of the nine
cells and names what stands there (colour, shape, size, printed word, handwritten digit), and every
token names its own row and column: nothing else would keep a patch from being the same wherever it
stands, and then no Q-Former can say where things are. Images of the training world alone: no
held-out colour-shape pair, no digit kept for tests. OUT is a run directory: it resumes.
"""

import argparse
import json
import math
import random
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from lessons import Lesson, teach
from safetensors.torch import save_file
from torch import Tensor, nn

from instructblip.core.batch import LossOutput
from instructblip.model.config import VisionConfig
from instructblip.model.vision import VisionModel
from instructblip.scenes.world import (
    COLOURS,
    SHAPES,
    SIZES,
    WORDS,
    Scene,
    render,
    sample_scene,
)

CONFIG = VisionConfig(
    hidden_size=160,
    intermediate_size=640,
    num_hidden_layers=4,
    num_attention_heads=5,
    image_size=64,
    patch_size=8,
)
PICTURES = 48  # a step
Looks = tuple[tuple[str, ...], ...]
LOOKS: Looks = (
    tuple(COLOURS),
    (*SHAPES, "word", "digit"),
    SIZES,
    WORDS,
    tuple("0123456789"),
)


class CellReader(nn.Module):
    """Mean of the patch tokens around each of the ``side`` x ``side`` cells: [N, P, V] -> logits
    per attribute [N, cells, ...]."""

    def __init__(self, width: int, looks: Looks = LOOKS, side: int = 3) -> None:
        super().__init__()
        self.side = side
        self.mlp = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.GELU())
        # One more class each: nothing there.
        self.heads = nn.ModuleList(nn.Linear(2 * width, len(look) + 1) for look in looks)

    def loss(self, features: Tensor, wanted: Tensor) -> Tensor:
        """Cross-entropy of each attribute, summed; ``wanted`` [N, cells, attributes]."""
        losses = [
            F.cross_entropy(logits.flatten(0, 1), wanted[..., k].flatten())
            for k, logits in enumerate(self(features))
        ]
        return torch.stack(losses).sum()

    def forward(self, features: Tensor) -> list[Tensor]:
        side = math.isqrt(features.shape[1] - 1)
        patches = features[:, 1:].transpose(1, 2).unflatten(2, (side, side))
        cells = (
            F.adaptive_avg_pool2d(patches, self.side).flatten(2).transpose(1, 2)
        )  # [N, cells, V]
        hidden = self.mlp(cells)
        return [head(hidden) for head in self.heads]


class PlaceReader(nn.Module):
    """Row and column of each patch, from its token alone."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.side = config.image_size // config.patch_size
        self.head = nn.Linear(config.hidden_size, 2 * self.side)

    def loss(self, features: Tensor) -> Tensor:
        wanted = torch.cartesian_prod(torch.arange(self.side), torch.arange(self.side))
        wanted = wanted.repeat(len(features), 1).flatten()  # row, column, row, ...
        logits = self.head(features[:, 1:]).unflatten(2, (2, self.side)).flatten(0, 2)
        return F.cross_entropy(logits, wanted)


def targets(scene: Scene) -> np.ndarray:
    """[9, 5] class of each attribute in each cell; the last class where there is nothing."""
    cells = np.array([[len(look) for look in LOOKS]] * 9)
    for t in scene.things:
        named = {
            "shape": (t.colour, t.name, t.size, None, None),
            "word": (None, "word", None, t.name, None),
            "digit": (None, "digit", None, None, t.name),
        }[t.kind]
        for attribute, value in enumerate(named):
            if value is not None:
                cells[3 * t.row + t.column, attribute] = LOOKS[attribute].index(value)
    return cells


def training_scene(rng: random.Random, test_digits: bool = False) -> Scene:
    """A scene of the training world with shapes, words and digits."""
    words = rng.choice((0, 0, 1, 2))
    digits = rng.choice((0, 1)) if words < 2 else 0
    return sample_scene(rng, (0 if words + digits else 1, 3), words, digits, "seen", test_digits)


def pixels_of(scenes: list[Scene]) -> Tensor:
    """[N, 3, 64, 64], scaled to -1..1."""
    pixels = np.stack([np.asarray(render(scene)) for scene in scenes])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1


def batch(rng: random.Random, number: int, test_digits: bool = False) -> tuple[Tensor, Tensor]:
    scenes = [training_scene(rng, test_digits) for _ in range(number)]
    return pixels_of(scenes), torch.from_numpy(np.stack([targets(s) for s in scenes]))


@torch.no_grad()
def accuracy(
    model: "Encoder", names: Sequence[str], looks: Looks, content: tuple[Tensor, Tensor]
) -> dict[str, float]:
    """Accuracy at occupied cells per attribute on images and their targets."""
    pixels, wanted = content
    logits = model.cells(model.tower(pixels))
    found = {}
    for k, name in enumerate(names):
        there = wanted[..., k] < len(looks[k])
        hits = logits[k].argmax(-1)[there] == wanted[..., k][there]
        found[name] = round(100 * hits.float().mean().item(), 1)
    return found


class Encoder(nn.Module):
    """The image encoder and its two heads under the training loop."""

    def __init__(self, config: VisionConfig = CONFIG, looks: Looks = LOOKS, side: int = 3) -> None:
        super().__init__()
        self.tower = VisionModel(config)
        self.cells = CellReader(config.hidden_size, looks, side)
        self.places = PlaceReader(config)

    def loss(self, lesson: Lesson) -> LossOutput:
        pixels, wanted = lesson.content
        features = self.tower(pixels)
        return lesson.mean_loss(self.cells.loss(features, wanted) + self.places.loss(features))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=1600)
    args = parser.parse_args()
    torch.manual_seed(0)
    model = Encoder()

    def make(step: int) -> Lesson:
        content = batch(random.Random(step), PICTURES)
        return Lesson.of("scenes", step, content, torch.ones(PICTURES, 1, dtype=torch.long))

    def export(folder: Path) -> None:
        save_file(model.tower.state_dict(), folder / "vision.safetensors")

    if not teach(model, make, args.out, args.steps, 5e-3, export):
        sys.exit("stopped: run it again to resume")
    names = ("color", "kind", "size", "word", "digit")
    fresh = batch(random.Random(7), 256, test_digits=True)
    scores = {"pictures": args.steps * PICTURES, **accuracy(model.eval(), names, LOOKS, fresh)}
    (args.out / "vision_accuracy.json").write_text(json.dumps(scores, indent=1))
    print(scores)


if __name__ == "__main__":
    main()
