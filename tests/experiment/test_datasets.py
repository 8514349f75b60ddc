"""`instructblip check`, and training that requires it, on a part of the embedded world."""

import json
import shutil
from pathlib import Path

import pytest

from instructblip.cli import main as cli
from instructblip.data.prepared.prepare import prepare_all
from instructblip.experiment.datasets import (
    check_recipe,
    checked_training,
    evaluated_too,
    evaluation_sets,
    job_of,
    passes,
    prepare_training,
    training_names,
)
from instructblip.recipe.load import load_recipe
from instructblip.recipe.schema import Recipe
from instructblip.scenes.official import write_scenes
from tests.testing import write_json_lines, write_picture, write_vqa

SETTINGS = [
    "model.start=nowhere",
    "evaluation.validation=[scenes_vqav2]",
    "evaluation.benchmarks=[scenes_vqav2, scenes_gqa]",
    "data.sets={vqav2: {}}",
]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write_scenes(tmp_path / "scenes", scale=0.003, sets=("vqav2", "gqa"))
    return tmp_path / "scenes"


def recipe_of(root: Path, *more: str) -> Recipe:
    return load_recipe("quickstart", [f"data.root={root}", *SETTINGS, *more])


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as stop:
        cli.main(list(arguments))
    assert isinstance(stop.value.code, int)
    return stop.value.code


def image_of(root: Path, question: int) -> Path:
    """The image of one of VQAv2's training questions."""
    path = root / "vqav2" / "annotations" / "v2_OpenEnded_mscoco_train2014_questions.json"
    number = json.loads(path.read_text())["questions"][question]["image_id"]
    return root / "vqav2" / "images" / f"COCO_train2014_{number:012d}.jpg"


def test_check_reports_bad_examples(root: Path, capsys: pytest.CaptureFixture[str]):
    command = ["check", "quickstart", f"data.root={root}", *SETTINGS]
    assert run(*command) == 0
    out = capsys.readouterr().out.splitlines()
    assert [line.split()[:3] for line in out] == [
        ["ok", "vqav2", "val:"],
        ["ok", "gqa", "test:"],
        ["ok", "vqav2", "train:"],
    ]
    image_of(root, 4).write_bytes(b"")
    assert run(*command) == 1
    out = capsys.readouterr().out
    assert "FAILED  vqav2 train: 27 examples, 9 images: 3 x unreadable image" in out
    assert "questions.json:record 3: unreadable image" in out
    assert run(*command, "data.max_bad_rate=0.2") == 0
    image_of(root, 4).unlink()
    assert run(*command, "data.prepared=" + str(root / "again")) == 1
    assert "3 of 27 samples are bad" in capsys.readouterr().out


