"""The stories of docs/stories.md, each in a few steps of a tiny random BLIP-2."""

import importlib
import json
from pathlib import Path

import pytest
import torch

from tests.testing import write_model

EXAMPLES = Path(__file__).parents[2] / "examples"
SHORT = ["training.steps=2", "training.batch_size=2", "training.validate_every=2"]
SHORT += ["model.text_branch=random", "evaluation.decoding={max_new_tokens: 3}"]


def tell(name: str, root: Path, capsys: pytest.CaptureFixture[str], count: int) -> list[str]:
    """The lines that the story prints, in few steps and with ``count`` images or patients."""
    torch.set_num_threads(1)
    assert len((EXAMPLES / f"{name}.py").read_text().splitlines()) <= 55
    start = str(write_model(root / "blip2", "blip2"))
    importlib.import_module(f"examples.{name}").story(root, SHORT, start, count)
    return capsys.readouterr().out.splitlines()


def test_a_teacher_repairs_the_rows_that_the_check_lists(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = tell("classroom", tmp_path, capsys, 10)
    assert lines[0] == "2 of 22 examples are bad:"
    assert "absent.png" in lines[1]
    assert "the answer is 'TODO', a placeholder" in lines[2]
    table = [line for line in lines if line.startswith("| ")]
    for row in ("before", "best constant answer", "after"):
        assert any(row in line for line in table), row
    assert (tmp_path / "tuned" / "report.html").is_file()


def test_a_clinic_learns_that_its_split_shares_patients(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = tell("clinic", tmp_path, capsys, 20)
    (failed,) = (line for line in lines if line.startswith("FAILED"))
    assert "x group on both sides" in failed
    assert "x near-duplicate" in failed
    assert "x narrow range" in failed
    repaired = lines.index("Patients are on two sides, so the clinic splits by patient.")
    assert not any("group on both sides" in line for line in lines[repaired:])
    for name in ("before", "after", "blind"):
        result = json.loads((tmp_path / f"results/{name}/nodule/result.json").read_text())
        assert result["constants"]["balanced_accuracy"]["score"] == 50
        assert result["settings"]["blind_seed"] == (0 if name == "blind" else None)


def test_engineers_train_on_two_tasks_in_a_foreign_format(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = tell("engineering", tmp_path, capsys, 20)
    assert sum(line.startswith("ok ") for line in lines) == 6
    assert any("short_early" in line and "report_early" in line for line in lines)
    after = tmp_path / "results" / "after"
    scores = {path.parent.name: json.loads(path.read_text()) for path in after.glob("*/*.json")}
    assert set(scores) == {"short", "report"}
    assert scores["short"]["metric"] == "exact_match"
    assert scores["report"]["metric"] == "rouge_l"
    assert any("best constant answer" in line for line in lines)
