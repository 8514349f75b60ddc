"""The commands on a tiny random BLIP-2 and a corner of Scenes, through the real files."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from instructblip.cli import data, evaluation, training
from instructblip.cli import main as cli
from instructblip.evaluation import tables
from instructblip.evaluation.benchmarks import BENCHMARKS
from instructblip.evaluation.compare import compare
from instructblip.evaluation.result import load_results
from instructblip.experiment import build, datasets
from instructblip.experiment import features as caching
from instructblip.experiment.evaluate import evaluate
from instructblip.experiment.train import cache, train
from instructblip.model.checkpoints.directory import model_directory
from instructblip.recipe.load import load_recipe
from instructblip.recipe.schema import Recipe
from instructblip.training.train import TrainResult
from tests.testing import write_model, write_picture

SMALL = [
    "model.text_branch=random",
    "data.max_instruction=40",
    "data.max_prompt=60",
    "data.max_response=40",
    "training.steps=4",
    "training.batch_size=4",
    "training.warmup_steps=1",
    "training.validate_every=2",
    "training.save_every=2",
    "training.log_every=1",
    "training.precision=fp32",
    "evaluation.validation=[scenes_vqav2, scenes_aokvqa]",
    "evaluation.benchmarks=[scenes_vqav2, scenes_aokvqa, scenes_vsr]",
    "evaluation.validation_limit=4",
    "evaluation.limit=4",
    "evaluation.decoding.max_new_tokens=3",
]


@pytest.fixture(scope="module")
def overrides(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    start = write_model(tmp_path_factory.mktemp("blip2"), "blip2")
    return [f"model.start={start}", *SMALL]


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory, overrides: list[str]) -> Path:
    """What `instructblip quickstart` writes."""
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("quickstart")
    with pytest.raises(SystemExit) as stop:
        cli.main(["quickstart", *overrides, "--out", str(out), "--scale", "0.02", "--debug"])
    assert stop.value.code == 0
    return out


def settings_of(out: Path, overrides: list[str], *more: str) -> list[str]:
    return [f"data.root={out / 'scenes'}", *overrides, *more]


def recipe_of(out: Path, overrides: list[str], *more: str) -> Recipe:
    return load_recipe("quickstart", settings_of(out, overrides, *more))


def test_quickstart_writes_its_figures(out: Path):
    results = json.loads((out / "results.json").read_text())
    assert set(results["models"]) == {"blip2", "instructblip", "instructblip_blind"}
    with Image.open(out / "looks.png") as looks:
        assert looks.width > 3 * looks.height / 2  # the image and three instructions
    for model in results["models"].values():
        assert set(model) == {"held_in", "held_out", "datasets"}
        assert set(model["datasets"]) == {"scenes_vqav2", "scenes_aokvqa", "scenes_vsr"}
        assert 0 <= model["held_in"] <= 100
    assert results["seconds"]["train"] > 0
    assert "<html" in (out / "report.html").read_text()
    assert results["seconds"]["total"] >= results["seconds"]["train"]


def test_training_moves_the_q_former_and_nothing_else(out: Path, overrides: list[str]):
    model = build.load_model(recipe_of(out, overrides))
    trainable = {name for name, _ in model.trainable_parameters()}
    before = model.state_dict()
    after = load_file(out / "run" / "last" / "model.safetensors")
    moved = {name for name, value in before.items() if not torch.equal(value, after[name])}
    assert moved <= trainable
    assert {"query_tokens", "language_projection.weight"} <= moved


def test_a_run_holds_all_it_needs(out: Path, overrides: list[str]):
    run = out / "run"
    names = {path.name for path in run.iterdir()}
    assert {"best", "last", "checkpoints", "metrics.jsonl", "curves.png", "recipe.yaml"} <= names
    recipe = recipe_of(out, overrides)
    for path in (run, run / "best", run / "last", run / "checkpoints" / "step_000004"):
        assert load_recipe(path / "recipe.yaml") == recipe


def test_resume_is_exact_through_the_real_parts(out: Path, overrides: list[str], tmp_path: Path):
    whole = load_file(out / "run" / "last" / "model.safetensors")
    recipe = recipe_of(out, overrides)
    train(recipe, tmp_path / "cut")
    # as if the run had stopped after step 2
    shutil.rmtree(tmp_path / "cut" / "checkpoints" / "step_000004")
    result = train(recipe, tmp_path / "cut", resume=True)
    assert result.step == 4
    resumed = load_file(tmp_path / "cut" / "last" / "model.safetensors")
    assert whole.keys() == resumed.keys()
    for name, value in whole.items():
        assert torch.equal(value, resumed[name]), name


def test_a_resumed_run_names_changed_data(
    out: Path, overrides: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    recipe = recipe_of(out, overrides)
    train(recipe, tmp_path)
    train(recipe, tmp_path, resume=True)
    assert "resuming with other data" not in capsys.readouterr().out
    known = json.loads((tmp_path / "data.json").read_text())
    known["vqav2"] = known["vqav2"].replace(" ", "0 ")
    (tmp_path / "data.json").write_text(json.dumps(known))
    train(recipe, tmp_path, resume=True)
    assert "resuming with other data: vqav2 changed" in capsys.readouterr().out


def test_a_refused_resume_leaves_the_run_as_it_was(out: Path, overrides: list[str], tmp_path: Path):
    train(recipe_of(out, overrides), tmp_path)
    (tmp_path / "data.json").write_text('{"vqav2": "what it was"}')
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    for other in ("training.optimizer=adamw", "evaluation.decoding={num_beems: 5}"):
        with pytest.raises(ValueError, match=r"another training\.optimizer|unknown decoding"):
            train(recipe_of(out, overrides, other), tmp_path, resume=True)
        assert before == {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}


@pytest.mark.parametrize("began_with", [False, True])
def test_a_resumed_run_reads_features_if_it_began_so(
    out: Path,
    overrides: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    began_with: bool,
):
    store = tmp_path / "features"
    settings = ["features.cache=auto", "features.dtype=int8", f"features.root={store}"]
    recipe = recipe_of(out, overrides, *settings, "evaluation.validation=[]")
    monkeypatch.setattr(caching, "features_pay", lambda *_: began_with)
    whole = _last_weights(train(recipe, tmp_path / "run"), tmp_path)
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step_000004")
    monkeypatch.setattr(caching, "features_pay", lambda *_: not began_with)
    shutil.rmtree(store) if began_with else cache(recipe)
    capsys.readouterr()
    resumed = _last_weights(train(recipe, tmp_path / "run", resume=True), tmp_path)
    assert all(torch.equal(value, resumed[name]) for name, value in whole.items())
    printed = capsys.readouterr().out
    assert (f"not read from {store}" in printed) == (not began_with)
    assert "changed recipe" not in printed


def _last_weights(result: TrainResult, folder: Path) -> dict[str, torch.Tensor]:
    assert result.step == 4
    return load_file(folder / "run" / "last" / "model.safetensors")


def test_torchrun_answers_as_one_process_does(out: Path, tmp_path: Path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", "2", "-m", "instructblip", "evaluate", str(out / "run/last")]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [*command, "--out", str(tmp_path)], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    for name in ("scenes_vqav2", "scenes_aokvqa", "scenes_vsr"):
        two, one = (
            json.loads((folder / name / "result.json").read_text())
            for folder in (tmp_path, out / "results" / "instructblip")
        )
        assert two["n"] == 4
        assert two == one
        assert done.stdout.count(f"{name} ") == 1  # one rank prints


def test_compare_and_evaluate(out: Path, overrides: list[str], capsys: pytest.CaptureFixture[str]):
    folders = [out / "results" / "blip2", out / "results" / "instructblip"]
    evaluation.compare(folders)
    assert "mean of 2 sets (held-in)" in capsys.readouterr().out
    evaluation.compare(folders, "json")
    assert json.loads(capsys.readouterr().out)["models"] == ["blip2", "instructblip"]
    for form, sign in (("markdown", "| held-in | choices |"), ("latex", r"\begin{tabular}")):
        evaluation.compare(folders, form)  # type: ignore[arg-type]
        assert sign in capsys.readouterr().out
    recipe = recipe_of(out, overrides, "evaluation.benchmarks=[scenes_vsr]")
    (result,) = evaluate(recipe, str(out / "run"), out / "again")
    stored = json.loads((out / "results.json").read_text())["models"]["instructblip"]
    assert result.value == stored["datasets"]["scenes_vsr"]


def test_evaluate_takes_a_model_alone_and_resumes(
    out: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
):
    """The recipe beside the model states where the data are and how to decode."""
    run, results = str(out / "run"), tmp_path / "results"
    options = ["--benchmarks", "scenes_vsr,scenes_msvdqa", "--limit", "3", "--batch-size", "auto"]
    for _ in range(2):
        with pytest.raises(SystemExit) as stop:
            cli.main(["evaluate", run, *options, "--out", str(results), "--debug"])
        assert stop.value.code == 0
    first = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert [name for name in first if name != "image"] == ["scenes_vsr", "scenes_msvdqa"] * 2
    lines = (results / "scenes_msvdqa" / "predictions.jsonl").read_text().splitlines()
    assert len(lines) == 3  # the second call kept them
    assert len(json.loads(lines[0])["images"]) == 4
    with pytest.raises(ValueError, match=r"expected .RECIPE. MODEL"):
        cli.main(["evaluate", "a", "b", "c", "--debug"])


def test_evaluate_under_other_wordings(
    out: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
):
    """The score under each wording is that of the benchmark with this prompt."""
    options = ["--benchmarks", "scenes_vqav2", "--limit", "4", "--out", str(tmp_path / "a")]
    with pytest.raises(SystemExit) as stop:
        cli.main(["evaluate", str(out / "run"), "--prompts", "3", *options, "--debug"])
    assert stop.value.code == 0
    (result,) = load_results([tmp_path / "a"])["a"]
    assert len(result.wordings) == 3
    assert BENCHMARKS["scenes_vqav2"].prompt not in result.wordings
    assert all("{question}" in p and "{options}" not in p for p in result.wordings)
    prompt, score = next(iter(result.wordings.items()))
    settings = ["evaluation.prompts={scenes_vqav2: '" + prompt + "'}", "evaluation.limit=4"]
    recipe = load_recipe(str(out / "run" / "best" / "recipe.yaml"), settings)
    recipe = recipe.model_copy(
        update={
            "evaluation": recipe.evaluation.model_copy(update={"benchmarks": ("scenes_vqav2",)})
        }
    )
    (alone,) = evaluate(recipe, str(out / "run"), tmp_path / "b")
    assert alone.value == score
    assert "under 3 other wordings: mean" in capsys.readouterr().out
    table = tables.to_markdown(compare({"a": [result]}))
    assert "a, other wordings" in table


def test_folders_of_one_name_are_kept_apart(out: Path, tmp_path: Path):
    first, second = out / "results" / "blip2", tmp_path / "blip2"
    shutil.copytree(first, second)
    assert list(load_results([first, second])) == [str(first), str(second)]
    assert list(load_results([first])) == ["blip2"]


def test_a_recipe_may_change_prompts(out: Path, overrides: list[str]):
    setting = "evaluation.prompts={scenes_vsr: 'is it so? {question}'}"
    (changed,) = datasets.benchmarks_of(recipe_of(out, overrides, setting), ["scenes_vsr"])
    assert changed.prompt == "is it so? {question}"
    for wrong, message in (
        ("{scenes_vrs: a}", "scenes_vsr"),
        ("{scenes_vsr: '{ask}'}", "no place"),
    ):
        recipe = recipe_of(out, overrides, f"evaluation.prompts={wrong}")
        with pytest.raises(ValueError, match=message):
            datasets.benchmarks_of(recipe, ["scenes_vsr"])


def test_a_benchmark_without_its_data_names_what_to_get(
    out: Path, overrides: list[str], tmp_path: Path
):
    recipe = recipe_of(out, overrides, "evaluation.benchmarks=[scenes_gqa, flickr30k, ivqa]")
    with pytest.raises(FileNotFoundError) as error:
        evaluate(recipe, str(out / "run"), out / "missing")
    text = str(error.value)
    assert "flickr30k_test.json" in text
    assert "https://shannon.cs.illinois.edu/DenotationGraph/" in text
    assert str(out / "scenes" / "ivqa") in text
    assert "scenes_gqa" not in text
    elsewhere = recipe_of(out, ["data.root=nowhere"], "evaluation.benchmarks=[scenes_gqa]")
    with pytest.raises(FileNotFoundError, match="`instructblip scenes nowhere` draws it"):
        evaluate(elsewhere, str(out / "run"), out / "missing")
    (tmp_path / "vqav2" / "images").mkdir(parents=True)  # real data: not a place to draw
    real = recipe_of(out, [f"data.root={tmp_path}"], "evaluation.benchmarks=[scenes_gqa]")
    with pytest.raises(FileNotFoundError, match=r"not beside other data such as .*vqav2: draw"):
        evaluate(real, str(out / "run"), out / "missing")


def test_prepare_prints_the_mixture(
    out: Path, overrides: list[str], capsys: pytest.CaptureFixture[str]
):
    data.prepare("quickstart", settings_of(out, overrides, "data.sets.vqav2.weight=0"))
    printed = capsys.readouterr().out
    assert "coco_caption" in printed
    assert "epochs" in printed
    assert "vqav2" not in printed


def test_quickstart_again_starts_afresh_but_keeps_files_of_others(
    out: Path, overrides: list[str], tmp_path: Path
):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match="was not written by a quickstart"):
        training.quickstart(overrides, tmp_path, scale=0.02)
    assert (tmp_path / "run" / "thesis.txt").read_text() == "mine"


def test_show(out: Path, overrides: list[str], capsys: pytest.CaptureFixture[str]):
    settings = settings_of(out, overrides)
    data.show("quickstart", settings, 1)
    printed = capsys.readouterr().out
    assert "vqav2  step" in printed
    assert "carry loss (in brackets)" in printed
    data.show("quickstart", settings, 2, out / "show.html")
    articles = (out / "show.html").read_text(encoding="utf-8").count("<article>")
    assert articles == 2 * len(recipe_of(out, overrides).data.sets)


DOCS = Path(__file__).parents[2] / "docs"


def test_custom_data_alone_train_without_validation(overrides: list[str], tmp_path: Path):
    """The recipe of docs/data.md, read from there."""
    text = (DOCS / "data.md").read_text().split("## Custom data")[1]
    (tmp_path / "custom.yaml").write_text(text.split("```yaml\n")[1].split("```")[0])
    for i in range(4):
        write_picture(tmp_path / "photos" / "pictures" / f"{i}.png", seed=i)
    asked = {"ask": "what is it?", "reply": "a cup"}
    rows = [{"file": f"{i}.png", "patient_id": f"p{i}", **asked} for i in range(4)]
    (tmp_path / "photos" / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    settings = [one for one in overrides if not one.startswith("evaluation.")]
    recipe = load_recipe(tmp_path / "custom.yaml", [f"data.root={tmp_path}", *settings])
    data.check(str(tmp_path / "custom.yaml"), [f"data.root={tmp_path}", *settings])
    result = train(recipe, tmp_path / "run")
    assert (result.step, result.best_step) == (4, None)
    assert model_directory(tmp_path / "run") == tmp_path / "run" / "last"
    assert train(recipe, tmp_path / "run", resume=True).step == 4
    cache(recipe)
