"""Calibrating a saved model, and what it then knows: from the command line and from Python."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

import instructblip
from instructblip.cli import main as cli
from instructblip.data.custom.folder import read_sides
from instructblip.data.prepared.prepare import prepare
from instructblip.evaluation.calibration import CALIBRATION_FILE, Calibration
from instructblip.experiment.calibrate import calibrate
from instructblip.experiment.tune import calibrate_held, write_recipe
from instructblip.inference.batch import read_requests, write_answers
from instructblip.model.checkpoints.directory import model_directory
from instructblip.recipe.load import load_recipe
from instructblip.release.export import export_model
from instructblip.scenes.official import write_scenes
from tests.testing import write_picture


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("scenes")
    write_scenes(root, scale=0.55, sets=("okvqa", "aokvqa"))
    return root


def overrides(root: Path, *more: str) -> list[str]:
    names = "[scenes_okvqa, scenes_aokvqa]"
    return [
        f"data.root={root}",
        f"evaluation.validation={names}",
        "features.cache=off",
        "evaluation.validation_limit=4",
        "data.sets={okvqa: {}, aokvqa: {}}",
        *more,
    ]


def copied(folder: Path) -> Path:
    """A starter that can be written to."""
    shutil.copytree(model_directory("starter"), folder)
    return folder


@pytest.fixture(scope="module")
def model(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A starter with a calibration, by the command."""
    folder = copied(tmp_path_factory.mktemp("models") / "model")
    run("calibrate", "scenes", str(folder), *overrides(root))
    return folder


def run(*arguments: str) -> None:
    """A command that succeeds."""
    with pytest.raises(SystemExit) as stop:
        cli.main(list(arguments))
    assert stop.value.code == 0


