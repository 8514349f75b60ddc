"""Splits and groups that custom data brings along, and what training shares with evaluation."""

from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.ipc
import pytest
from PIL import Image

from instructblip.core.example import Example
from instructblip.data.custom.formats import custom_source
from instructblip.data.custom.rows import CustomSet
from instructblip.data.prepared.check import Diagnosis, check_dataset, evaluated_by
from instructblip.data.prepared.dataset import PreparedDataset
from instructblip.data.prepared.images import FACTS_FILE, read_facts
from instructblip.data.prepared.prepare import prepare
from instructblip.data.reading.records import RUN_FILES, walk_files
from instructblip.recipe.schema import DataSet
from tests.testing import TURNS, bad_samples, write_json, write_json_lines, write_picture


def prepared(
    root: Path, form: str, split: str = "train", max_bad_rate: float = 0.0, **options: Any
) -> PreparedDataset:
    source = custom_source(CustomSet("mine", form, **options))
    out = root / "prepared"
    return prepare("mine", root, split, out, source=source, max_bad_rate=max_bad_rate)


def sides(root: Path, form: str, **options: Any) -> dict[str, list[str]]:
    """The images of each split."""
    return {
        split: [example.images[0] for example in prepared(root, form, split, **options)]
        for split in ("train", "val", "test")
    }


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for i in range(3):
        write_picture(tmp_path / f"{i}.png", seed=i)
    return tmp_path


EACH = {"train": ["0.png"], "val": ["1.png"], "test": ["2.png"]}
NAMES = [("train", "val", "test"), ("Training", "validation", " TEST "), ("train", "dev", "test")]


@pytest.mark.parametrize("names", NAMES)
def test_a_column_splits(names: tuple[str, ...], root: Path):
    rows = [{"image": f"{i}.png", "caption": "x", "split": n} for i, n in enumerate(names)]
    write_json_lines(root / "data.jsonl", *rows)
    assert sides(root, "table") == EACH
    turns = [{"image": r["image"], "conversations": TURNS, "fold": r["split"]} for r in rows]
    (root / "data.jsonl").unlink()
    write_json(root / "data.json", turns)
    found = sides(root, "llava_json", columns=(("split", "fold"),))
    assert {split: set(images) for split, images in found.items()} == {
        split: set(images) for split, images in EACH.items()
    }


@pytest.mark.parametrize(
    "names", [("train", "val", "test"), ("chest_training", "valid-0", "chest_test-00000-of-00001")]
)
def test_files_split(names: tuple[str, ...], root: Path):
    for i, name in enumerate(names):
        write_json_lines(root / f"{name}.jsonl", {"file_name": f"{i}.png", "caption": "x"})
    assert sides(root, "table") == EACH
    assert sides(root, "imagefolder") == EACH  # there is no metadata.jsonl
    (root / f"{names[1]}.jsonl").unlink()
    with pytest.raises(FileNotFoundError, match="named for training and none for the split val"):
        prepared(root, "table", "val")
    with pytest.raises(ValueError, match="no example"):
        prepared(root, "imagefolder", "val")


def test_files_that_name_no_training_split_nothing(root: Path):
    for i, name in enumerate(("test_results", "more")):
        write_json_lines(root / f"{name}.jsonl", {"image": f"{i}.png", "caption": "x"})
    assert sides(root, "table") == {split: ["1.png", "0.png"] for split in EACH}


@pytest.mark.parametrize("below", ["", "images"])
def test_folders_split(below: str, tmp_path: Path):
    for name in ("training", "dev"):
        write_picture(tmp_path / below / name / "0.png")
        (tmp_path / below / name / "0.txt").write_text("x")
    for split, name in (("train", "training"), ("val", "dev")):
        (example,) = prepared(tmp_path, "imagefolder", split)
        assert example.images == (str(Path(below) / name / "0.png"),)
    with pytest.raises(ValueError, match="no example"):  # and not those of training again
        prepared(tmp_path, "imagefolder", "test")


def test_a_folder_of_test_is_no_training_data(root: Path):
    for place in ("0", "1", "test/2"):
        (root / "test").mkdir(exist_ok=True)
        (root / f"{place}.txt").write_text("a heart")
    (root / "2.png").rename(root / "test/2.png")
    for split, names in {"train": ["0.png", "1.png"], "test": ["test/2.png"]}.items():
        assert [each.images[0] for each in prepared(root, "imagefolder", split)] == names
    with pytest.raises(ValueError, match="mine val: no example"):
        prepared(root, "imagefolder", "val")


def test_a_table_beside_folders_of_splits_is_named(root: Path):
    for i, name in enumerate(("train", "val", "test")):
        (root / name).mkdir()
        (root / f"{i}.png").rename(root / name / f"{i}.png")
        write_json_lines(root / name / "metadata.jsonl", {"file_name": f"{i}.png", "caption": "x"})
    write_json_lines(root / "metadata.jsonl", {"file_name": "train/0.png", "caption": "other"})
    with pytest.warns(UserWarning, match="its table is not read, since its images are in folders"):
        found = sides(root, "imagefolder")
    assert [Path(images[0]).name for images in found.values()] == ["0.png", "1.png", "2.png"]


def test_the_curves_of_a_run_are_no_data(root: Path):
    for i in range(3):
        (root / f"{i}.txt").write_text("a heart")
    run = root / "tuned/run"
    write_picture(run / "curves.png")
    assert len(walk_files(root)) == 7
    for name in RUN_FILES:
        (run / name).touch()
    assert len(walk_files(root)) == 6
    assert len(walk_files(run)) == 3, "a run is asked for itself"
    assert len(prepared(root, "imagefolder")) == 3


