"""Benchmarks of the recipe on custom data: chosen by name, compared with a constant, refused."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from instructblip.data.custom.formats import group_column
from instructblip.data.custom.rows import CustomSet
from instructblip.data.loader import Loader
from instructblip.data.templates import render_prompt
from instructblip.evaluation.compare import compare
from instructblip.evaluation.report import write_report
from instructblip.evaluation.result import load_results
from instructblip.evaluation.tables import to_markdown
from instructblip.experiment.build import build
from instructblip.experiment.datasets import (
    benchmarks_of,
    check_recipe,
    checked_training,
    choosing_note,
    prepare_benchmarks,
    prepare_training,
)
from instructblip.experiment.evaluate import evaluate
from instructblip.recipe.load import load_recipe
from instructblip.recipe.schema import Recipe
from tests.testing import read_custom, write_json, write_json_lines, write_model, write_picture

ANSWERS = {"train": ["yes", "no"] * 3, "val": ["no", "yes"], "test": ["no", "no", "no", "yes"]}
CHEST: dict[str, Any] = {
    "set": "chest",
    "mode": "rank",
    "candidates": ["yes", "no"],
    "metrics": ["balanced_accuracy", "auroc", "accuracy"],
}


def write_chest(root: Path, answers: dict[str, list[str]] = ANSWERS) -> None:
    for number, (split, texts) in enumerate(answers.items()):
        rows = []
        for i, text in enumerate(texts):
            name = f"{split}_{i}.png"
            write_picture(root / "chest" / "images" / name, seed=10 * number + i)
            rows.append({"image": name, "question": "Is it broken?", "answer": text})
        write_json_lines(root / "chest" / f"{split}.jsonl", *rows)


def recipe_with(
    root: Path, own: dict[str, Any] | None = None, *more: str, path: str = "{split}.jsonl"
) -> Recipe:
    sets = {"chest": {"format": "table", "path": path}}
    return load_recipe(
        "quickstart",
        [
            f"data.root={root}",
            f"data.sets={json.dumps(sets)}",
            f"evaluation.own={json.dumps({'chest': CHEST} if own is None else own)}",
            "evaluation.validation=[]",
            "evaluation.benchmarks=[chest]",
            "features.cache=off",
            *more,
        ],
    )


def test_scores_stand_beside_the_best_constant_answer(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_chest(tmp_path)
    (result,) = evaluate(recipe_with(tmp_path), "starter", tmp_path / "results/starter")
    assert result.constants["balanced_accuracy"].score == 50
    assert result.constants["accuracy"] == ("no", 75.0)
    printed = capsys.readouterr().out
    assert "accuracy " in printed
    assert "always 'no' would score 75.00" in printed

    results = load_results([tmp_path / "results/starter"])
    (loaded,) = results["starter"]
    assert loaded.constants == result.constants
    comparison = compare(results)
    assert [row.name for row in comparison.rows] == ["chest", "chest auroc", "chest accuracy"]
    assert [row.name for row in comparison.means] == ["mean_own"]
    assert comparison.means[0].cells["starter"].value == result.value
    table = to_markdown(comparison)
    assert "| best constant answer | 50.0 | 50.0 | 75.0 |" in table.replace("*", "")
    assert "best constant answer 'no'" in table
    page = write_report(tmp_path / "report.html", results).read_text(encoding="utf-8")
    assert "always “no” 75.0" in page
    assert '<table class="classes">' in page


def test_own_benchmarks_choose_the_best_weights(tmp_path: Path) -> None:
    write_chest(tmp_path)
    own = {"early": CHEST | {"split": "val"}, "late": CHEST}
    more = ["evaluation.validation=[early]", "evaluation.benchmarks=[own]", "data.check=run"]
    more += ["training.steps=2", "training.batch_size=2", "training.workers=0"]
    recipe = recipe_with(tmp_path, own, *more)
    assert [b.name for b in benchmarks_of(recipe, ["own"])] == ["early", "late"]
    run = build(recipe)
    assert run.validate is not None
    scores = run.validate(run.model)
    assert set(scores) == {"score", "early"}
    assert scores["score"] == scores["early"]


def grouped(root: Path, *patients: str, **entry: Any) -> list[str]:
    """Rows of ``patients`` in one table with a split, and the overrides that train on them."""
    splits = ["train"] * (len(patients) - 4) + ["val", "val", "test", "test"]
    rows = []
    for i, (patient, split) in enumerate(zip(patients, splits, strict=True)):
        write_picture(root / "chest" / "images" / f"{i}.png", seed=i)
        answer = ("yes", "no")[i % 2]
        row = {"image": f"{i}.png", "question": "Is it broken?", "answer": answer}
        rows.append(row | {"patient_id": patient, "split": split})
    write_json_lines(root / "chest" / "rows.jsonl", *rows)
    sets = {"chest": {"format": "table", "path": "rows.jsonl", **entry}}
    more = [f"data.sets={json.dumps(sets)}", "data.check=run", "data.max_bad_rate=0.5"]
    more += ["evaluation.validation=[early]", "evaluation.benchmarks=[late]"]
    return [*more, "training.batch_size=2", "training.workers=0"]


EARLY_LATE = {"early": CHEST | {"split": "val"}, "late": CHEST}


def test_no_group_is_trained_on_and_evaluated(tmp_path: Path) -> None:
    more = grouped(tmp_path, *"abcdecfbg", group="patient_id")
    recipe = recipe_with(tmp_path, EARLY_LATE, *more)
    checked = [each.describe() for each in check_recipe(recipe) if not isinstance(each, str)]
    assert "2 x group on both sides" in checked[-1]
    assert "'b' is also in chest test" in checked[-1]
    training = checked_training(recipe, prepare_training(recipe))["chest"]
    assert [example.extra["group"] for example in training] == ["a", "d", "e"]
    strict = recipe_with(tmp_path, EARLY_LATE, *more, "data.max_bad_rate=0")
    with pytest.raises(ValueError, match="chest train: 2 of 5 examples are bad"):
        checked_training(strict, prepare_training(strict))


def test_a_column_that_looks_like_a_group_is_named(tmp_path: Path) -> None:
    more = grouped(tmp_path, *"abcdecfbg")
    with pytest.warns(UserWarning, match=r"^chest: column 'patient_id' .*7 values.*--group pat"):
        list(check_recipe(recipe_with(tmp_path, EARLY_LATE, *more)))
    for patients in ("abcdefghi", "aaaaaaaaa"):
        grouped(tmp_path, *patients)
        assert not group_column(CustomSet("chest", "table"), tmp_path / "chest", "train")


def test_an_own_benchmark_stops_a_run_early(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = grouped(tmp_path, *"abcdefghi")
    more += ["training.steps=9", "training.validate_every=2", "training.early_stopping_patience=1"]
    more += ["training.learning_rate=1e-30", "training.warmup_steps=0"]
    write_model(tmp_path / "blip2", "blip2")
    more += [f"model.start={tmp_path / 'blip2'}", "model.text_branch=random"]
    assert not choosing_note(recipe_with(tmp_path, EARLY_LATE, *more))
    recipe = recipe_with(tmp_path, EARLY_LATE, *more, "evaluation.benchmarks=[own]")
    result = build(recipe).train(tmp_path / "run")
    assert (result.stopped, result.step, result.best_step) == ("early", 4, 2)
    assert (tmp_path / "run/best/model.safetensors").is_file()
    assert "early of evaluation.own chooses the best weights" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"set": "chset"}, "no entry 'chset' in data.sets; did you mean chest"),
        ({"metrics": ["balanced_acuracy"]}, "did you mean balanced_accuracy"),
        ({"metrics": []}, "at least 1 item"),
        ({"mode": "generate", "candidates": None}, "auroc needs candidates that are ranked"),
        ({"mode": "generate", "metrics": ["accuracy"]}, "candidates needs candidates that are"),
        ({"candidates": ["yes", "no", "maybe"]}, "auroc needs two candidates"),
        ({"candidates": ["yes", "yes"]}, "expected two or more different ones"),
        ({"verbalizers": {"yse": ["true"]}}, "verbalizers of yse, which is no candidate"),
        ({"prompt": "{qestion}"}, "no place '{qestion}'"),
        ({"task": "vqq"}, "no templates for task 'vqq'"),
        ({"decoding": {"num_beams": 2}}, "mode is rank"),
        ({"metric": "accuracy"}, "did you mean metrics"),
    ],
)
def test_what_does_not_go_together_is_refused_with_the_recipe(
    change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        recipe_with(tmp_path, {"chest": CHEST | change})


@pytest.mark.parametrize("name", ["vqav2", "held_in", "own"])
def test_names_of_published_benchmarks_are_taken(name: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"{name} is a published benchmark or a group"):
        recipe_with(tmp_path, {name: CHEST})


def test_unknown_own_benchmark_names_the_nearest(tmp_path: Path) -> None:
    recipe = recipe_with(tmp_path, None, "evaluation.benchmarks=[chests]")
    with pytest.raises(ValueError, match="no benchmark or group 'chests'; did you mean chest"):
        benchmarks_of(recipe, recipe.evaluation.benchmarks)


@pytest.mark.parametrize(
    ("test", "change", "message"),
    [
        (["no", "yes", "none"], {}, r"test.jsonl:line 3 has the answer 'none', which is none of"),
        (["no", "no"], {}, "every row has the answer 'no', and auroc needs rows of both"),
        (["no", "yes"], {"metrics": ["vqa_accuracy"]}, "at least 4; use exact_match"),
        (["no", "yes"], {"task": "caption", "metrics": ["accuracy"]}, "there are 2 of vqa"),
        (["no", ""], {"metrics": ["accuracy"]}, "line 2 has no answer"),
    ],
)
def test_rows_that_cannot_be_scored_are_named_before_a_model_is_read(
    test: list[str], change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    write_chest(tmp_path, ANSWERS | {"test": test})
    recipe = recipe_with(tmp_path, {"chest": CHEST | change})
    with pytest.raises(ValueError, match=message):
        prepare_benchmarks(recipe, benchmarks_of(recipe, ["chest"]))
    faults = [each for each in check_recipe(recipe) if isinstance(each, str)]
    assert len(faults) == 1
    assert faults[0].startswith("evaluation.own.chest: ")


def test_missing_rows_of_an_own_benchmark_are_an_error_of_the_check(tmp_path: Path) -> None:
    write_chest(tmp_path)
    (tmp_path / "chest" / "test.jsonl").unlink()
    recipe = recipe_with(tmp_path)
    assert "no .jsonl" in next(str(each) for each in check_recipe(recipe))
    with pytest.raises(FileNotFoundError, match=r"chest: .*data\.sets\.chest"):
        prepare_benchmarks(recipe, benchmarks_of(recipe, ["chest"]))


def test_nothing_trains_on_what_is_evaluated(tmp_path: Path) -> None:
    """The same split of the set, and a file that is read for every split."""
    write_chest(tmp_path)
    same = recipe_with(tmp_path, {"chest": CHEST | {"split": "train"}})
    faults = [each for each in check_recipe(same) if isinstance(each, str)]
    assert faults == [
        "data.sets.chest: evaluation.own.chest scores the split train that it trains on; train on "
        "another split, or score another one"
    ]
    with pytest.raises(ValueError, match="scores the split train that it trains on"):
        checked_training(same, prepare_training(same))

    one_file = recipe_with(tmp_path, None, path="test.jsonl")
    message = r"4 of its 4 rows are also in chest test, which the recipe is evaluated on"
    with pytest.raises(ValueError, match=message):
        checked_training(one_file, prepare_training(one_file))
    assert any("4 of its 4 rows" in str(each) for each in check_recipe(one_file))


def test_recipe_with_an_own_benchmark_reads_back_as_the_same(tmp_path: Path) -> None:
    recipe = recipe_with(tmp_path)
    file = tmp_path / "recipe.yaml"
    file.write_text(recipe.to_yaml(), encoding="utf-8")
    assert load_recipe(file) == recipe


def write_reports(root: Path) -> str:
    """Short answers and reports in one file; returns the text of a report."""
    report = "There is a small effusion on the left. " * 10
    rows = [
        {"image": "a.png", "question": "Is it broken?", "answer": "no"},
        {"image": "a.png", "question": "What is seen?", "answer": report},
        {"image": "a.png", "question": "", "answer": report},
        {"image": "a.png", "question": "", "answer": "病灶位于左下肺" * 15},
        {"image": "a.png", "question": "Which side?", "answer": "left", "task": "Instruct"},
    ]
    write_picture(root / "chest" / "images" / "a.png")
    write_json_lines(root / "chest" / "test.jsonl", *rows)
    return report


def test_short_and_long_answers_have_their_own_benchmark_template_and_length(
    tmp_path: Path,
) -> None:
    write_reports(tmp_path)
    short = {"set": "chest", "task": "vqa", "metrics": ["exact_match"]}
    long = {"set": "chest", "task": "instruct", "metrics": ["rouge_l"]}
    more = ["evaluation.benchmarks=[own]"]
    recipe = recipe_with(tmp_path, {"short": short, "long": long}, *more)
    held = prepare_benchmarks(recipe, benchmarks_of(recipe, ["own"]))
    assert [len(each.dataset) for each in held] == [1, 4]
    assert [dict(each.benchmark.decoding) for each in held] == [{}, {"max_new_tokens": 256}]
    prompts = [
        render_prompt(each.dataset[i], each.benchmark.prompt).prompt
        for each in held
        for i in range(len(each.dataset))
    ]
    assert prompts == [
        "Question: Is it broken? Short answer:",
        "What is seen?",
        "Describe the image in detail.",
        "请详细描述这张图片。",
        "Which side?",
    ]
    mixed = recipe_with(tmp_path, {"chest": short | {"task": None}})
    message = r"its rows are 1 of vqa, 4 of instruct, short and long answers, .*`task: vqa`"
    with pytest.raises(ValueError, match=message):
        prepare_benchmarks(mixed, benchmarks_of(mixed, ["chest"]))


def test_check_counts_answers_that_a_benchmark_cannot_write_in_full(tmp_path: Path) -> None:
    write_reports(tmp_path)
    long = {"set": "chest", "task": "instruct", "metrics": ["rouge_l"]}
    recipe = recipe_with(
        tmp_path,
        {"long": long | {"decoding": {"max_new_tokens": 20}}},
        "evaluation.benchmarks=[long]",
    )
    text = next(each.describe() for each in check_recipe(recipe) if not isinstance(each, str))
    assert "3 x over-long answer" in text
    assert "the model writes at most 20 (max_new_tokens of decoding)" in text
    recipe = recipe_with(
        tmp_path,
        {"long": long | {"decoding": {"max_new_tokens": 1000}}},
        "evaluation.benchmarks=[long]",
    )
    text = next(each.describe() for each in check_recipe(recipe) if not isinstance(each, str))
    assert "over-long answer" not in text


def test_check_counts_samples_that_exceed_the_context(tmp_path: Path) -> None:
    write_reports(tmp_path)
    model = write_model(tmp_path / "blip2", "blip2")
    config = json.loads((model / "config.json").read_text())
    config["text_config"]["max_position_embeddings"] = 64
    write_json(model / "config.json", config)
    long = {"set": "chest", "task": "instruct", "metrics": ["rouge_l"]}
    more = [f"model.start={model}", "evaluation.benchmarks=[long]"]
    recipe = recipe_with(tmp_path, {"long": long}, *more)
    text = next(each.describe() for each in check_recipe(recipe) if not isinstance(each, str))
    assert "3 x over-long sample" in text
    assert "the language model reads 64 together" in text


def test_a_task_that_is_none_is_refused_only_in_a_named_column(tmp_path: Path) -> None:
    write_picture(tmp_path / "images" / "a.png")
    row = {"image": "a.png", "question": "What?", "answer": "a cat", "task": "detection"}
    write_json_lines(tmp_path / "rows.jsonl", row)
    (example,) = read_custom(tmp_path, "table", images="images")
    assert example.task == "vqa"
    with pytest.raises(ValueError, match=r"field 'task' .*expected one of caption"):
        read_custom(tmp_path, "table", images="images", columns=(("task", "task"),))


CODE = """
def read(root, split):
    for line in (root / f"{split}.txt").read_text().splitlines():
        image, answer = line.split()
        yield {"image": image, "question": "Is it broken?", "answer": answer}