def one_line(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line of an error of a command."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        cli.main(list(arguments))
    assert stop.value.code == 2
    error = capsys.readouterr().err.strip()
    assert "\n" not in error
    return error


def test_a_calibrated_model_knows_how_sure_it_is(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    engine = instructblip.load(model, device="cpu")
    known = engine.calibration
    assert known is not None
    assert known.candidates is not None
    assert known.answers is not None
    assert not known.chose_step  # the four samples that validation scores are left out
    assert sum(known.sets.values()) == 2 * 110 - 8
    image = write_picture(tmp_path / "a.png", (64, 64))
    question = "Question: what colour is it? Short answer:"
    answer = engine.answer(image, question, details=True)
    assert answer.confidence == known.answers.confidence(answer.log_prob)
    names = ["red", "green", "blue"]
    chosen = engine.answer_set(image, question, names, coverage=0.95)
    asked = ["answer", "--image", str(image), "--instruction", question, "--model", str(model)]
    closed = [*asked, "--candidates", "red, green, blue"]
    capsys.readouterr()
    run(*closed, "--coverage", "0.95")
    assert capsys.readouterr().out == f"{' or '.join(chosen)} (95 %)\n"
    run(*closed)
    best = max(engine.rank(image, question, names, details=True), key=lambda c: c.probability)
    assert capsys.readouterr().out == f"{best.text} ({100 * best.probability:.0f} %)\n"
    run(*closed, "--min-confidence", "1")
    assert capsys.readouterr().out.startswith("The model does not know (confidence 0.")
    run(*asked, "--min-confidence", "1")
    expected = f"The model does not know (confidence {answer.confidence:.2f}, below 1.00).\n"
    assert capsys.readouterr().out == expected
    run(*asked, "--details", "--blind", str(write_picture(tmp_path / "b.png", seed=1)))
    text, line = capsys.readouterr().out.strip().split("\n")
    assert text == answer.text
    assert line.startswith(
        f"(confidence {answer.confidence:.2f}, log-probability {answer.log_prob:.2f}, about other"
    )
    assert "from 0 to 1, or auto; got 'x'" in one_line(capsys, *asked, "--min-confidence", "x")
    for coverage in ("0", "1", "90"):
        line = one_line(capsys, *closed, "--coverage", coverage)
        assert f"--coverage must be between 0 and 1, such as 0.9; got {coverage}" in line
    assert "--candidates" in one_line(capsys, *asked, "--coverage", "0.9")


def test_many_answers_have_their_confidences(model: Path, tmp_path: Path) -> None:
    write_picture(tmp_path / "images/a.png", (64, 64))
    engine = instructblip.load(model, device="cpu")
    requests = read_requests(tmp_path / "images", "A short image description.")
    write_answers(engine, requests, tmp_path / "answers.csv", details=True, num_beams=1)
    head, row = (tmp_path / "answers.csv").read_text("utf-8-sig").strip().split("\n")
    assert head == "image,instruction,answer,log_prob,confidence,error"
    known = engine.answer(requests[0].images[0], requests[0].instruction, details=True, num_beams=1)
    assert float(row.split(",")[-2]) == pytest.approx(known.confidence, abs=1e-6)


def test_a_calibration_goes_with_its_model_and_with_no_other(model: Path, tmp_path: Path) -> None:
    known = instructblip.load(model, device="cpu").calibration
    assert known is not None
    export_model(model, tmp_path / "out")
    exported = instructblip.load(tmp_path / "out", device="cpu").calibration
    assert exported is not None
    assert exported.id == known.id
    other = copied(tmp_path / "other")
    settings = other / "generation_config.json"
    settings.write_text(settings.read_text().replace("{", '{"length_penalty": 2.0,', 1))
    shutil.copyfile(model / CALIBRATION_FILE, other / CALIBRATION_FILE)
    with pytest.warns(UserWarning, match="is of other weights or settings and is ignored: run"):
        assert instructblip.load(other, device="cpu").calibration is None
    with pytest.warns(UserWarning, match=r"ignored: run .*calibrate .* --quantize int8` for"):
        assert instructblip.load(model, device="cpu", quantize="int8").calibration is None


def test_samples_that_mean_nothing_are_refused_in_one_line(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = copied(tmp_path / "model")
    command = ["calibrate", "scenes", str(folder), *overrides(root)]
    line = one_line(capsys, *command, "--split", "train")
    assert "split train was trained on (data.sets.okvqa)" in line
    assert "the test split is kept for the final score" in one_line(
        capsys, *command, "--split", "test"
    )
    none = [*command, "evaluation.validation=[]"]
    assert "names no validation: name sets" in one_line(capsys, *none)
    shipped = one_line(capsys, "calibrate", "scenes", "starter", *overrides(root))
    assert "`instructblip export starter DIRECTORY` writes one" in shipped
    few = one_line(capsys, *command, "--limit", "40")
    assert "40 samples are fewer than 100" in few
    assert not (folder / CALIBRATION_FILE).exists()
    image = str(write_picture(tmp_path / "a.png"))
    asked = ["answer", "--image", image, "--instruction", "what?", "--candidates", "red,blue"]
    line = one_line(capsys, *asked, "--coverage", "0.9")
    assert "no calibration of candidates: run `instructblip calibrate MODEL`" in line


def test_tuning_calibrates_with_its_validation(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = prepare("okvqa", root / "okvqa", "val", tmp_path / "prepared")
    shutil.copytree(data.image_root, tmp_path / "folder")
    rows = [
        {
            "file_name": example.images[0],
            "question": example.question,
            "answer": example.answers[0],
            "split": "train" if i < 4 else "val",
        }
        for i, example in enumerate(data)
    ]
    lines = [",".join(rows[0]), *(",".join(row.values()) for row in rows)]
    (tmp_path / "folder/metadata.csv").write_text("\n".join(lines) + "\n")
    run_folder = copied(tmp_path / "run")
    recipe = write_recipe(tmp_path / "folder", str(run_folder), tmp_path / "out", 4, [])
    sides = read_sides(tmp_path / "folder")
    few = replace(sides.validation, examples=sides.validation.examples[:50])
    calibrate_held(recipe, replace(sides, validation=few), "en", run_folder)
    assert "no confidences: answers: not calibrated, 50 samples are" in capsys.readouterr().out
    assert not (run_folder / CALIBRATION_FILE).exists()
    calibrate_held(recipe, sides, "en", run_folder)
    printed = capsys.readouterr().out
    assert f"answers: {len(rows) - 4} samples" in printed
    assert "the same samples chose the step that was kept" in printed
    known = Calibration.load(run_folder)
    assert known is not None
    assert known.chose_step
    assert instructblip.load(run_folder, device="cpu").calibration == known


def test_the_folder_of_tune_is_calibrated_or_the_next_step_is_named(
    model: Path, root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_folder = copied(tmp_path / "out/run")
    write_recipe(tmp_path / "folder", str(run_folder), tmp_path / "out", 4, [])
    (tmp_path / "out/recipe.yaml").rename(run_folder / "recipe.yaml")
    for folder in (tmp_path / "out", run_folder):
        line = one_line(capsys, "calibrate", str(folder))
        assert f"`tune` calibrates {run_folder} on the examples that it holds back" in line
        assert f"`instructblip serve --model {run_folder}`" in line
    shutil.copy(model / CALIBRATION_FILE, run_folder)
    line = one_line(capsys, "calibrate", str(tmp_path / "out"))
    assert f"`tune` calibrated {run_folder}" in line
    assert f"`instructblip serve --model {run_folder}` gives its confidences" in line
    run("calibrate", "scenes", str(tmp_path / "out"), *overrides(root))
    assert capsys.readouterr().out.endswith(f"\n  instructblip serve --model {run_folder}\n")


def test_rows_that_were_trained_on_are_refused_whatever_their_split_is_called(
    tmp_path: Path,
) -> None:
    for i in range(3):
        write_picture(tmp_path / f"data/own/{i}.png", seed=i)
    rows = "".join(
        f'{{"image": "{i}.png", "question": "what?", "answer": "red"}}\n' for i in range(3)
    )
    for split in ("train", "val"):
        (tmp_path / f"data/own/{split}.jsonl").write_text(rows)
    recipe = load_recipe(
        "scenes",
        [
            f"data.root={tmp_path / 'data'}",
            "data.sets={own: {format: table, path: '{split}.jsonl'}}",
            "evaluation.own={kinds: {set: own, split: val, metrics: [exact_match]}}",
            "evaluation.validation=[kinds]",
            "evaluation.benchmarks=[]",
        ],
    )
    with pytest.raises(
        ValueError, match=r"kinds: 3 of 3 rows were trained on, such as .*val.jsonl"
    ):
        calibrate(recipe, str(copied(tmp_path / "model")))
