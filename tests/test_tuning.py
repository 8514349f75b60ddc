"""A folder of one's own: read, split, tuned and reported; and the worked examples."""

import importlib
import json
from pathlib import Path

import pytest
import torch

from instructblip import cli, stages
from instructblip.data.folder import read_folder, split_by_picture
from instructblip.recipe import load_recipe
from instructblip.tuning import MEASURES, measures_of, write_recipe
from tests.data.tiny import write_picture
from tests.serving.test_engine import write_model

EXAMPLES = ("worksheet_helper", "instrument_panel", "game_narrator")


def write_folder(root: Path, rows: list[dict], pictures: int = 5) -> Path:
    for number in range(pictures):
        write_picture(root / f"{number}.png", seed=number)
    (root / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return root


def test_rows_become_examples(tmp_path: Path) -> None:
    rows: list[dict] = [
        {"file_name": "0.png", "caption": "a cat"},
        {"file_name": "1.png", "question": "what?", "answer": ["a", "b"]},
        {"file_name": "2.png", "question": "which?", "answer": "red", "choices": ["red", "blue"]},
        {"file_name": ["0.png", "1.png"], "instruction": "Tell.", "answer": "cats"},
    ]
    folder = read_folder(write_folder(tmp_path, rows))
    assert [e.task for e in folder.examples] == ["caption", "vqa", "multiple_choice", "instruct"]
    assert folder[1].answers == ("a", "b")
    assert folder[3].images == ("0.png", "1.png")
    assert {e.task for e in folder.examples} == set(MEASURES)
    assert [b.name for b, _ in measures_of(folder)] == [f"own_{task}" for task in MEASURES]
    (tmp_path / "metadata.jsonl").unlink()
    (tmp_path / "metadata.csv").write_text(
        "file_name,question,answer,choices\n0.png,which?,red,red|blue\n1.png,what?,cat,\n"
    )
    from_csv = read_folder(tmp_path)
    assert from_csv[0].choices == ("red", "blue")
    assert from_csv[1].task == "vqa"
    (tmp_path / "metadata.csv").unlink()
    (tmp_path / "0.txt").write_text("a cat\n\nanother\n")
    with pytest.raises(ValueError, match=r"4 of 5 examples are bad:\n  1\.png: no caption"):
        read_folder(tmp_path)
    for number in range(1, 5):
        (tmp_path / f"{number}.png").unlink()
    assert read_folder(tmp_path)[0].answers == ("a cat", "another")


def test_everything_wrong_is_listed_at_once(tmp_path: Path) -> None:
    rows: list[dict] = [
        {"file_name": "0.png"},
        {"file_name": "../0.png", "caption": "a"},
        {"file_name": "absent.png", "caption": "a"},
        {"caption": "a"},
        {"file_name": "0.png", "question": "?", "answer": "x", "choices": ["a", "b"]},
        {"file_name": "bad.png", "caption": "a"},
        {"file_name": "0.png", "caption": "good"},
    ]
    root = write_folder(tmp_path, rows)
    (root / "bad.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match="6 of 7 examples are bad") as error:
        read_folder(root)
    for number in range(1, 7):
        assert f"line {number}: " in str(error.value)
    (root / "metadata.jsonl").write_text("{")
    with pytest.raises(ValueError, match="line 1: is not JSON"):
        read_folder(root)
    with pytest.raises(ValueError, match="holds no metadata"):
        read_folder(write_picture(tmp_path / "empty" / "a.png").parent)
    with pytest.raises(FileNotFoundError, match="expected a folder"):
        read_folder(tmp_path / "absent")


def test_a_picture_is_on_one_side_only(tmp_path: Path) -> None:
    rows = [
        {"file_name": f"{n}.png", "question": q, "answer": "x"}
        for n in range(10)
        for q in ("a?", "b?")
    ]
    folder = read_folder(write_folder(tmp_path, rows, pictures=10))
    training, held = split_by_picture(folder)
    assert (len(training), len(held)) == (16, 4)
    assert not {e.images for e in training.examples} & {e.images for e in held.examples}
    assert {e.split for e in held.examples} == {"val"}
    few = type(folder)(folder.examples[:6], folder.image_root)
    with pytest.raises(ValueError, match="3 pictures; expected at least 4"):
        split_by_picture(few)


@pytest.mark.parametrize("name", EXAMPLES)
def test_worked_examples(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Drawn, tuned for two steps and reported through the command, on a tiny random BLIP-2."""
    torch.set_num_threads(1)
    file = Path(__file__).parents[1] / "examples" / f"{name}.py"
    assert len(file.read_text().splitlines()) <= 40
    importlib.import_module(f"examples.{name}").draw(tmp_path / "pictures", count=10)
    start = write_model(tmp_path / "blip2", "blip2")
    short = ["training.steps=2", "training.validate_every=2", "model.text_branch=random"]
    arguments = ["tune", str(tmp_path / "pictures"), *short, "training.batch_size=2"]
    out = tmp_path / "tuned"
    with pytest.raises(SystemExit) as stop:
        cli.main([*arguments, "--model", str(start), "--out", str(out), "--debug"])
    assert not stop.value.code
    said = capsys.readouterr().out
    assert "2 held back" in said or "4 held back" in said
    assert "instructblip serve --model" in said
    assert "<html" in (out / "report.html").read_text()
    for side in ("before", "after"):
        assert list((out / "results" / side).glob("own_*/result.json"))


def test_the_recipe_that_tune_writes_trains(tmp_path: Path) -> None:
    """Hugging Face's layout: metadata.csv beside images/."""
    for number in range(5):
        write_picture(tmp_path / "own" / "images" / f"{number}.png", seed=number)
    rows = [f"images/{number}.png,a cup" for number in range(5)]
    (tmp_path / "own" / "metadata.csv").write_text("\n".join(["file_name,text", *rows]))
    start = write_model(tmp_path / "blip2", "blip2")
    short = ["training.steps=2", "model.text_branch=random", "training.batch_size=2"]
    write_recipe(tmp_path / "own", str(start), tmp_path / "own" / "tuned", 4, short)
    recipe = load_recipe(tmp_path / "own" / "tuned" / "recipe.yaml")
    assert stages.check(recipe)
    for run in ("first", "second"):
        assert stages.train(recipe, tmp_path / run).step == 2