def ask(example):
    return f"Look well. {example.question}"

def first_letter(prediction, answers):
    return float(prediction[:1] == answers[0][:1])

def wrong(prediction, answers):
    return 7
"""


def write_code(root: Path, metric: str = "first_letter") -> Path:
    """A recipe with the user's own reader, template and metric in a file beside it."""
    module = f"chest_{metric}"
    (root / "project").mkdir(parents=True)
    (root / "project" / f"{module}.py").write_text(CODE)
    for number, split in enumerate(("train", "test")):
        for i in range(2):
            write_picture(root / "chest" / f"{split}{i}.png", seed=10 * number + i)
        lines = [f"{split}{i}.png {answer}\n" for i, answer in enumerate(("yes", "no"))]
        (root / "chest" / f"{split}.txt").write_text("".join(lines))
    entry = {"format": f"{module}:read", "templates": [f"{module}:ask"]}
    own = {"set": "chest", "metrics": [f"{module}:{metric}"], "prompt": f"{module}:ask"}
    values = {
        "model": {"start": "starter"},
        "data": {"root": str(root), "sets": {"chest": entry}, "check": "run"},
        "evaluation": {"own": {"chest": own}, "validation": [], "benchmarks": ["chest"]},
        "training": {"steps": 1, "batch_size": 2, "workers": 0},
        "features": {"cache": "off"},
    }
    return write_json(root / "project" / "my.yaml", values)


