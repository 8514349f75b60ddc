"""The model `dense` that ships with the package: complete, small, and looking where a text says."""

from pathlib import Path

import pytest
import torch

import instructblip
from instructblip.inference.engine import Engine
from instructblip.model.checkpoints.directory import model_directory
from instructblip.scenes.dense import render_dense
from runs.dense.attention import asked, shares


@pytest.fixture(scope="module")
def engine() -> Engine:
    return instructblip.load("dense", instruction_aware=True)


def test_at_most_10_megabytes_with_a_model_card() -> None:
    folder = model_directory("dense")
    files = [f for f in folder.rglob("*") if f.is_file()]
    assert sum(f.stat().st_size for f in files) <= 10_000_000
    assert (folder / "README.md").read_text().startswith("# dense")


def test_its_queries_look_where_the_text_says(engine: Engine) -> None:
    found: dict[bool, list[float]] = {True: [], False: []}
    for scene, item, _ in asked("look", 12):
        pixels = engine.images.transform(render_dense(scene))
        for reads in found:
            text = f"digit [MASK] on the {item.look}" if reads else ""
            sample = engine.sample(("image",), (pixels,), text)
            found[reads].append(shares(engine.look([sample])[0, 0], item).mean().item())
    means = {reads: torch.tensor(values).mean().item() for reads, values in found.items()}
    assert means[True] > 3 * means[False], means


def test_a_missing_model_names_its_script(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("importlib.resources.files", lambda _: tmp_path)
    with pytest.raises(FileNotFoundError, match=r"rebuild it with runs/dense\.sh"):
        model_directory("dense")
