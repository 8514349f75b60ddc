"""Compiled layers give the results of plain ones and are compiled once, whatever the lengths."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch._inductor import config as inductor

from instructblip.experiment import model as experiment
from instructblip.model.compiled import why_not_compiled
from instructblip.recipe.load import load_recipe
from instructblip.recipe.schema import Recipe
from tests.parity.tiny import tiny_transformers

PROGRAM = Path(__file__).with_name("compiled_program.py")
CASES = {
    "llama:inductor:200": 4,  # image encoder, Q-Former, before attention and behind it
    "t5:eager:10": 16,
    "bloom:eager:5": 3,  # padded rows: one graph for the whole layer
    "llama+lora+int8+checkpoint:eager:3": 4,
}
"""Kind, backend and batches, and the graphs that are compiled. The last three check what is
compiled, and how often, without waiting for a C++ compiler."""


def test_layers_are_compiled_once_and_equal_plain_ones() -> None:
    environment = {**os.environ, "TORCHINDUCTOR_COMPILE_THREADS": "1"}
    command = [sys.executable, str(PROGRAM), *CASES]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    assert len(lines) == len(CASES)
    for (case, graphs), line in zip(CASES.items(), lines, strict=True):
        assert line["apart"] < 1e-5, case
        assert line["first"] == line["last"] == graphs, case


def recipe_of(start: Path | str, *overrides: str) -> Recipe:
    return load_recipe("quickstart", [f"model.start={start}", "training.device=cpu", *overrides])


@pytest.mark.parametrize(("setting", "compiles"), [("auto", False), ("on", True), ("off", False)])
def test_a_cpu_compiles_where_the_setting_is_on(
    setting: str, compiles: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_transformers("llama").save_pretrained(tmp_path)
    monkeypatch.setattr(experiment, "why_not_compiled", lambda device: None)
    recipe = recipe_of(tmp_path, f"training.compile={setting}")
    model = experiment.load_model(recipe)
    assert model.qformer.compiled is model.vision_model.compiled is compiles


def test_without_a_compiler_auto_runs_plain_layers_and_on_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(inductor.cpp, "cxx", ("no-such-compiler",))
    reason = why_not_compiled(torch.device("cpu"))
    assert reason is not None
    assert "\n" not in reason
    monkeypatch.setattr(experiment, "why_not_compiled", lambda device: reason)
    with pytest.raises(ValueError, match=r"training.compile=on: .* install a C\+\+ compiler"):
        experiment.compiles(recipe_of("x", "training.compile=on").training)
    monkeypatch.setattr(experiment.distributed, "resolve_device", lambda name: torch.device("cuda"))
    assert not experiment.compiles(recipe_of("x").training)
    out = capsys.readouterr().out
    assert out.count("\n") == 1
    assert reason in out
    monkeypatch.setattr(experiment, "why_not_compiled", lambda device: None)
    with torch._dynamo.config.patch(suppress_errors=False):  # which `auto` changes
        assert experiment.compiles(recipe_of("x").training)


def test_a_layer_that_does_not_compile_runs_plain_under_auto(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def broken(graph: object, inputs: object) -> None:
        raise NotImplementedError("no code for this graph")

    run = torch.compile(lambda x: 2 * x, backend=broken)
    monkeypatch.setattr(experiment.distributed, "resolve_device", lambda name: torch.device("cuda"))
    monkeypatch.setattr(experiment, "why_not_compiled", lambda device: None)
    with torch._dynamo.config.patch(suppress_errors=False):
        with pytest.raises(Exception, match="no code for this graph"):
            run(torch.ones(2))
        assert experiment.compiles(recipe_of("x").training)
        assert run(torch.ones(2)).tolist() == [2, 2]
