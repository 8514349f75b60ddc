"""Images of a clinic in 12 of 16 bits, three of each patient, and a nodule in a quarter of them.

python examples/clinic.py [FOLDER] [A.B=C]..."""

import sys
from pathlib import Path

import numpy as np
import typer
from PIL import Image

from instructblip.cli.data import check
from instructblip.cli.evaluation import compare, evaluate
from instructblip.cli.training import train

RECIPE = str(Path(__file__).with_suffix(".yaml"))
KINDS = ("nodule", "clip", "nothing", "nothing")
SPLITS = ["test", "test", "val", *["train"] * 7]


def story(root: Path, overrides: list[str], start: str = "starter", patients: int = 160) -> None:
    """Draw a round nodule, a square clip or neither; split; check; train; evaluate; compare."""
    (rng, rows), (y, x) = (np.random.default_rng(0), []), np.mgrid[:64, :64]
    (root / "chest").mkdir(parents=True, exist_ok=True)
    for patient in range(patients):
        body = Image.fromarray(rng.uniform(300, 1200, (5, 5)).astype(np.float32)).resize((64, 64))
        kind, (left, top) = KINDS[(patient + patient // 10) % 4], rng.integers(16, 48, 2)
        for view in range(3):
            across, down = abs(x - left - rng.integers(-3, 4)), abs(y - top)
            bright = {"nodule": np.hypot(across, down) < 9, "clip": np.maximum(across, down) < 8}
            pixels = np.where(bright.get(kind, False), 3000, body) + rng.normal(0, 60, x.shape)
            name = f"p{patient:03}_{view}.png"
            Image.fromarray(pixels.astype(np.uint16)).save(root / "chest" / name)
            answer = "yes" if kind == "nodule" else "no"
            rows.append(f"{name},p{patient:03},is there a nodule?,{answer}")
    settings = [f"data.root={root}", f"model.start={start}", *overrides]
    for together in (1, 3):  # images that go to one side: first each by itself, then a patient's
        lines = [f"{row},{SPLITS[n // together % 10]}" for n, row in enumerate(rows)]
        header = "file_name,patient_id,question,answer,split"
        (root / "chest" / "images.csv").write_text("\n".join([header, *lines]))
        try:
            check(RECIPE, settings)
        except typer.Exit:
            if together == 3:
                raise
            print("Patients are on two sides, so the clinic splits by patient.")
    train(RECIPE, settings, out=root / "run")
    models = {"before": start, "after": str(root / "run"), "blind": str(root / "run")}
    for name, model in models.items():
        evaluate([RECIPE, model, *settings], out=root / "results" / name, blind=name == "blind")
    compare([root / "results" / name for name in models], intervals=True)


if __name__ == "__main__":
    story(Path(sys.argv[1] if len(sys.argv) > 1 else "out/clinic"), sys.argv[2:])
