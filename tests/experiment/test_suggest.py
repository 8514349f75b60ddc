"""Which labels are probably wrong and which images to label next, on a folder of tiny images."""

import csv
import json
from pathlib import Path

import pytest
import torch

from instructblip.cli import main as cli
from instructblip.data.custom.folder import in_folds, read_folder, read_partly
from instructblip.data.reading.records import RUN_FILES
from instructblip.experiment.suggest import choose, suggest
from instructblip.inference.engine import Engine
from instructblip.recipe.load import load_recipe
from tests.testing import write_model, write_picture

QUICK = [
    "data.max_instruction=40",
    "data.max_prompt=60",
    "data.max_response=40",
    "training.steps=2",
    "training.batch_size=2",
    "training.warmup_steps=1",
    "training.save_every=2",
    "training.precision=fp32",
]
CHOICES = ["yes", "no"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"), "instructblip")


def write_folder(root: Path, rows: list[dict], images: int) -> Path:
    for number in range(images):
        write_picture(root / f"{number}.png", seed=number)
    (root / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return root


def contents(root: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def test_planted_errors_come_first(tmp_path: Path, model: Path) -> None:
    """The truth is what the model answers, so the model knows it."""
    root = write_folder(tmp_path / "set", [], 12)
    engine, rows = Engine.from_pretrained(model), []
    for number in range(12):
        asked = f"Question: is {number} red? Options: yes, no. Short answer:"
        scores = engine.rank(root / f"{number}.png", asked, CHOICES)
        truth = CHOICES[scores.index(max(scores))]
        wrong = number in (3, 7, 8)
        answer = CHOICES[1 - CHOICES.index(truth)] if wrong else truth
        row = {"file_name": f"{number}.png", "question": f"is {number} red?", "answer": answer}
        rows.append(row | {"choices": CHOICES})
    (root / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    before = contents(root)
    lists = suggest(root, str(model), tmp_path / "out")
    assert lists is not None
    assert len(lists.wrong) == 12
    assert not lists.wanted
    assert {each.example.images[0] for each in lists.wrong[:3]} == {"3.png", "7.png", "8.png"}
    first = lists.wrong[0]
    assert f"the model answers {first.answer!r}" in first.reason
    assert f"the label says {first.label!r}" in first.reason
    assert first.answer != first.label
    assert "75%" in lists.notes[0]
    assert any("Every image has a label" in note for note in lists.notes)
    assert contents(root) == before


def test_unlabelled_are_empty_rows_and_images_that_no_row_names(
    tmp_path: Path, model: Path
) -> None:
    rows = [
        {"file_name": "0.png", "question": "what is it?", "answer": "a cup"},
        {"file_name": "1.png", "question": "what is it?", "answer": "a pot"},
        {"file_name": "2.png", "question": "which color?", "answer": ""},
    ]
    root = write_folder(tmp_path / "set", rows, 4)
    write_picture(root / "tuned/run/curves.png")
    for name in RUN_FILES:  # of a run, whose images are not of the set
        (root / "tuned/run" / name).touch()
    labelled, unlabelled = read_partly(root)
    assert [e.images for e in labelled] == [("0.png",), ("1.png",)]
    asked = {e.images[0]: e.question for e in unlabelled}
    assert asked == {"2.png": "which color?", "3.png": "what is it?"}
    lists = suggest(root, str(model), tmp_path / "out", limit=1)
    assert lists is not None
    assert len(lists.wanted) == len(lists.wrong) == 1


def test_a_folder_without_any_label(tmp_path: Path, model: Path) -> None:
    for number in range(3):
        write_picture(tmp_path / "set" / f"{number}.png", seed=number)
    lists = suggest(tmp_path / "set", str(model), tmp_path / "out")
    assert lists is not None
    assert not lists.wrong
    assert len(lists.wanted) == 3
    assert any("No row has a label" in note for note in lists.notes)


def test_duplicates_are_not_all_chosen() -> None:
    """Nine equal examples are the most uncertain; after one of them the different ones follow, and
    what is labelled already comes last."""
    torch.manual_seed(0)
    others = torch.randn(4, 8)
    same, known = torch.randn(1, 8), torch.randn(1, 8)
    embeddings = torch.cat([same.expand(9, -1), others, known])
    uncertainty = torch.tensor([0.9] * 9 + [0.5] * 4 + [1.0])
    chosen = choose(uncertainty, embeddings, known, 5)
    assert chosen[0] < 9
    assert sorted(chosen[1:]) == [9, 10, 11, 12]
    assert choose(uncertainty, embeddings, known, 99)[5:] != []
    assert len(set(choose(uncertainty, embeddings, known, 99))) == 14


def test_of_equal_distances_the_uncertain_is_chosen() -> None:
    embeddings = torch.eye(4)
    assert choose(torch.tensor([0.1, 0.9, 0.3, 0.5]), embeddings, embeddings[:0], 2)[0] == 1


def test_every_label_is_read_by_a_model_that_did_not_train_on_it(
    tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"file_name": f"{i}.png", "question": "what?", "answer": f"cup {i}"} for i in range(6)]
    rows.append({"file_name": "0.png", "question": "where?", "answer": "here"})
    root = write_folder(tmp_path / "set", rows, 8)
    parts = in_folds(read_folder(root), 3)
    for others, part in parts:
        assert {e.images for e in others}.isdisjoint({e.images for e in part})
        assert len(others) + len(part) == 7
    assert sorted(e.id for _, part in parts for e in part) == sorted(
        e.id for e in read_folder(root)
    )
    lists = suggest(root, str(model), tmp_path / "out", folds=2, overrides=QUICK)
    assert lists is not None
    assert len(lists.wrong) == 7
    assert len(lists.wanted) == 2
    assert "fold 2 of 2" in (printed := capsys.readouterr().out)
    assert "minutes left" in printed
    assert not any(path.is_dir() for path in (tmp_path / "out").iterdir())


@pytest.mark.parametrize("form", ["csv", "jsonl"])
def test_rows_that_tune_reads_once_they_are_corrected(
    form: str, tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows: list[dict] = [
        {"file_name": "0.png", "question": "is it red?", "answer": "no", "choices": CHOICES},
        {"file_name": "1.png", "question": "what is 1 + 1?", "answer": "=1+1"},
        {"file_name": ["1.png", "2.png"], "instruction": "Compare them.", "answer": "They differ."},
        {"file_name": "2.png", "caption": "a cup on a table"},
    ]
    root = write_folder(tmp_path / "set", rows, 4)
    out = tmp_path / "out"
    with pytest.raises(SystemExit, match="0"):
        cli.main(["suggest", str(root), "--model", str(model), "--form", form, "--out", str(out)])
    printed = capsys.readouterr().out
    with pytest.raises(SystemExit, match="2"):  # the rows may be corrected by now
        cli.main(["suggest", str(root), "--model", str(model), "--form", form, "--out", str(out)])
    assert "may have your corrections: give another --out" in capsys.readouterr().err
    assert "Probably wrong:" in printed
    assert "To label next:" in printed
    page = (out / "page.html").read_text("utf-8")
    assert page.count("<img") == 6
    assert "is it red?" in page
    if form == "csv":
        with (out / "wrong.csv").open(encoding="utf-8-sig", newline="") as file:
            answers = [row["answer"] for row in csv.DictReader(file)]
        assert "'=1+1" in answers  # a spreadsheet program does not run it
        text = (out / "wrong.csv").read_text("utf-8-sig").replace("'=1+1", "2")
    else:
        text = (out / "wrong.jsonl").read_text("utf-8").replace('"answer": "=1+1"', '"answer": "2"')
    (root / "metadata.jsonl").unlink()
    (root / f"metadata.{form}").write_text(text, "utf-8")
    read = {(e.images, e.task, e.question, e.answers, e.choices) for e in read_folder(root)}
    assert read == {
        (("0.png",), "multiple_choice", "is it red?", ("no",), ("yes", "no")),
        (("1.png",), "vqa", "what is 1 + 1?", ("2",), ()),
        (("1.png", "2.png"), "instruct", "Compare them.", ("They differ.",), ()),
        (("2.png",), "caption", "", ("a cup on a table",), ()),
    }


def test_what_cannot_be_suggested(tmp_path: Path, model: Path) -> None:
    rows = [{"file_name": f"{i}.png", "question": "what?", "answer": "cup"} for i in range(5)]
    root, out = write_folder(tmp_path / "set", rows, 5), tmp_path / "out"
    with pytest.raises(ValueError, match=r"5 labelled images .* --folds 3 needs at least 6"):
        suggest(root, str(model), out, folds=3)
    with pytest.raises(ValueError, match=r"training\.steps=9 is a setting of the tuning: add"):
        suggest(root, str(model), out, overrides=["training.steps=9"])
    with pytest.raises(FileNotFoundError, match="is not a directory"):
        suggest(root, str(tmp_path / "none"), out)
    with pytest.raises(FileNotFoundError, match="expected a folder of images"):
        suggest(tmp_path / "nothing", str(model), out)
    (root / "4.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match="1 of 5 examples are bad"):
        suggest(root, str(model), out)


def test_a_model_that_knows_the_labels_is_refused(tmp_path: Path) -> None:
    rows = [{"file_name": f"{i}.png", "question": "what?", "answer": "cup"} for i in range(5)]
    root = write_folder(tmp_path / "set", rows, 5)
    model = write_model(tmp_path / "model", "instructblip")
    entry = "data.sets={own: {format: imagefolder, root: .}}"
    recipe = load_recipe("scenes", [f"data.root={root}", entry])
    (model / "recipe.yaml").write_text(recipe.to_yaml())
    with pytest.raises(ValueError, match=r"it knows these labels.*--folds 3.*tunes starter"):
        suggest(root, str(model), tmp_path / "out")


def test_captions_are_ordered_by_the_loss_per_token(tmp_path: Path, model: Path) -> None:
    rows = [
        {"file_name": "0.png", "caption": "a cup"},
        {"file_name": "1.png", "caption": "a cup " * 8},
    ]
    root = write_folder(tmp_path / "set", rows, 2)
    engine = Engine.from_pretrained(model)
    means = {
        f"{i}.png": engine.rank(
            root / f"{i}.png", "A short image description.", [rows[i]["caption"].strip()], "mean"
        )[0]
        for i in range(2)
    }
    lists = suggest(root, str(model), tmp_path / "out")
    assert lists is not None
    losses = {each.example.images[0]: -each.loss for each in lists.wrong}
    assert losses == pytest.approx(means, abs=1e-4)
    assert any("the loss per token" in note for note in lists.notes)
