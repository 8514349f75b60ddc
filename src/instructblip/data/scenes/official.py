"""Writes the embedded world as the owners of the real data sets would: their files, their fields.

``write_scenes(root)`` makes one folder a set (``root/vqav2/annotations``, ``root/vqav2/images``),
so that the readers of real downloads read it. Held-in sets have train and val splits and know
neither the held-out colour-shape pairs nor the digits kept for tests in training; held-out sets
have the split that the paper evaluates, and no other, but for two: MSVD-QA's training answers are
the vocabulary that its test ranks, and ScienceQA's train split is for fine-tuning on that one set.
"""

import json
import random
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from instructblip.data.scenes.writers.captions import coco_caption, nocaps, textcaps
from instructblip.data.scenes.writers.choices import aokvqa, iconqa, scienceqa
from instructblip.data.scenes.writers.dialogue import llava, visual_dialog
from instructblip.data.scenes.writers.reading import ocrvqa, textvqa
from instructblip.data.scenes.writers.set_folder import SetFolder
from instructblip.data.scenes.writers.statements import hatefulmemes, vsr
from instructblip.data.scenes.writers.video import msvdqa
from instructblip.data.scenes.writers.vqa import gqa, okvqa, vizwiz, vqav2

FORMAT_VERSION = 2


@dataclass(frozen=True)
class SceneSet:
    """How a set is written: its writer, role and split sizes (samples, before rounding)."""

    write: Callable[[SetFolder, int], None]
    role: str
    sizes: dict[str, int]


def write_scenes(
    root: str | Path, seed: int = 0, scale: float = 1.0, sets: tuple[str, ...] | None = None
) -> dict[str, Path]:
    """Write the sets of the embedded world below ``root``; gives the folder of each.

    ``scale`` multiplies every size. The same seed and scale give the same bytes. A folder that a
    finished run of the same settings wrote is left as it is; an unfinished one never shows, since
    each set is written aside and renamed. Raises ValueError for an unknown set.
    """
    root = Path(root)
    chosen = tuple(SCENE_SETS) if sets is None else sets
    if unknown := [name for name in chosen if name not in SCENE_SETS]:
        raise ValueError(f"no scene set {unknown}; expected some of {', '.join(SCENE_SETS)}")
    root.mkdir(parents=True, exist_ok=True)
    for name in chosen:
        settings = {"format": FORMAT_VERSION, "seed": seed, "scale": scale}
        marker = root / name / "scenes.json"
        if marker.is_file() and json.loads(marker.read_text()) == settings:
            continue
        aside = Path(tempfile.mkdtemp(prefix=f".{name}-", dir=root))
        for split, size in SCENE_SETS[name].sizes.items():
            rng = random.Random(f"{seed}/{name}/{split}")
            SCENE_SETS[name].write(SetFolder(aside, split, rng), max(8, round(size * scale)))
        (aside / "scenes.json").write_text(json.dumps(settings))
        shutil.rmtree(root / name, ignore_errors=True)
        aside.replace(root / name)
    return {name: root / name for name in chosen}


SCENE_SETS: dict[str, SceneSet] = {
    "coco_caption": SceneSet(coco_caption, "held_in", {"train": 2000, "val": 200}),
    "vqav2": SceneSet(vqav2, "held_in", {"train": 9000, "val": 300}),
    "okvqa": SceneSet(okvqa, "held_in", {"train": 2000, "val": 200}),
    "aokvqa": SceneSet(aokvqa, "held_in", {"train": 2000, "val": 200}),
    "ocrvqa": SceneSet(ocrvqa, "held_in", {"train": 2000, "val": 200}),
    "textcaps": SceneSet(textcaps, "held_in", {"train": 1500, "val": 200}),
    "llava": SceneSet(llava, "held_in", {"train": 1000}),
    "nocaps": SceneSet(nocaps, "held_out", {"val": 200}),
    "gqa": SceneSet(gqa, "held_out", {"test": 200}),
    "vsr": SceneSet(vsr, "held_out", {"test": 200}),
    "iconqa": SceneSet(iconqa, "held_out", {"test": 200}),
    "scienceqa": SceneSet(scienceqa, "held_out", {"test": 200, "train": 400}),
    "textvqa": SceneSet(textvqa, "held_out", {"val": 200}),
    "visual_dialog": SceneSet(visual_dialog, "held_out", {"val": 200}),
    "hatefulmemes": SceneSet(hatefulmemes, "held_out", {"val": 200}),
    "vizwiz": SceneSet(vizwiz, "held_out", {"val": 200}),
    "msvdqa": SceneSet(msvdqa, "held_out", {"train": 60, "test": 200}),
}