def test_saved_data_sets_name_their_splits_otherwise(root: Path):
    rows = {"image": [str(root / "0.png")], "caption": ["x"]}
    rows["image"] = ["0.png"]
    saved = datasets.Dataset.from_dict(rows)
    datasets.DatasetDict({"training": saved, "validation": saved}).save_to_disk(root / "saved")
    assert len(prepared(root, "hf_dataset", "val", path="saved")) == 1


@pytest.mark.parametrize(
    ("cells", "message"),
    [
        (("train", "fold3"), r"line 2: field 'split' is 'fold3'; expected one of train, training"),
        (("train", ""), r"line 2: field 'split' is ''; expected one of train"),
        (("train", None), r"line 2: field 'split' is missing .* in every row or in none"),
    ],
)
def test_splits_that_are_none(cells: tuple[str, ...], message: str, root: Path):
    rows = [{"image": f"{i}.png", "caption": "x", "split": n} for i, n in enumerate(cells)]
    write_json_lines(
        root / "data.jsonl", *({k: v for k, v in r.items() if v is not None} for r in rows)
    )
    with pytest.raises(ValueError, match=message):
        prepared(root, "table")
    assert len(prepared(root, "table", max_bad_rate=0.5)) == 1


# --- groups --------------------------------------------------------------------------------------


def grouped(root: Path, *groups: str, group: str = "patient", **options: Any) -> list[Example]:
    rows = [{"image": f"{i}.png", "caption": "x", "patient": p} for i, p in enumerate(groups)]
    write_json_lines(root / "data.jsonl", *rows)
    return list(prepared(root, "table", group=group, **options))


def test_a_group_is_a_column_or_a_part_of_the_path(root: Path):
    assert [e.extra for e in grouped(root, "a b", "c")] == [{"group": "a b"}, {"group": "c"}]
    assert [e.extra["group"] for e in grouped(root, "a", "b", group=r"(\d)\.png")] == ["0", "1"]
    turns = {"image": "0.png", "conversations": TURNS, "patient": 7}
    write_json(root / "turns.json", [turns])
    examples = prepared(root, "llava_json", path="turns.json", group="patient")
    assert {e.extra["group"] for e in examples} == {"7"}


@pytest.mark.parametrize(
    ("group", "message"),
    [
        (
            "patient_id",
            r"^mine: 2 rows have no column 'patient_id' for `group`; the columns are 'image', ",
        ),
        (r"p(\d+)_", r"line 1: `group` .* finds nothing in 0.png; expected one group"),
        ("patient", r"line 2: field 'patient' is ''; expected the group of the row"),
    ],
)
def test_groups_that_are_none(group: str, message: str, root: Path):
    with pytest.raises(ValueError, match=message):
        grouped(root, "a", "", group=group)


def test_a_row_has_one_group(root: Path):
    write_json_lines(root / "data.jsonl", {"image": ["0.png", "1.png"], "caption": "x"})
    with pytest.raises(ValueError, match=r"finds \['0', '1'\] in 0.png, 1.png; expected one"):
        prepared(root, "table", group=r"(\d)")


def test_groups_that_a_recipe_refuses():
    with pytest.raises(ValueError, match="is no regular expression"):
        DataSet(format="table", group="(")
    with pytest.raises(ValueError, match="only custom data has groups"):
        DataSet(group="patient")


# --- what training shares with evaluation --------------------------------------------------------


def checked(root: Path, rows: list[dict[str, Any]], **options: Any) -> Diagnosis:
    write_json_lines(root / "data.jsonl", *({"caption": "x", **row} for row in rows))
    train, test = (prepared(root, "table", split, **options) for split in ("train", "test"))
    check_dataset(test, perceptual=True)
    return check_dataset(train, evaluated=evaluated_by([test]), perceptual=True)


def test_a_group_on_both_sides_is_bad(root: Path):
    rows = [
        {"image": f"{i}.png", "split": split, "patient": patient}
        for i, (split, patient) in enumerate([("train", "a"), ("train", "b"), ("test", "b")])
    ]
    diagnosis = checked(root, rows, group="patient")
    assert (diagnosis.kinds, diagnosis.left_out) == ({"group on both sides": 1}, (1,))
    assert "line 2: group on both sides: 'b' is also in mine test" in diagnosis.describe()
    assert not checked(root, rows).kinds


def test_near_duplicates_are_listed(root: Path):
    image = Image.open(root / "2.png").convert("RGB").resize((320, 300), Image.Resampling.BICUBIC)
    image.save(root / "again.jpg", quality=70)
    image.save(root / "test.png")
    rows = [{"image": n, "split": "train"} for n in ("0.png", "again.jpg")]
    diagnosis = checked(root, [*rows, {"image": "test.png", "split": "test"}])
    assert (diagnosis.kinds, diagnosis.left_out) == ({"near-duplicate": 1}, ())
    (line,) = bad_samples(prepared(root, "table"))
    assert line["index"] == 1
    assert "again.jpg looks like test.png of mine test" in line["reason"]
    assert "at most 6 and 50 count as alike" in line["reason"]


def test_facts_of_an_earlier_version_gain_their_looks(root: Path):
    write_json_lines(root / "data.jsonl", {"image": "0.png", "caption": "x"})
    dataset = prepared(root, "table")
    file = dataset.path / FACTS_FILE
    with pa.ipc.open_stream(file.read_bytes()) as reader:
        earlier = reader.read_all().drop_columns(["colours"])
    with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_stream(sink, earlier.schema) as writer:
        writer.write_table(earlier)
    assert read_facts(file)["0.png"].look is None
    assert not check_dataset(dataset).kinds
    assert read_facts(file)["0.png"].look is None  # costs nothing where nobody compares
    check_dataset(dataset, perceptual=True)
    assert read_facts(file)["0.png"].look
