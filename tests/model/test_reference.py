"""Runs that hold what they changed: small, loaded as if whole, refused without their start."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import InstructBlipForConditionalGeneration

from instructblip.experiment.build import Variant
from instructblip.experiment.pretrain import Pretraining
from instructblip.inference.fingerprint import fingerprint
from instructblip.model.checkpoints import weights as module
from instructblip.model.checkpoints.inspection import inspect_checkpoint
from instructblip.model.instructblip import InstructBlip
from instructblip.model.retrieval import Heads
from instructblip.release.export import export_model
from tests.testing import write_model


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run directory whose query tokens were trained, beside start/."""
    monkeypatch.setattr(module, "WORTH_REFERRING", 1000)
    model = InstructBlip.from_pretrained(write_model(tmp_path / "start", "instructblip"))
    with torch.no_grad():
        model.query_tokens.add_(1)
    model.save_pretrained(tmp_path / "run" / "last", whole=False)
    return tmp_path / "run"


def state(path: Path) -> dict[str, torch.Tensor]:
    return InstructBlip.from_pretrained(path).state_dict()


def test_only_what_changed_is_stored_and_all_is_loaded(run: Path) -> None:
    last, start = run / "last", run.parent / "start"
    assert [*load_file(last / "changed.safetensors")] == ["query_tokens"]
    assert not (last / "model.safetensors").exists()
    before, after = state(start), state(run)
    assert [n for n in before if not torch.equal(before[n], after[n])] == ["query_tokens"]
    assert torch.equal(after["query_tokens"], before["query_tokens"] + 1)
    report = inspect_checkpoint(run)
    assert not report.missing
    assert not report.unexpected
    assert str(run.parent) not in json.loads((last / "start.json").read_text())["start"][0]


def test_every_run_is_written_so(run: Path, tmp_path: Path) -> None:
    model = InstructBlip.from_pretrained(tmp_path / "start", instruction_aware=False)
    for stage, variant in {
        "train": Variant(),
        "one": Pretraining(1),
        "two": Pretraining(2),
    }.items():
        trained = Heads(model.config.qformer.hidden_size) if stage == "one" else model
        variant.export(model, trained)(tmp_path / stage / "last")
        assert (tmp_path / stage / "last" / "start.json").is_file(), stage
    report = inspect_checkpoint(tmp_path / "two")
    assert not report.unexpected, "the start has a text branch, a BLIP-2 has none"
    assert "text_branch.safetensors" in {path.name for path in (tmp_path / "two/last").iterdir()}


def test_a_small_model_stays_whole(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    model = InstructBlip.from_pretrained(run.parent / "start")
    model.save_pretrained(run.parent / "small", whole=False)
    assert not (run.parent / "small" / "start.json").exists()
    assert (run.parent / "small" / "model.safetensors").is_file()


def test_export_needs_no_start(run: Path, tmp_path: Path) -> None:
    before = state(run)
    export_model(run, tmp_path / "whole")
    shutil.rmtree(tmp_path / "start")
    after = state(tmp_path / "whole")
    assert all(torch.equal(before[name], after[name]) for name in before)
    theirs: Any = InstructBlipForConditionalGeneration.from_pretrained(tmp_path / "whole")
    assert torch.equal(theirs.query_tokens, before["query_tokens"])


def test_a_run_from_a_run_refers_to_the_first_start(run: Path, tmp_path: Path) -> None:
    model = InstructBlip.from_pretrained(run)
    with torch.no_grad():
        model.language_projection.bias.add_(1)
    model.save_pretrained(tmp_path / "second" / "last", whole=False)
    before = state(run)
    shutil.rmtree(run)
    changed = load_file(tmp_path / "second" / "last" / "changed.safetensors")
    assert {*changed} == {"query_tokens", "language_projection.bias"}
    assert torch.equal(state(tmp_path / "second")["query_tokens"], before["query_tokens"])


def test_both_may_move_together_and_the_run_alone(run: Path, tmp_path: Path) -> None:
    name = fingerprint(run / "last", True)
    shutil.move(run, tmp_path / "elsewhere" / "deep" / "run")
    alone = tmp_path / "elsewhere" / "deep" / "run"
    assert "query_tokens" in state(alone)
    assert fingerprint(alone / "last", True) == name
    moved = tmp_path / "moved"
    shutil.copytree(tmp_path / "start", moved / "start")
    shutil.copytree(alone, moved / "run")
    shutil.rmtree(tmp_path / "start")
    assert "query_tokens" in state(moved / "run")


def test_results_know_what_changed(run: Path) -> None:
    before = fingerprint(run / "last", True)
    model = InstructBlip.from_pretrained(run)
    with torch.no_grad():
        model.query_tokens.add_(1)
    model.save_pretrained(run / "last", whole=False)
    assert fingerprint(run / "last", True) != before


def test_a_start_that_is_gone_or_another_is_named(run: Path, tmp_path: Path) -> None:
    file = tmp_path / "start" / "model.safetensors"
    shutil.copy(file, tmp_path / "kept")
    file.write_bytes(b"other")
    with pytest.raises(ValueError, match=r"start/model\.safetensors.*is another file now"):
        InstructBlip.from_pretrained(run)
    file.unlink()
    with pytest.raises(FileNotFoundError, match=r"is not there: put it back.*export") as error:
        InstructBlip.from_pretrained(run)
    assert "\n" not in str(error.value)
    shutil.copy(tmp_path / "kept", file)
    assert "query_tokens" in state(run)


def test_transformers_does_not_draw_what_is_left_out(run: Path) -> None:
    with pytest.raises(OSError, match=r"model\.safetensors"):
        InstructBlipForConditionalGeneration.from_pretrained(run / "last")
