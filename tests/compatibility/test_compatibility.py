"""The files of an earlier version are loaded, resumed, evaluated and read without a change.

``made/`` was made by `make` with an earlier commit: a tiny run with its best weights and its first
checkpoint, prepared data, stored features and results. On the kind of machine that made it, all
figures are the same bit for bit; on another one, whose sums may round otherwise, they are close.
"""

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import instructblip
from instructblip.evaluation.result import Result
from instructblip.training.log import read_metrics, without_timings
from tests.compatibility import make

MADE = Path(__file__).parent / "made"
EXPECTED = json.loads((MADE / "expected" / "expected.json").read_text())
CHECKPOINT = "run/checkpoints/step_000006/parameters.safetensors"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy, as if it had been made here."""
    shutil.copytree(MADE, tmp_path, dirs_exist_ok=True)
    rename_folder(tmp_path)
    make.set_dates(tmp_path / "data" / "vqav2")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield tmp_path
    torch.set_num_threads(threads)


def rename_folder(folder: Path) -> None:
    """Replace the name of the folder in which ``made/`` was made, and what follows from that: the
    hashes of the files that name it (the manifests of prepared data, hence the notes of a run that
    hold their hashes, hence the checkpoint that holds a hash of each note)."""
    replacements = {str(make.FOLDER): str(folder)}
    texts = {path: path.read_text() for path in folder.rglob("*.json")}
    while replacements:
        changed = {}
        for path, text in texts.items():
            new = text
            for old, other in replacements.items():
                new = new.replace(old, other)
            if new != text:
                texts[path] = new
                path.write_text(new)
                changed[sha256(text)] = sha256(new)
        replacements = changed


def sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def same(value: Any, expected: Any) -> bool:
    if make.machine() == EXPECTED["machine"]:
        if isinstance(value, torch.Tensor):
            return torch.equal(value, expected)
        return value == expected
    if isinstance(value, torch.Tensor):
        return torch.allclose(value, expected, atol=1e-3)
    if isinstance(value, dict):
        return value.keys() == expected.keys() and all(same(value[k], expected[k]) for k in value)
    return value == pytest.approx(expected, rel=1e-3)


def state(*folders: str) -> dict[str, tuple[int, bytes]]:
    """Date and content of every file."""
    return {
        str(path): (path.stat().st_mtime_ns, path.read_bytes())
        for folder in folders
        for path in Path(folder).rglob("*")
        if path.is_file()
    }


def lines(folder: str) -> list[dict[str, Any]]:
    return [without_timings(line) for line in read_metrics(Path(folder) / "metrics.jsonl")]


def check_trained(run: str) -> None:
    """The weights after the last step, the loss of every batch and every validation."""
    weights = load_file(CHECKPOINT.replace("run", run, 1))
    expected = load_file("expected/parameters.safetensors")
    assert weights.keys() == expected.keys()
    assert all(same(weights[name], expected[name]) for name in weights)
    assert len(lines(run)) == len(lines("expected"))
    for line, other in zip(lines(run), lines("expected"), strict=True):
        assert same(line, other)


def test_a_run_resumes_and_reads_its_data_and_features(folder: Path):
    before = state("data")
    printed = make.run("train", "recipe.yaml", "--out", "run", "--resume")
    assert "step 4/6" in printed
    assert "step 3/6  loss" not in printed
    assert "resuming with" not in printed, "neither the recipe nor the data has changed"
    check_trained("run")
    assert sorted(str(p) for p in Path("run").rglob("*") if p.is_file()) == EXPECTED["files"]
    assert state("data") == before, "nothing was prepared, checked or encoded again"


def test_training_anew_is_the_same(folder: Path):
    before = state("data")
    make.run("train", "recipe.yaml", "--out", "anew")
    check_trained("anew")
    assert state("data") == before


def test_results_are_read_and_the_same_samples_give_the_same_answers(folder: Path):
    before = Result.load("results/scenes_vqav2")
    stored = json.loads(Path("results/scenes_vqav2/result.json").read_text())
    assert (before.value, before.n) == (stored["value"], 4)
    # `limit` chooses other samples than it did, so such an evaluation is not continued.
    with pytest.raises(ValueError, match="holds predictions made with another data"):
        make.run("evaluate", "recipe.yaml", "run", "--out", "results")
    make.run("evaluate", "recipe.yaml", "run", "--out", "anew", "evaluation.limit=null")
    if make.machine() == EXPECTED["machine"]:
        anew = {p["id"]: p for p in Result.load("anew/scenes_vqav2").predictions}
        assert [{**anew[p["id"]], "index": p["index"]} for p in before.predictions] == list(
            before.predictions
        )


def test_a_run_answers(folder: Path):
    text = make.answer(Path(EXPECTED["image"]))
    if make.machine() == EXPECTED["machine"]:
        assert text == EXPECTED["answer"]
    assert instructblip.load("run") is not None


def test_leftovers_of_crashes_of_earlier_versions_are_recovered(folder: Path):
    """Killed between the renames of best/ and of the prepared data, and while notes were written;
    a day ago, since the names of earlier versions do not say on which machine."""
    Path("run/best").rename("run/.old-best")
    shutil.copytree("run/.old-best", "run/.new-best")
    Path("run/.recipe.yaml.part").write_text("model: {sta")
    Path("run/checkpoints/.new-step_000006").mkdir()
    Path("data/prepared/vqav2/train").rename("data/prepared/vqav2/.train.4194303.old")
    (next(Path("data/features").iterdir()) / ".a.safetensors.4194303.tmp").write_text("half")
    assert make.answer(Path(EXPECTED["image"])) == EXPECTED["answer"] or (
        make.machine() != EXPECTED["machine"]
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("instructblip.core.files.DEAD_SECONDS", -1.0)
        make.run("train", "recipe.yaml", "--out", "run", "--resume")
    check_trained("run")
    assert not [path for path in Path().rglob(".*") if path.name != "." and os.path.lexists(path)]