def test_an_example_with_more_images_than_the_model_sees_is_bad(root: Path):
    row = {"image": [f"{i}.png" for i in range(6)], "question": "Which?", "answer": "red"}
    for name in row["image"]:
        write_picture(root / "custom" / name, seed=int(name[0]))
    rows = [row, row | {"image": ["1.png", "0.png"]}]
    (root / "custom" / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    more = ["data.sets={custom: {format: table}}", "data.check=required"]
    more += ["evaluation.validation=[]", "evaluation.benchmarks=[]"]
    (diagnosis,) = check_recipe(recipe_of(root, *more))
    assert not isinstance(diagnosis, str)
    assert diagnosis.left_out == (0,)
    assert "line 1: too many images: 6, and the model sees 4; set data.num_frames=6" in (
        diagnosis.describe()
    )
    wider = recipe_of(root, *more, "data.num_frames=6")
    datasets = prepare_training(wider)
    with pytest.raises(ValueError, match=r"custom was checked with another data\.num_frames"):
        checked_training(wider, datasets)
    (diagnosis,) = check_recipe(wider)
    assert not isinstance(diagnosis, str)
    assert not diagnosis.left_out
    assert checked_training(wider, datasets) == datasets


def test_training_needs_a_check(root: Path, capsys: pytest.CaptureFixture[str]):
    recipe = recipe_of(root, "data.check=required")
    datasets = prepare_training(recipe)
    with pytest.raises(ValueError, match=r"vqav2 was never checked\n.*instructblip check"):
        checked_training(recipe, datasets)
    assert checked_training(recipe_of(root, "data.check=skip"), datasets) == datasets
    assert checked_training(recipe_of(root, "data.check=run"), datasets) == datasets
    assert checked_training(recipe, datasets) == datasets

    more = recipe_of(root, "data.check=required", "evaluation.benchmarks=[scenes_vsr]")
    assert checked_training(more, datasets) == datasets  # VSR is not on this machine
    write_scenes(root, scale=0.003, sets=("vsr",))
    with pytest.raises(ValueError, match="not checked for leaked images against vsr test"):
        checked_training(more, datasets)

    image_of(root, 0).write_bytes(image_of(root, 0).read_bytes() + b"\0")
    with pytest.raises(ValueError, match=r"vqav2 has changed since .*COCO_train2014"):
        checked_training(recipe, datasets)


def test_all_bad_rows_of_all_sets_are_listed_in_one_round(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """Tables and dialogues, with rows that cannot be read beside images that are missing."""
    write_picture(tmp_path / "a" / "0.png")
    write_picture(tmp_path / "b" / "0.png")
    (tmp_path / "a" / "rows.csv").write_text("image,answer\n0.png,x\n,y\n../0.png,z\ngone.png,z\n")
    turns = [{"from": "human", "value": "?"}, {"from": "gpt", "value": "a"}]
    dialogues = [{"image": "0.png", "conversations": turns[:n]} for n in (2, 1, 2, 1)]
    (tmp_path / "b" / "talk.json").write_text(json.dumps(dialogues))
    sets = "data.sets={a: {format: table}, b: {format: llava_json}}"
    recipe = recipe_of(tmp_path, sets)
    with pytest.raises(ValueError, match=r"a train: 3 of 4 samples are bad") as error:
        prepare_training(recipe)
    with pytest.raises(SystemExit):
        cli.main(["prepare", "quickstart", f"data.root={tmp_path}", *SETTINGS, sets])
    assert str(error.value) in capsys.readouterr().err
    for place in ("rows.csv:line 3: ", "rows.csv:line 4: ", "gone.png does not exist"):
        assert place in str(error.value)
    assert "b train: 2 of 4 samples are bad" in str(error.value)
    for place in ("talk.json:record 1: ", "talk.json:record 3: "):
        assert place in str(error.value)
    lax = recipe_of(tmp_path, sets, "data.max_bad_rate=0.8")
    assert [len(dataset) for dataset in prepare_training(lax).values()] == [1, 2]


def test_entries_without_data_name_what_to_set(tmp_path: Path):
    sets = "{vqa: {}, mine: {format: table}, okvqa: {}}"
    with pytest.raises(ValueError, match="does not exist") as error:
        prepare_training(recipe_of(tmp_path, f"data.sets={sets}"))
    unknown, custom, published = str(error.value).splitlines()
    assert "data.sets.vqa: 'vqa' is no published data set" in unknown
    assert "set `format:` (one of llava_json" in unknown
    assert f"data.sets.mine: {tmp_path / 'mine'} does not exist; expected the files of a" in custom
    assert (
        f"set `root:` of the entry to their folder below data.root, which is {tmp_path}" in custom
    )
    assert "mscoco_train2014_annotations.json" in published


def test_bad_examples_are_left_out_within_the_rate(root: Path):
    image_of(root, 5).write_bytes(b"")
    strict, lax = recipe_of(root), recipe_of(root, "data.max_bad_rate=0.2")
    with pytest.raises(ValueError, match=r"vqav2 train: 3 of 27 examples are bad.*max_bad_rate 0"):
        checked_training(strict, prepare_training(strict))
    kept = checked_training(lax, prepare_training(lax))["vqav2"]
    assert len(kept) == 24
    name = image_of(root, 5).name
    assert name not in {image for i in range(len(kept)) for image in kept[i].images}


def test_leaked_images_are_left_out_on_request(root: Path):
    leaked = next((root / "gqa" / "images").rglob("*.jpg"))
    image_of(root, 5).write_bytes(leaked.read_bytes())
    for setting, count in (("false", 27), ("true", 24)):
        recipe = recipe_of(root, f"data.drop_leaked={setting}", "data.max_bad_rate=0")
        kept = checked_training(recipe, prepare_training(recipe))
        assert len(kept["vqav2"]) == count
        assert all(passes(recipe, d) for d in check_recipe(recipe) if not isinstance(d, str))


def test_entries_of_one_source_may_have_different_roots(tmp_path: Path):
    write_vqa(tmp_path / "vqa_a", 4)
    write_vqa(tmp_path / "vqa_b", 6)
    sets = "{a: {source: vqav2, root: vqa_a}, b: {source: vqav2, root: vqa_b}}"
    recipe = recipe_of(tmp_path, f"data.sets={sets}")
    names = training_names(recipe)
    prepared = [
        prepare_training(recipe).values(),
        prepare_all([job_of(recipe, name) for name in names]),
        checked_training(recipe, prepare_training(recipe)).values(),
    ]
    assert [[len(dataset) for dataset in datasets] for datasets in prepared] == [[4, 6]] * 3
    assert [dataset.name for dataset in prepared[1]] == ["vqav2", "vqav2@b"]


def test_data_prepared_inside_its_folder_stays_checked(tmp_path: Path):
    for i in range(2):
        write_picture(tmp_path / f"{i}.png", seed=i).with_suffix(".txt").write_text(f"image {i}")
    sets = "data.sets={custom: {format: imagefolder, root: .}}"
    recipe = recipe_of(tmp_path, sets, "data.check=required")
    assert not any(isinstance(each, str) for each in check_recipe(recipe))
    for _ in range(2):
        datasets = checked_training(recipe, prepare_training(recipe))
        assert len(datasets["custom"]) == 2
    around = recipe_of(tmp_path, sets, f"data.prepared={tmp_path}")  # not inside: all files count
    assert len(prepare_training(around)["custom"]) == 2
    (tmp_path / "0.txt").write_text("another image")
    for recipe_now in (recipe, around):
        assert prepare_training(recipe_now)["custom"][0].answers == ("another image",)


@pytest.mark.parametrize("entry", ["vqav2: {split: val}", "more: {source: vqav2, split: val}"])
def test_training_on_a_split_that_is_evaluated_is_refused(
    entry: str, root: Path, capsys: pytest.CaptureFixture[str]
):
    sets = f"data.sets={{{entry}}}"
    assert run("check", "quickstart", f"data.root={root}", *SETTINGS, sets) == 1
    assert "vqav2 val is a set that this recipe is evaluated on" in capsys.readouterr().out
    for check in ("required", "run"):
        recipe = recipe_of(root, sets, f"data.check={check}")
        with pytest.raises(ValueError, match=r"evaluated on; train on another split"):
            checked_training(recipe, prepare_training(recipe))
    recipe = recipe_of(root, sets, "evaluation.validation=[]", "evaluation.benchmarks=[scenes_gqa]")
    assert checked_training(recipe, prepare_training(recipe))
    shutil.copytree(root / "vqav2", root / "another")
    sets = "data.sets={vqav2: {}, more: {source: vqav2, split: val, root: another}}"
    assert not evaluated_too(recipe_of(root, sets), "more")


def test_held_out_sets_are_validated_on_the_split_of_their_benchmark(root: Path):
    more = ["evaluation.validation=[scenes_vqav2, scenes_gqa]", "evaluation.benchmarks=[]"]
    recipe = recipe_of(root, "data.sets={gqa: {split: test}}", *more)
    assert [(b.source, b.split) for b in evaluation_sets(recipe)] == [
        ("vqav2", "val"),
        ("gqa", "test"),
    ]
    with pytest.raises(ValueError, match="gqa test is a set that this recipe is evaluated on"):
        checked_training(recipe, prepare_training(recipe))


@pytest.mark.parametrize(
    ("key", "value"),
    [("images", "../../elsewhere"), ("images", "/etc"), ("path", "../../elsewhere/rows.jsonl")],
)
def test_an_entry_does_not_leave_the_data_root(tmp_path: Path, key: str, value: str) -> None:
    root = tmp_path / "data"
    for place in (root / "mine", tmp_path / "elsewhere", root / "other"):
        write_picture(place / "0.png")
        write_json_lines(place / "rows.jsonl", {"image": "0.png", "answer": "a"})
    settings = [f"data.root={root}", "data.sets.mine.format=table", "data.sets.mine.root=mine"]
    recipe = load_recipe("quickstart", [*settings, f"data.sets.mine.{key}={value}"])
    with pytest.raises(ValueError, match=rf"data\.sets\.mine\.{key}: .* leaves the data root"):
        job_of(recipe, "mine")
    for below in ("../other", str(root / "other"), "."):
        recipe = load_recipe("quickstart", [*settings, f"data.sets.mine.images={below}"])
        assert job_of(recipe, "mine").root == root / "mine"


def test_a_file_url_as_root_is_a_folder(tmp_path: Path) -> None:
    write_picture(tmp_path / "a b" / "0.png")
    settings = [f"data.root={tmp_path}/data", "data.sets.mine.format=imagefolder"]
    url = f"file://{tmp_path}/a%20b"
    recipe = load_recipe("quickstart", [*settings, f"data.sets.mine.root={url}"])
    assert job_of(recipe, "mine").root == tmp_path / "a b"
    assert not (tmp_path / "data").exists()
