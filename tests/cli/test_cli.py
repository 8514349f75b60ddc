"""The command line: light help, and mistakes as one line with exit code 2."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest
import torch

from instructblip.cli import main as cli
from instructblip.core.version import __version__
from instructblip.evaluation.evaluate import evaluate
from instructblip.model.config import VisionConfig
from instructblip.scenes import official
from instructblip.training.checkpoint import save_checkpoint
from tests.evaluation.fakes import FakeEngine, benchmark, colour_questions

SOURCE = Path(cli.__file__).parents[2]


def call(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as stop:
        cli.main(list(arguments))
    output = capsys.readouterr()
    return int(stop.value.code or 0), output.out, output.err


def test_help_lists_the_stages(capsys: pytest.CaptureFixture[str]):
    code, out, _ = call(capsys, "--help")
    assert code == 0
    for stage in ("quickstart", "scenes", "prepare", "train", "evaluate", "compare", "report"):
        assert stage in out


def test_the_version_names_what_a_report_of_a_fault_needs(capsys: pytest.CaptureFixture[str]):
    code, out, _ = call(capsys, "--version")
    assert code == 0
    assert out.startswith(f"instructblip {__version__} (Python 3.")
    assert f"torch {torch.__version__}" in out


def test_help_imports_nothing_heavy():
    """What keeps it fast; a time would depend on what else the machine does."""
    environment = os.environ | {"PYTHONPATH": str(SOURCE)}
    command = [sys.executable, "-X", "importtime", "-m", "instructblip", "--help"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    imported = {line.split("|")[-1].strip() for line in done.stderr.splitlines()}
    assert "typer" in imported
    assert not imported & {"torch", "transformers", "numpy", "pydantic", "matplotlib", "datasets"}


def test_a_mistake_is_one_line(capsys: pytest.CaptureFixture[str]):
    code, _, err = call(capsys, "train", "quikstart")
    assert code == 2
    assert err.startswith("instructblip: no recipe quikstart: did you mean quickstart?")
    assert err.count("\n") == 1
    code, _, err = call(capsys, "train", "scenes", "training.step=3")
    assert code == 2
    assert "unknown key training.step: did you mean steps?" in err
    assert "Traceback" not in err


def test_recipes_and_their_schema_are_printed(capsys: pytest.CaptureFixture[str]):
    code, out, _ = call(capsys, "recipe")
    assert code == 0
    assert "scenes                 Instruction tuning on Scenes" in out
    code, out, _ = call(capsys, "recipe", "quickstart")
    assert "\n  # Optimiser steps of the run.\n  steps: " in out
    code, _, err = call(capsys, "recipe", "quikstart")
    assert code == 2
    assert "did you mean quickstart?" in err
    code, out, _ = call(capsys, "schema")
    assert "report_to" in json.loads(out)["$defs"]["TrainingConfig"]["properties"]


def test_choices_are_those_of_the_package(capsys: pytest.CaptureFixture[str]):
    from instructblip.cli.data import ExportForm
    from instructblip.data.export import Form

    assert get_args(ExportForm) == get_args(Form)
    for command in ("compare a", "export starter x", "prepare scenes"):
        option = "--export" if command.startswith("prepare") else "--format"
        code, _, err = call(capsys, *command.split(), option, "lava")
        assert code == 2
        assert "'lava' is not one of" in " ".join(err.split())


@pytest.mark.parametrize("command", ["answer", "chat"])
def test_the_decoding_options_are_those_of_the_model(
    command: str, capsys: pytest.CaptureFixture[str]
):
    from instructblip.model.decoding import Decoding

    _, out, _ = call(capsys, command, "--help")
    text = " ".join(out.split())
    for name, field in Decoding.model_fields.items():
        option = f"--{name.replace('_', '-')}"
        assert (option in text) == (name != "do_sample")
        assert name == "do_sample" or field.description in text  # type: ignore[operator]
    assert "A whole number from 1 to 100; 5 in the paper." in text


@pytest.mark.parametrize("command", ["answer", "chat", "look", "explain", "serve", "evaluate"])
def test_the_options_of_the_placement_are_those_of_the_model(
    command: str, capsys: pytest.CaptureFixture[str]
):
    from instructblip.model.placement import Placement

    _, out, _ = call(capsys, command, "--help")
    text = " ".join(out.split())
    for name, field in Placement.model_fields.items():
        assert f"--{name} " in text
        assert field.description in text  # type: ignore[operator]


def test_a_placement_is_checked_before_anything_is_read(capsys: pytest.CaptureFixture[str]):
    for command in ("answer --image none.png --instruction x", "serve", "evaluate starter"):
        code, _, err = call(capsys, *command.split(), "--quantize", "int4")
        assert code == 2
        assert "quantize must be int8, fp8 or nf4; got 'int4'" in " ".join(err.split())


def test_debug_shows_where():
    with pytest.raises(FileNotFoundError):
        cli.main(["--debug", "train", "quikstart"])
    with pytest.raises(FileNotFoundError):
        cli.main(["train", "quikstart", "--debug"])


def test_internal_errors_are_not_hidden(monkeypatch: pytest.MonkeyPatch):
    def broken(*_args: object, **_options: object) -> None:
        raise AssertionError("ours")

    monkeypatch.setattr(official, "write_scenes", broken)
    with pytest.raises(AssertionError, match="ours"):
        cli.main(["scenes"])


def test_scenes_writes_the_sets_that_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    call(capsys, "scenes", str(tmp_path), "--scale", "0.005", "--sets", "coco_caption, vsr")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["coco_caption", "vsr"]
    code, _, err = call(capsys, "scenes", str(tmp_path), "--dense", "--sets", "vsr2")
    assert code == 2
    assert "no scene set ['vsr2']; expected some of" in err


def test_system_errors_are_printed_without_their_number():
    assert cli.describe(OSError(28, "the disk is full")) == "the disk is full"
    assert cli.describe(FileNotFoundError(2, "No such file", "a.txt")) == "No such file: a.txt"
    assert cli.describe(ValueError("plain")) == "plain"


def test_invalid_values_are_printed_in_one_line():
    with pytest.raises(ValueError, match="validation errors") as error:
        VisionConfig(hidden_size=0, hidden_act="tanh")  # type: ignore[arg-type]
    text = cli.describe(error.value)
    assert text.startswith("VisionConfig: hidden_size: Input should be greater than 0 (got 0); ")
    assert text.endswith(" (got 'tanh')")
    with pytest.raises(ValueError, match="validation error") as error:
        VisionConfig(hidden_size=20, num_attention_heads=16)
    expected = "VisionConfig: hidden_size must be a multiple of num_attention_heads; got 20 and 16"
    assert cli.describe(error.value) == expected


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        (["answer", "--image", "", "--instruction", "a"], "--image"),
        (["evaluate", "starter", "--benchmarks="], "--benchmarks"),
        (["evaluate", ""], "the argument after evaluate"),
        ([""], "the first argument"),
    ],
)
def test_empty_arguments_are_named(
    capsys: pytest.CaptureFixture[str], arguments: list[str], name: str
):
    code, _, err = call(capsys, *arguments)
    assert code == 2
    assert err == f"instructblip: {name} is empty: give a value; is a variable unset?\n"


def test_results_to_compare_must_exist(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    code, _, err = call(capsys, "compare", str(tmp_path), str(tmp_path))
    assert code == 2
    assert "holds no results: run `instructblip evaluate` first" in err


def result_folders(root: Path, *names: str) -> list[str]:
    """Folders as `evaluate` writes them, with the sets a_in and b_out."""
    for name in names:
        for asked in (benchmark(name="a_in"), benchmark(name="b_out", role="held_out")):
            out = root / name / asked.name
            evaluate(FakeEngine(), asked, colour_questions(), out=out, progress=False)
    return [str(root / name) for name in names]


def test_compare_takes_folders_with_an_equals_sign(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    folders = result_folders(tmp_path, "lr=1", "plain")
    code, out, _ = call(capsys, "compare", *folders, "--format", "json")
    assert code == 0
    assert json.loads(out)["models"] == ["lr=1", "plain"]


def test_compare_shows_the_benchmarks_asked_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    command = ["compare", *result_folders(tmp_path, "one", "two"), "--format", "json"]
    for asked in ("b_out", "held_out", " b_out, held_out"):
        code, out, _ = call(capsys, *command, "--benchmarks", asked)
        assert code == 0
        assert list(json.loads(out)["datasets"]) == ["b_out"]
    code, _, err = call(capsys, *command, "--benchmarks", "b_out,gqa")
    assert code == 2
    assert "no results of gqa: there are a_in, b_out" in err


@pytest.mark.parametrize(
    "settings", [["--limit", "3"], ["data.seed=1"], ["--recipe", "scenes"], ["absent=1"]]
)
def test_settings_of_an_evaluation_are_refused_for_results(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], settings: list[str]
):
    code, _, err = call(capsys, "compare", *result_folders(tmp_path, "one"), *settings)
    assert code == 2
    assert "results stand as they were evaluated: leave out --recipe, --limit and A.B=C" in err


@pytest.mark.parametrize(
    ("command", "option", "kind"),
    [
        ("report a", "out", "directory"),
        ("show scenes", "html", "directory"),
        ("draw a", "out", "directory"),
        ("evaluate starter", "out", "file"),
        ("compare a b", "out", "file"),
        ("train scenes", "out", "file"),
        ("pretrain scenes", "out", "file"),
        ("tune photos", "out", "file"),
        ("quickstart", "out", "file"),
        ("prepare scenes", "out", "file"),
    ],
)
def test_output_of_the_wrong_kind_is_refused_at_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str, option: str, kind: str
):
    place = tmp_path / "there.png"
    place.mkdir() if kind == "directory" else place.write_text("mine")
    code, _, err = call(capsys, *command.split(), f"--{option}", str(place))
    assert code == 2
    assert f"'--{option}': " in err
    assert f"'{place}' is a {kind}" in " ".join(err.split())


def test_train_refuses_to_overwrite_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "checkpoints" / "step_000012").mkdir(parents=True)
    code, _, err = call(capsys, "train", "scenes", "--out", str(tmp_path))
    assert code == 2
    assert "already holds a run up to step 12: continue it with --resume, or choose" in err
    assert "choose another folder with --out" in err
    assert not (tmp_path / "recipe.yaml").exists()


def test_resume_names_what_changed(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    from instructblip.experiment.build import compare_with_saved
    from instructblip.recipe.load import load_recipe

    (tmp_path / "recipe.yaml").write_text(load_recipe("scenes").to_yaml())
    compare_with_saved(load_recipe("scenes", ["training.seed=5"]), tmp_path, resume=True)
    assert "resuming with a changed recipe: training.seed: 0 -> 5" in capsys.readouterr().out


def test_status_after_a_kill_is_that_of_the_newest_whole_checkpoint(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    run = tmp_path / "run"
    for step in (5, 10, 15):
        save_checkpoint(run / "checkpoints", step, {"w": torch.zeros(2)}, {}, {})
    (run / "checkpoints/step_000015/progress.json").write_text("{")  # damaged
    for folder in (tmp_path, run):
        (folder / "recipe.yaml").write_text("training: {steps: 20}\n")
    for folder in (run, tmp_path):  # that of `tune` has the run inside
        _, out, _ = call(capsys, "status", str(folder))
        shown = json.loads(out)
        assert (shown["step"], shown["steps"], shown["last"]) == (10, 20, {})
        assert shown["run"] == str(run)
    (run / "metrics.jsonl").write_text('{"step": 12, "validation": {"score": 1.0}}\n{"step": 1')
    assert json.loads(call(capsys, "status", str(run))[1])["step"] == 12
