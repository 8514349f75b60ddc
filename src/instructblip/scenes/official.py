"""Writes the embedded world in the files and fields of the real data sets.

``write_scenes(root)`` makes one folder per set (``root/vqav2/annotations``, ``root/vqav2/images``),
which the readers of real downloads read. Held-in sets have train and val splits, and their training
images show neither the held-out colour-shape pairs nor the digits kept for tests. Held-out sets
have the split that the paper evaluates. Two have a train split too: MSVD-QA's training answers are
the vocabulary that its test ranks, and ScienceQA's is for fine-tuning on that one set.
"""

import json
import math
import os
import random
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

from instructblip.core.files import recover, replacing_directory
from instructblip.scenes import writers

FORMAT_VERSION = 2
MARKER = "scenes.json"
"""The file of settings that marks a folder as written by us."""


class SceneSet(NamedTuple):
    """How a set is written: its writer, and samples per split, before rounding."""

    write: Callable[[writers.SetFolder, int], None]
    sizes: dict[str, int]


def write_scenes(
    root: str | Path, seed: int = 0, scale: float | int = 1.0, sets: tuple[str, ...] | None = None
) -> dict[str, Path]:
    """Write the sets of the embedded world below ``root``; returns the folder of each.

    ``scale`` multiplies every size. The same seed and scale give the same bytes. A set that exists
    with the same settings is left as it is. Each set is written whole or not at all. Raises
    ValueError, before anything is written, for an unknown set, for a scale that is not positive
    and finite, and for other data where a set would go.
    """
    root = Path(root)
    chosen = tuple(SCENE_SETS) if sets is None else sets
    if unknown := [name for name in chosen if name not in SCENE_SETS]:
        raise ValueError(f"no scene set {unknown}; expected some of {', '.join(SCENE_SETS)}")
    if not 0 < scale < math.inf:
        raise ValueError(f"scale {scale:g}; expected a number above 0, such as 0.1")
    settings = {"format": FORMAT_VERSION, "seed": seed, "scale": scale}
    recover(root, earlier=False)
    due = [name for name in chosen if _settings_of(root / name) != settings]
    if taken := other_data(root, due):
        raise ValueError(
            f"{', '.join(map(str, taken))}: `instructblip scenes` did not write this and would "
            f"replace it; choose another ROOT than {root}"
        )
    root.mkdir(parents=True, exist_ok=True)
    for name in due:
        with replacing_directory(root / name, synced=False) as folder:
            for split, size in SCENE_SETS[name].sizes.items():
                out = writers.SetFolder(folder, split, random.Random(f"{seed}/{name}/{split}"))
                SCENE_SETS[name].write(out, max(8, round(size * scale)))
            (folder / MARKER).write_text(json.dumps(settings))
    return {name: root / name for name in chosen}


def other_data(root: Path, sets: Iterable[str]) -> list[Path]:
    """Paths where ``sets`` would be written below ``root`` that hold other data: links, files, and
    folders that hold something but no marker."""
    folders = [root / name for name in sets]
    return [f for f in folders if os.path.lexists(f) and not _may_be_replaced(f)]


def _may_be_replaced(folder: Path) -> bool:
    if folder.is_symlink() or not folder.is_dir():
        return False
    return (folder / MARKER).is_file() or not any(folder.iterdir())


def _settings_of(folder: Path) -> Any:
    """The settings that a set was written with, or None."""
    marker = folder / MARKER
    return json.loads(marker.read_text()) if marker.is_file() else None


SCENE_SETS: dict[str, SceneSet] = {
    "coco_caption": SceneSet(writers.coco_caption, {"train": 2000, "val": 200}),
    "vqav2": SceneSet(writers.vqav2, {"train": 9000, "val": 300}),
    "okvqa": SceneSet(writers.okvqa, {"train": 2000, "val": 200}),
    "aokvqa": SceneSet(writers.aokvqa, {"train": 2000, "val": 200}),
    "ocrvqa": SceneSet(writers.ocrvqa, {"train": 2000, "val": 200}),
    "textcaps": SceneSet(writers.textcaps, {"train": 1500, "val": 200}),
    "llava": SceneSet(writers.llava, {"train": 1000}),
    "nocaps": SceneSet(writers.nocaps, {"val": 200}),
    "gqa": SceneSet(writers.gqa, {"test": 200}),
    "vsr": SceneSet(writers.vsr, {"test": 200}),
    "iconqa": SceneSet(writers.iconqa, {"test": 200}),
    "scienceqa": SceneSet(writers.scienceqa, {"test": 200, "train": 400}),
    "textvqa": SceneSet(writers.textvqa, {"val": 200}),
    "visual_dialog": SceneSet(writers.visual_dialog, {"val": 200}),
    "hatefulmemes": SceneSet(writers.hatefulmemes, {"val": 200}),
    "vizwiz": SceneSet(writers.vizwiz, {"val": 200}),
    "msvdqa": SceneSet(writers.msvdqa, {"train": 60, "test": 200}),
}
