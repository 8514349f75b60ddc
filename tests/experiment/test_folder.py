"""A folder is checked, and wrong arguments are refused, before it is read and torch is imported."""

import itertools
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from instructblip.cli import main as cli
from instructblip.data.custom.folder import read_sides
from instructblip.data.prepared.prepare import prepare_all
from instructblip.experiment import folder as module
from instructblip.experiment.datasets import jobs_of
from instructblip.experiment.folder import check_folder, read_to_tune
from instructblip.recipe.load import load_recipe
from tests.testing import write_picture


def labelled(root: Path, answers: list[str]) -> Path:
    for number in range(len(answers)):
        write_picture(root / f"{number}.png", seed=number)
    rows = [f"{number}.png,which?,{answer}" for number, answer in enumerate(answers)]
    (root / "metadata.csv").write_text("\n".join(["file_name,question,answer", *rows]))
    return root


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"overrides": ["training.stpes=3"]}, r"^training\.stpes=3: .*did you mean steps\?$"),
        ({"overrides": ["training.steps=many"]}, r"training\.steps.*'many'"),
        ({"overrides": ["evaluation.own.x={set: own, metrics: [wer]}"]}, r"evaluation\.own\.x"),
        ({"overrides": ["evaluation.own.x={set: mine, metrics: [accuracy]}"]}, "no entry 'mine'"),
        ({"start": "nowhere"}, "nowhere is not a directory"),
        ({}, "already holds a run up to step 3"),
    ],
)
def test_wrong_arguments_are_refused_before_the_folder_is_read(
    arguments: dict, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(module, "read_sides", lambda *_: pytest.fail("the folder was read"))
    out = tmp_path / "out"
    if not arguments:
        (out / "run/checkpoints/step_000003").mkdir(parents=True)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        read_to_tune(**{"root": tmp_path, "start": "starter", "out": out, **arguments})


def test_settings_that_the_chosen_ones_fit_are_not_refused(tmp_path: Path):
    root = labelled(tmp_path, ["red", "blue"] * 4)
    overrides = ["training.accumulate=7", "training.learning_rate=1e-9", "data.workers=0"]
    assert read_to_tune(root, "starter", tmp_path / "out", overrides[:2]).training
    with pytest.raises(ValueError, match=r"unknown key data\.workers"):
        read_to_tune(root, "starter", tmp_path / "out", overrides)


def test_a_bad_row_is_reported_without_torch(tmp_path: Path):
    root = labelled(tmp_path, ["red", "blue"] * 4)
    (root / "3.png").unlink()
    code = (
        "import sys; from instructblip.cli.main import main\n"
        "try: main(sys.argv[1:])\n"
        "finally: print([m for m in ('torch', 'transformers') if m in sys.modules])"
    )
    for command, status in (["tune", "--out", str(tmp_path / "out")], 2), (["check"], 1):
        words = [sys.executable, "-c", code, command[0], str(root), *command[1:]]
        ran = subprocess.run(words, capture_output=True, text=True)
        assert ran.returncode == status
        assert "line 5: image" in ran.stdout + ran.stderr
        assert ran.stdout.splitlines()[-1] == "[]"


def test_check_of_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    root = labelled(tmp_path / "mine", ["red"] * 20 + ["rde"])
    with pytest.raises(SystemExit) as stopped:
        cli.main(["check", str(root)])
    assert stopped.value.code == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"ok      {root}: 21 examples: {{'vqa': 21}}; ")
    assert lines[1].startswith("1 answer looks like a misspelling: 'rde' (metadata.csv:line 22)")
    (root / "0.png").write_text("no image")
    with pytest.raises(SystemExit) as stopped:
        cli.main(["check", str(root)])
    assert stopped.value.code == 1
    assert capsys.readouterr().out.startswith(f"FAILED  {root}: 1 of 21 examples are bad:")
    with pytest.raises(SystemExit) as stopped:
        cli.main(["check", str(root), "training.stpes=3"])
    assert stopped.value.code == 2
    assert "did you mean steps?" in capsys.readouterr().err


def in_folders(root: Path, counts: dict[str, int]) -> Path:
    seeds = itertools.count()
    for name, count in counts.items():
        (root / name).mkdir(parents=True, exist_ok=True)
        for number in range(count):
            write_picture(root / name / f"{number}.png", seed=next(seeds))
    return root


def test_folders_are_labels(tmp_path: Path):
    root = in_folders(tmp_path, {"red_light": 6, "green-light/day": 5, "none": 0, ".hidden": 1})
    counts = "green-light 5, red_light 6; without an image, skipped: none"
    with warnings.catch_warnings(record=True) as stated:
        warnings.simplefilter("always")
        text = check_folder(root)
        sides = read_sides(root, "images")
    assert {str(one.message) for one in stated} == {f"{root}: folders are read as labels: {counts}"}
    assert text.startswith("11 examples: {'vqa': 11}; ")
    rows = [*sides.training, *sides.validation]
    asked = {(row.images[0].split("/")[0], row.question, *row.answers) for row in rows}
    assert asked == {
        ("red_light", "What is in this image?", "red light"),
        ("green-light", "What is in this image?", "green light"),
    }
    recipe = {"data.root": root, "data.sets": "{own: {format: imagefolder, root: .}}"}
    trained = load_recipe("scenes", [f"{key}={value}" for key, value in recipe.items()])
    assert len(prepare_all(jobs_of(trained, ["own"]))[0]) == 11


def test_folders_of_splits_have_folders_of_labels(tmp_path: Path):
    folders = {"train/猫": 3, "train/狗": 2, "valid/猫": 1, "test/狗": 1, "test/猫": 1}
    with pytest.warns(UserWarning, match="folders are read as labels"):
        sides = read_sides(in_folders(tmp_path, folders))
    assert (len(sides.training), len(sides.validation), len(sides.final)) == (5, 1, 2)
    assert sides.by == "files"
    assert {(row.question, *row.answers) for row in sides.training} == {
        ("这张图片里是什么？", "猫"),
        ("这张图片里是什么？", "狗"),
    }
    assert [row.answers for row in sides.validation] == [("猫",)]


def test_folders_that_are_no_labels(tmp_path: Path):
    beside = in_folders(tmp_path / "beside", {"cats": 2, "dogs": 2, ".": 1})
    with pytest.raises(ValueError, match=r"beside them are 1 images, such as 0\.png: move each"):
        read_sides(beside)
    for name, text in ("0.txt", "a cat"), ("metadata.csv", "file_name,caption\n0.png,a cat"):
        root = in_folders(tmp_path / name, {"cats": 1, "dogs": 1})
        (root / "cats" / name).write_text(text)
        with pytest.raises(ValueError, match=r"dogs/0\.png: no caption|1 images; expected"):
            read_sides(root)