def test_reader_template_and_metric_of_the_user(tmp_path: Path) -> None:
    recipe = load_recipe(write_code(tmp_path))
    assert recipe.code == tmp_path / "project"
    (result,) = evaluate(recipe, "starter", tmp_path / "results/starter")
    assert [p["prompt"] for p in result.predictions] == ["Look well. Is it broken?"] * 2
    expected = [float(p["prediction"][:1] == p["answers"][0][:1]) for p in result.predictions]
    assert [p["score"] for p in result.predictions] == expected
    assert result.constant is not None
    assert result.constant.score == 50
    batches = build(recipe).batches
    assert isinstance(batches, Loader)
    assert batches.rendered(0)[1].prompt == "Look well. Is it broken?"
    # Results are read without the code.
    (tmp_path / "project/chest_first_letter.py").unlink()
    sys.modules.pop("chest_first_letter")
    (loaded,) = load_results([tmp_path / "results/starter"])["starter"]
    assert loaded.value == result.value


def test_functions_that_are_missing_or_return_something_else(tmp_path: Path) -> None:
    file = write_code(tmp_path, "wrong")
    with pytest.raises(ValueError, match="expected a number from 0 to 1; got 7"):
        evaluate(load_recipe(file), "starter", tmp_path / "results/starter")
    text = file.read_text()
    file.write_text(text.replace("chest_wrong:ask", "chest_wrong:aks"))
    with pytest.raises(ValueError, match=r"chest_wrong\.py has no function 'aks'"):
        load_recipe(file)
    file.write_text(text.replace("chest_wrong:ask", "no_such_file:ask"))
    with pytest.raises(ValueError, match="no module 'no_such_file' beside the recipe"):
        load_recipe(file)


def test_a_model_from_elsewhere_brings_no_code_along(tmp_path: Path) -> None:
    text = write_code(tmp_path, "elsewhere").read_text()
    beside = tmp_path / "project" / "recipe.yaml"
    beside.write_text(text)
    with pytest.raises(ValueError, match="are not run from there"):
        load_recipe(beside)
    assert "chest_elsewhere" not in sys.modules
