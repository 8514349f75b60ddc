"""A folder of custom data: read, split, tuned and reported; and the worked examples."""

import html
import importlib
import json
import math
import os
import re
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from instructblip.cli import main as cli
from instructblip.cli.data import check
from instructblip.data.custom.folder import FolderSet, read_folder, read_sides, split_by_image
from instructblip.evaluation.result import Result
from instructblip.experiment import folder as folder_module
from instructblip.experiment.evaluate import load_engine
from instructblip.experiment.folder import describe
from instructblip.experiment.sayable import LEAST_KNOWN, Sayable, sayable
from instructblip.experiment.train import train
from instructblip.experiment.tune import (
    MEASURES,
    held_sets,
    tune,
    write_recipe,
)
from instructblip.recipe.load import load_recipe
from instructblip.studio.runs import _results
from instructblip.training import train as loop
from tests.parity.tiny import tiny_config
from tests.testing import write_json, write_model, write_picture

EXAMPLES = ("worksheet_helper", "instrument_panel", "game_narrator")


def write_folder(root: Path, rows: list[dict], images: int = 5) -> Path:
    for number in range(images):
        write_picture(root / f"{number}.png", seed=number)
    (root / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return root


def test_the_language_of_captions_is_that_of_the_recipe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    asked: list[tuple[object, ...]] = []

    def note(*arguments: object) -> None:
        asked.append(arguments)
        raise ValueError("noted")

    monkeypatch.setattr(folder_module, "read_sides", note)
    for overrides in ([], ["data.sets.own.language=en", "data.sets.own.language=zh"]):
        with pytest.raises(ValueError, match="noted"):
            tune(tmp_path, "starter", tmp_path / "out", overrides)
    assert asked == [(tmp_path, None, None, "en"), (tmp_path, None, None, "zh")]


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
    assert [held.benchmark.name for held in held_sets(folder, load_recipe("scenes"))] == [
        f"own_{task}" for task in MEASURES
    ]
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


def test_captions_beside_a_table_of_another_folder(tmp_path: Path) -> None:
    write_folder(tmp_path / "sub", [{"file_name": "0.png", "caption": "a cat"}], images=1)
    for suffix in (".png", ".tif", ".avif"):
        write_picture(tmp_path / f"a{suffix}")
        (tmp_path / f"a{suffix}").rename(tmp_path / f"{suffix[1:]}{suffix}")
        (tmp_path / f"{suffix[1:]}.txt").write_text(f"a dog in {suffix}\n")
    captions = {e.images[0]: e.answers[0] for e in read_folder(tmp_path).examples}
    assert captions.pop("sub/0.png") == "a cat"
    assert captions == {f"{s}.{s}": f"a dog in .{s}" for s in ("png", "tif", "avif")}


def test_a_row_whose_question_has_another_heading(tmp_path: Path) -> None:
    rows: list[dict] = [{"file_name": "0.png", "ask": "what is it?", "answer": "yes"}]
    with pytest.raises(ValueError, match=r"line 1: 'answer' would be learnt .* column 'ask'"):
        read_folder(write_folder(tmp_path, rows))


def test_a_table_without_answers_is_named_with_its_columns(tmp_path: Path) -> None:
    write_picture(tmp_path / "0.png")
    for name in ("metadata.csv", "Metadata.CSV"):
        (tmp_path / name).write_text("file_name,kind\n0.png,cat\n")
        with pytest.raises(ValueError, match=rf"{name}: no row .* `caption`.*'file_name', 'kind'"):
            read_folder(tmp_path)
        (tmp_path / name).write_text("file_name,caption\n")
        with pytest.raises(ValueError, match=rf"{name}: no row"):
            read_folder(tmp_path)
        (tmp_path / name).unlink()
    (tmp_path / "0.TXT").write_text("a cat")
    assert read_folder(tmp_path)[0].answers == ("a cat",)


def test_placeholders_are_not_captions(tmp_path: Path) -> None:
    texts = ["nan", "TODO", "NULL", "None", "#REF!", "#N/A", "n/a", "#NAME?"]
    rows: list[dict] = [{"file_name": "0.png", "caption": text} for text in texts]
    rows += [
        {"file_name": "1.png", "question": "{question}", "answer": "red"},
        {"file_name": "1.png", "question": "who?", "answer": "none"},
        {"file_name": "1.png", "caption": "none of them"},
        {"file_name": "1.png", "caption": ["nan", "a cat"]},
    ]
    with pytest.raises(ValueError, match="9 of 12 examples are bad") as error:
        read_folder(write_folder(tmp_path, rows))
    assert "line 2: the answer is 'TODO', a placeholder" in str(error.value)
    assert "line 9: the question is '{question}', a placeholder" in str(error.value)


def test_all_bad_rows_are_listed_at_once(tmp_path: Path) -> None:
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
    (root / "bad.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match="6 of 7 examples are bad") as error:
        read_folder(root)
    for number in range(1, 7):
        assert f"line {number}: " in str(error.value)
    many = [{"file_name": "absent.png", "caption": "a"}] * 23
    write_folder(tmp_path, many)
    with pytest.raises(ValueError, match=r"(?s)23 of 23 .*line 20: .*\n  and 3 more$") as error:
        read_folder(root)
    assert "line 21" not in str(error.value)
    (root / "metadata.jsonl").write_text("{")
    with pytest.raises(ValueError, match="line 1: is not JSON"):
        read_folder(root)
    with pytest.raises(ValueError, match="holds no table of its images"):
        read_folder(write_picture(tmp_path / "empty" / "a.png").parent)
    (tmp_path / "classes" / "red light").mkdir(parents=True)
    write_picture(tmp_path / "classes" / "red light" / "a.png")
    with pytest.raises(ValueError, match=r"one, 'red light'\. If .* give .*/classes/red light$"):
        read_folder(tmp_path / "classes")
    with pytest.raises(FileNotFoundError, match="expected a folder"):
        read_folder(tmp_path / "absent")


def test_the_near_name_of_an_image_that_is_not_there_is_named_and_not_read(tmp_path: Path) -> None:
    names = ["0.jpg", "other.PNG", "absent.png", "sub/0.png"]
    rows = [{"file_name": name, "caption": "a"} for name in names]
    write_folder(tmp_path, rows, images=1)
    write_picture(tmp_path / "Other.png")
    with pytest.raises(ValueError, match="4 of 4 examples are bad") as error:
        read_folder(tmp_path)
    ends = [line.rpartition("; ")[2] for line in str(error.value).splitlines()[1:]]
    assert ends[:2] == ["did you mean 0.png?", "did you mean Other.png?"]
    assert not any("did you mean" in end for end in ends[2:])


def test_an_answer_that_looks_misspelled_is_named_with_its_row(tmp_path: Path) -> None:
    rows = [{"file_name": f"{n}.png", "question": "?", "answer": "green"} for n in range(30)]
    rows[7]["answer"] = "gren"
    text = describe(read_sides(write_folder(tmp_path, rows, images=30)))
    line = "1 answer looks like a misspelling: 'gren' (metadata.jsonl:line 8), 29 times 'green'"
    assert line in text.splitlines()


def test_lines_without_json_and_rows_without_a_split_are_listed_too(tmp_path: Path) -> None:
    row = '{"file_name": "0.png", "caption": "a", "split": "%s"}'
    lines = [row % "train", "{", row % "fold3", '{"file_name": "0.png", "caption": "a"}', "[1]"]
    lines += [row.replace("0.png", "absent.png") % "test", row % "test"]
    root = write_folder(tmp_path, [])
    (root / "metadata.jsonl").write_text("\n".join(lines))
    with pytest.raises(ValueError, match=r"^5 of 7 examples are bad") as error:
        read_sides(root)
    reasons = ["2: is not JSON", "3: field 'split' is 'fold3'", "4: field 'split' is missing"]
    for reason in [*reasons, "5: is [1]; expected an object", "6: "]:
        assert str(error.value).count(f"line {reason}") == 1
    assert "owner's original" not in str(error.value)


def test_rows_with_a_wrong_number_of_columns_are_listed_too(tmp_path: Path) -> None:
    root = write_folder(tmp_path, [])
    (root / "metadata.jsonl").unlink()
    rows = ["file_name,caption", "0.png,a cat, a dog", "1.png,a cat", "2.png", "absent.png,a cat"]
    (root / "metadata.csv").write_text("\n".join(rows))
    with pytest.raises(ValueError, match=r"^3 of 4 examples are bad") as error:
        read_folder(root)
    for line in (2, 4):
        assert f"line {line}: has more or fewer columns than the header (2)" in str(error.value)
    assert "line 5: image" in str(error.value)


def sides(root: Path) -> tuple[set[str], set[str]]:
    """The images of the two sides."""
    training, held = split_by_image(read_folder(root))
    assert {e.split for e in held.examples} == {"val"}
    assert len(training) > 0
    assert len(held) > 0
    first, second = ({n for e in side.examples for n in e.images} for side in (training, held))
    return first, second


def test_an_image_is_on_one_side_only(tmp_path: Path) -> None:
    rows: list[dict] = [
        {"file_name": f"{n}.png", "question": q, "answer": "x"}
        for n in range(60)
        for q in ("a?", "b?")
    ]
    folder = read_folder(write_folder(tmp_path, rows, images=60))
    training, held = sides(tmp_path)
    assert 6 <= len(held) <= 18
    assert not training & held
    few = type(folder)(folder.examples[:6], folder.image_root)
    with pytest.raises(ValueError, match="3 images; expected at least 4"):
        split_by_image(few)
    tied = [{"file_name": [f"{n}.png", "0.png"], "caption": "x"} for n in range(5)]
    write_folder(tmp_path, tied)
    with pytest.raises(ValueError, match="shared images or groups connect all rows"):
        sides(tmp_path)
    write_folder(tmp_path, [*tied[:4], {"file_name": "4.png", "caption": "x"}])
    assert sorted(map(len, sides(tmp_path))) == [1, 4]


def test_rows_that_share_an_image_stay_together(tmp_path: Path) -> None:
    rows: list[dict] = [{"file_name": f"{n}.png", "caption": "x"} for n in range(40)]
    rows += [{"file_name": [f"{n}.png", f"{n + 1}.png"], "caption": "y"} for n in range(0, 20, 2)]
    rows += [{"file_name": f"copy{n}.png", "caption": "z"} for n in range(40)]
    for n in range(40):
        write_picture(tmp_path / f"copy{n}.png", seed=n)
    write_folder(tmp_path, rows, images=40)
    training, held = sides(tmp_path)
    assert not training & held
    for side in (training, held):
        assert {f"copy{name}" for name in side if name[0] != "c"} <= side
    assert all((f"{n}.png" in held) == (f"{n + 1}.png" in held) for n in range(0, 20, 2))


def test_more_images_move_no_others(tmp_path: Path) -> None:
    rows: list[dict] = [{"file_name": f"{n}.png", "caption": "x"} for n in range(60)]
    before: tuple[set[str], set[str]] = (set(), set())
    for count in range(20, 61, 10):
        write_folder(tmp_path, rows[:count], images=count)
        after = sides(tmp_path)
        assert before[0] <= after[0]
        assert before[1] <= after[1]
        before = after


def split_folder(tmp_path: Path, **columns: list[Any]) -> Path:
    """Four images with a row each."""
    cells = [
        dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)
    ]
    rows = [{"file_name": f"{n}.png", "caption": "x", **each} for n, each in enumerate(cells)]
    return write_folder(tmp_path, rows, images=len(rows))


def names(side: FolderSet | None) -> list[str]:
    return [name for e in side.examples for name in e.images] if side else []


def test_a_column_splits_the_folder(tmp_path: Path) -> None:
    root = split_folder(tmp_path, split=["train", "test", "train", "dev"], site=[*"abac"])
    split = read_sides(root)
    assert split.by == "column"
    sides = (split.training, split.validation, split.test)
    assert list(map(names, sides)) == [["0.png", "2.png"], ["3.png"], ["1.png"]]
    assert read_sides(root, "column", group="site").final is not None
    assert read_sides(root, "images").by == "images"
    assert len(read_sides(root, "images").training) == 3
    with pytest.raises(ValueError, match="--split files needs folders or tables named train"):
        read_sides(root, "files")
    split_folder(tmp_path, split=["train", "test", "train", "train"], site=[*"abab"])
    assert names(read_sides(root).validation) == ["1.png"]
    with pytest.raises(ValueError, match="1 groups are on two sides of the split: b; move each"):
        read_sides(root, group="site")
    split_folder(tmp_path, split=["train"] * 4)
    with pytest.raises(ValueError, match="the split has train 4, val 0, test 0; expected train"):
        read_sides(root)


def test_folders_split(tmp_path: Path) -> None:
    for name in ("train", "valid"):
        write_folder(tmp_path / name, [{"file_name": "0.png", "caption": name}], images=1)
    split = read_sides(tmp_path)
    assert (split.by, names(split.training), names(split.validation), split.test) == (
        "files",
        ["train/0.png"],
        ["valid/0.png"],
        None,
    )
    assert split.lookalikes == [("train/0.png", "valid/0.png")]
    with pytest.raises(ValueError, match="--split column needs a column `split`"):
        read_sides(tmp_path, "column")


def test_a_group_is_on_one_side(tmp_path: Path) -> None:
    patients = [n // 4 for n in range(60)]
    root = split_folder(tmp_path, patient=patients)
    split = read_sides(root, group="patient")
    training, held = (
        {patients[int(name.removesuffix(".png"))] for name in names(side)}
        for side in (split.training, split.validation)
    )
    assert not training & held
    assert training | held == {*range(15)}
    split_folder(tmp_path, patient=[1, 2, 3, 4])
    with pytest.raises(ValueError, match=r"^own: 4 rows have no column 'doctor'[^\n]*'patient'"):
        read_sides(root, group="doctor")
    rows = [{"file_name": name, "caption": "x"} for name in ("0.png", "../1.png", "2.png")]
    write_folder(tmp_path, rows)
    with pytest.raises(ValueError, match=r"line 2: image name[^\n]*\n  own: 2 rows have no col"):
        read_sides(root, group="doctor")
    with pytest.raises(ValueError, match="shared images or groups connect all rows"):
        read_sides(split_folder(tmp_path, patient=[1, 1, 1, 1]), group="patient")


def test_lookalikes_of_a_grouped_folder_do_not_ask_for_a_group(tmp_path: Path) -> None:
    root = split_folder(tmp_path, patient=[n // 4 for n in range(60)])
    split = read_sides(root, group="patient")
    trained, held = names(split.training)[0], names(split.validation)[0]
    Image.open(root / trained).save(root / held, compress_level=1)
    split = read_sides(root, group="patient")
    assert split.lookalikes == [(trained, held)]
    text = describe(split, group="patient")
    assert "look like one that is trained on: 1" in text
    assert "a hash of each group (patient)" in text
    assert "--group" not in text


def test_lookalikes_of_each_side_are_counted_apart(tmp_path: Path) -> None:
    splits = ["train", "test", "train", "dev", "dev", "test"]
    root = split_folder(tmp_path, split=splits)
    for copy, original in ((1, 0), (3, 0), (4, 2)):
        Image.open(root / f"{original}.png").save(root / f"{copy}.png", compress_level=1)
    text = describe(read_sides(root))
    assert "held-back pictures that look like one that is trained on: 1 of 2, such as 1.png" in text
    assert "choose the best step, and that look like one that is trained on: 2 of 2" in text


def test_the_report_repeats_what_may_make_its_scores_too_high(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root, out = tmp_path / "clinic", tmp_path / "out"
    rows = [
        {"file_name": f"{n}.png", "text": "a cat", "patient_id": f"p{n // 2}"} for n in range(8)
    ]
    write_folder(root, rows, images=8)
    for n in range(1, 8):
        Image.open(root / "0.png").save(root / f"{n}.png", compress_level=n)
    start = str(write_model(tmp_path / "blip2", "blip2"))
    short = ["training.steps=1", "training.batch_size=2", "model.text_branch=random"]
    tuned = tune(root, start, out, short)
    assert tuned is not None
    count = len(tuned.verdict.after.predictions)
    leak = f"{count} of {count} pictures kept back look"
    shown = html.unescape((out / "report.html").read_text())
    for text in (capsys.readouterr().out.split("\n\n")[-5:], [shown]):
        assert leak in " ".join(text)
        assert "`--group patient_id`" in " ".join(text)
    results = _results(out)
    assert results["alike"]
    assert ("group", "'patient_id'", "patient_id") in results["facts"]


def test_words_that_are_all_known_are_not_spelled() -> None:
    text = Sayable(loss=1.0, guessing=6.0, known=1.0, spelled=()).describe()
    assert text.endswith("it knows 100% of their words whole.")


def photos(root: Path, texts: list[str]) -> Path:
    return write_folder(root, [{"file_name": f"{n}.png", "text": t} for n, t in enumerate(texts)])


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["a fireman eats an apple"] * 5, r"knows 40% .*'fireman'.*--model small, .*/models/blip2"),
        (["一只红色的星星"] * 5, r"knows 0% .*language model writes Chinese.*--anyway"),
    ],
)
def test_the_starter_refuses_what_it_cannot_say(
    texts: list[str], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        tune(photos(tmp_path / "photos", texts), "starter", tmp_path / "out")
    assert not (tmp_path / "out" / "run").exists()


def test_the_starter_can_say_its_worked_examples(tmp_path: Path) -> None:
    recipe = load_recipe("scenes")
    engine = load_engine(recipe, "starter")
    for name in EXAMPLES:
        importlib.import_module(f"examples.{name}").draw(tmp_path / name, count=8)
        for held in held_sets(read_folder(tmp_path / name), recipe):
            examples = [*held.dataset]
            measured = sayable(engine, examples, [held.benchmark.prompt] * len(examples))
            assert measured.known > LEAST_KNOWN
            assert 0 < measured.loss < 12
    assert measured.guessing == pytest.approx(math.log(768))


def test_chinese_captions_choose_chinese(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root, out = (
        photos(tmp_path / "photos", ["一只猫", "两只狗", "a red cup", "红色的星", "天空"]),
        tmp_path / "out",
    )
    start = str(write_model(tmp_path / "blip2", "blip2"))
    short = ["training.steps=1", "training.batch_size=2", "model.text_branch=random"]
    tune(root, start, out, short)
    assert (
        "the answers are Chinese: Chinese templates and prompts are used" in capsys.readouterr().out
    )
    assert load_recipe(out / "recipe.yaml").data.sets["own"].language == "zh"
    (result,) = (Result.load(path.parent) for path in out.glob("results/after/*/result.json"))
    assert result.predictions[0]["prompt"] == "简短的图片描述："


def test_tune_resumes_after_a_kill(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Killed in the middle of the training; the rest is that of an uninterrupted run."""
    root = photos(tmp_path / "photos", ["a cat", "a dog", "a red cup", "two cats", "three dogs"])
    start = str(write_model(tmp_path / "blip2", "blip2"))
    short = ["training.steps=6", "training.batch_size=2", "training.save_every=1"]
    short += ["model.text_branch=random", "training.validate_every=2"]
    torch.set_num_threads(1)
    child = os.fork()
    if not child:
        real = loop.update

        def killed(*arguments: Any) -> float:
            if (tmp_path / "killed/run/checkpoints/step_000003").exists():
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*arguments)

        loop.update = killed
        try:
            tune(root, start, tmp_path / "killed", short)
        finally:
            os._exit(1)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    assert not (tmp_path / "killed/report.html").exists()
    with pytest.raises(ValueError, match="continue it with --resume"):
        tune(root, start, tmp_path / "killed", short)
    resumed = tune(root, "starter", tmp_path / "killed", resume=True)  # its own start and recipe
    whole = tune(root, start, tmp_path / "whole", short)
    assert resumed is not None
    assert whole is not None
    assert resumed.verdict.headline == whole.verdict.headline
    for name in ("best", "last"):
        model, other = (
            tmp_path / run / "run" / name / "model.safetensors" for run in ("killed", "whole")
        )
        assert model.read_bytes() == other.read_bytes()
    (root / "0.png").unlink()
    write_picture(root / "0.png", seed=77)
    write_picture(root / "1.png", seed=78)
    with pytest.raises(ValueError, match="began with other training examples"):
        tune(root, start, tmp_path / "killed", short, resume=True)


NODULE = {"set": "own", "mode": "rank", "candidates": ["yes", "no"], "task": "vqa"}
NODULE |= {"prompt": "Nodule? {question}", "metrics": ["balanced_accuracy", "auroc"]}


def chest(root: Path) -> Path:
    """Questions with a split, and one caption among the test rows."""
    splits = ["train"] * 4 + ["val"] * 2 + ["test"] * 4
    rows: list[dict] = [
        {"file_name": f"{n}.png", "question": "seen?", "answer": ("yes", "no")[n % 2]}
        for n in range(10)
    ]
    rows.append({"file_name": "10.png", "caption": "a chest"})
    rows = [r | {"split": s} for r, s in zip(rows, [*splits, "test"], strict=True)]
    return write_folder(root, rows, images=11)


def test_a_benchmark_of_the_user_decides(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root, out = chest(tmp_path / "chest"), tmp_path / "out"
    start = str(write_model(tmp_path / "blip2", "blip2"))
    short = ["training.steps=2", "training.batch_size=2", "model.text_branch=random"]
    own = f"evaluation.own.nodule={json.dumps(NODULE)}"
    tuned = tune(root, start, out, [*short, own])
    assert tuned is not None
    printed = capsys.readouterr().out
    assert "1 of 5 held-back examples are not scored: {'caption': 1}" in printed
    assert "the score (balanced_accuracy) is " in tuned.verdict.headline
    assert "nodule: always answering 'yes' gives 50.0" in printed
    assert "| *metric* | *balanced\\_accuracy* | *auroc* |" in printed
    for side in ("before", "after", "blind"):
        (folder,) = (out / "results" / side).iterdir()
        result = Result.load(folder)
        assert (folder.name, result.metric, result.n) == ("nodule", "balanced_accuracy", 4)
        assert result.predictions[0]["prompt"] == "Nodule? seen?"
        assert result.predictions[0]["candidates"] == ["yes", "no"]
    lines = [json.loads(line) for line in (out / "run/metrics.jsonl").read_text().splitlines()]
    scores = [line["validation"] for line in lines if "validation" in line]
    assert scores
    assert all(set(each) == {"score", "nodule"} for each in scores)
    resumed = tune(root, start, out, resume=True)  # the recipe of the run has the benchmark
    assert resumed is not None
    assert resumed.verdict.headline == tuned.verdict.headline


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"split": "train"}, "own.nodule.split is train, and `tune` scores what it holds back"),
        (
            {"candidates": ["yes", "perhaps"]},
            r"own.nodule: .*line 6 has the answer 'no', which is none",
        ),
        ({"metrics": ["mrr"]}, "compares with the best constant answer, which mrr does not have"),
        ({"task": "instruct"}, "own.nodule: no row has the task instruct; there are 2 of vqa"),
        ({"set": "chest"}, "no entry 'chest' in data.sets; there are own"),
    ],
)
def test_a_benchmark_that_does_not_fit_the_folder_is_refused_before_the_run(
    change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    root = chest(tmp_path / "chest")
    start = str(write_model(tmp_path / "blip2", "blip2"))
    own = f"evaluation.own.nodule={json.dumps(NODULE | change)}"
    with pytest.raises(ValueError, match=message):
        tune(root, start, tmp_path / "out", ["model.text_branch=random", own])
    assert not (tmp_path / "out/run").exists()


def test_chinese_rows_are_asked_in_chinese_by_a_benchmark_of_the_user(tmp_path: Path) -> None:
    folder = read_folder(photos(tmp_path / "photos", ["一只猫", "两只狗"]))
    own = "{set: own, metrics: [bleu]}"
    recipe = load_recipe(
        "scenes", ["data.sets={own: {format: imagefolder}}", f"evaluation.own.words={own}"]
    )
    prompts = [held_sets(folder, recipe, language)[0].benchmark.prompt for language in ("zh", "en")]
    assert prompts == ["简短的图片描述：", None]


@pytest.mark.parametrize("name", EXAMPLES)
def test_worked_examples(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Drawn, tuned for two steps and reported through the command, on a tiny random BLIP-2."""
    torch.set_num_threads(1)
    file = Path(__file__).parents[2] / "examples" / f"{name}.py"
    assert len(file.read_text().splitlines()) <= 40
    importlib.import_module(f"examples.{name}").draw(tmp_path / "drawn", count=10)
    start = write_model(tmp_path / "blip2", "blip2")
    short = ["training.steps=2", "training.validate_every=2", "model.text_branch=random"]
    arguments = ["tune", str(tmp_path / "drawn"), *short, "training.batch_size=2"]
    out = tmp_path / "tuned"
    with pytest.raises(SystemExit) as stop:
        cli.main([*arguments, "--model", str(start), "--out", str(out), "--debug"])
    assert not stop.value.code
    printed = capsys.readouterr().out
    assert " held back" in printed
    assert not re.search("held-in|mean of 1", printed + (out / "report.html").read_text())
    assert "instructblip serve --model" in printed
    assert re.search(r"^(Worse|No use yet|Not clearly better|Better): ", printed, re.MULTILINE)
    for row in ("**before**", "**after**", "best constant answer"):
        assert row in printed
    report = (out / "report.html").read_text()
    assert "<html" in report
    assert "the interval does not cover this choice" in report
    for side in ("before", "after"):
        assert list((out / "results" / side).glob("own_*/result.json"))


def test_ctrl_c_keeps_what_tune_did(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{"file_name": f"{n}.png", "text": f"a cup {n}"} for n in range(5)]
    root, out = write_folder(tmp_path / "custom", rows), tmp_path / "tuned"
    write_model(tmp_path / "blip2", "blip2")
    arguments = ["tune", str(root), "training.steps=3", "model.text_branch=random"]
    arguments += ["--model", str(tmp_path / "blip2"), "--out", str(out)]

    def interrupted(*arguments: Any) -> float:
        monkeypatch.undo()
        signal.raise_signal(signal.SIGINT)
        return loop.update(*arguments)

    monkeypatch.setattr(loop, "update", interrupted)
    with pytest.raises(SystemExit) as stopped:
        cli.main(arguments)
    assert stopped.value.code == 130
    printed = capsys.readouterr().out
    assert "interrupted: saved step 1; continue with --resume" in printed
    assert "To try the model" not in printed
    assert not (out / "report.html").exists()
    with pytest.raises(SystemExit):
        cli.main([*arguments, "--resume"])
    assert "report.html" in capsys.readouterr().out


def test_the_recipe_that_tune_writes_trains(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hugging Face's layout: metadata.csv beside images/. From any working directory."""
    for number in range(5):
        write_picture(tmp_path / "custom" / "images" / f"{number}.png", seed=number)
    rows = [f"images/{number}.png,a cup" for number in range(5)]
    (tmp_path / "custom" / "metadata.csv").write_text("\n".join(["file_name,text", *rows]))
    write_model(tmp_path / "blip2", "blip2")
    short = ["training.steps=2", "model.text_branch=random", "training.batch_size=2"]
    monkeypatch.chdir(tmp_path)
    write_recipe(Path("custom"), "blip2", Path("custom/tuned"), 4, short, images=6)
    monkeypatch.chdir(tmp_path / "custom")
    recipe = load_recipe(tmp_path / "custom" / "tuned" / "recipe.yaml")
    assert recipe.data.num_frames == 6  # all images of a sample are seen
    check(str(tmp_path / "custom" / "tuned" / "recipe.yaml"))
    for run in ("first", "second"):
        assert train(recipe, tmp_path / run).step == 2


@pytest.mark.parametrize(
    ("larger", "rate"),
    [
        ({"vocab_size": 400_000}, 1e-3),  # a table of words, of which a step reads a few rows
        ({"intermediate_size": 300_000}, 1e-5),
    ],
)
def test_a_large_table_of_words_does_not_make_a_model_large(
    larger: dict[str, int], rate: float, tmp_path: Path
) -> None:
    config = tiny_config("llama")
    config["qformer_config"] |= {"hidden_size": 64, "num_attention_heads": 2, **larger}
    write_json(tmp_path / "start/config.json", {**config, "model_type": "instructblip"})
    recipe = write_recipe(tmp_path, str(tmp_path / "start"), tmp_path / "tuned", 300, ())
    assert recipe.training.learning_rate == rate
