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
from instructblip.scenes.formats import SetFolder

FORMAT_VERSION = 2
MARKER = "scenes.json"
"""The file of settings that marks a folder as written by us."""


class WrittenSet(NamedTuple):
    """How a set is written: its writer, and samples per split, before rounding."""

    write: Callable[[Any, int], None]
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
    settings = {"format": FORMAT_VERSION, "seed": seed, "scale": scale}
    due = chosen_sets(SCENE_SETS, sets)
    return write_sets(Path(root), due, settings, writers.SetFolder, "instructblip scenes")


def chosen_sets(
    written: dict[str, WrittenSet], names: tuple[str, ...] | None
) -> dict[str, WrittenSet]:
    """The sets of these names, all for None. Raises ValueError for an unknown one."""
    if names is None:
        return written
    if unknown := [name for name in names if name not in written]:
        raise ValueError(f"no scene set {unknown}; expected some of {', '.join(written)}")
    return {name: written[name] for name in names}


def write_sets(
    root: Path,
    sets: dict[str, WrittenSet],
    settings: dict[str, Any],
    folder_type: type[SetFolder],
    command: str,
) -> dict[str, Path]:
    """Write ``sets`` below ``root``, each whole or not at all; returns the folder of each.

    ``settings`` have a seed and a scale; a set that was written with the same ones is left as it
    is. ``command`` is what a user calls, for the error about other data.
    """
    scale = settings["scale"]
    if not 0 < scale < math.inf:
        raise ValueError(f"scale {scale:g}; expected a number above 0, such as 0.1")
    recover(root, earlier=False)
    due = [name for name in sets if _settings_of(root / name) != settings]
    if taken := other_data(root, due):
        raise ValueError(
            f"{', '.join(map(str, taken))}: `{command}` did not write this and would "
            f"replace it; choose another ROOT than {root}"
        )
    root.mkdir(parents=True, exist_ok=True)
    for name in due:
        with replacing_directory(root / name, synced=False) as folder:
            for split, size in sets[name].sizes.items():
                rng = random.Random(f"{settings['seed']}/{name}/{split}")
                sets[name].write(folder_type(folder, split, rng), max(8, round(size * scale)))
            (folder / MARKER).write_text(json.dumps(settings))
    return {name: root / name for name in sets}


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


SCENE_SETS: dict[str, WrittenSet] = {
    "coco_caption": WrittenSet(writers.coco_caption, {"train": 2000, "val": 200}),
    "vqav2": WrittenSet(writers.vqav2, {"train": 9000, "val": 300}),
    "okvqa": WrittenSet(writers.okvqa, {"train": 2000, "val": 200}),
    "aokvqa": WrittenSet(writers.aokvqa, {"train": 2000, "val": 200}),
    "ocrvqa": WrittenSet(writers.ocrvqa, {"train": 2000, "val": 200}),
    "textcaps": WrittenSet(writers.textcaps, {"train": 1500, "val": 200}),
    "llava": WrittenSet(writers.llava, {"train": 1000}),
    "nocaps": WrittenSet(writers.nocaps, {"val": 200}),
    "gqa": WrittenSet(writers.gqa, {"test": 200}),
    "vsr": WrittenSet(writers.vsr, {"test": 200}),
    "iconqa": WrittenSet(writers.iconqa, {"test": 200}),
    "scienceqa": WrittenSet(writers.scienceqa, {"test": 200, "train": 400}),
    "textvqa": WrittenSet(writers.textvqa, {"val": 200}),
    "visual_dialog": WrittenSet(writers.visual_dialog, {"val": 200}),
    "hatefulmemes": WrittenSet(writers.hatefulmemes, {"val": 200}),
    "vizwiz": WrittenSet(writers.vizwiz, {"val": 200}),
    "pope": WrittenSet(writers.pope, {"val": 100}),
    "msvdqa": WrittenSet(writers.msvdqa, {"train": 60, "test": 200}),
}
