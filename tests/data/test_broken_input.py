"""Broken files end in an error that names the file, the record and the remedy."""

import json
from pathlib import Path
from typing import Any

import pytest

from instructblip.data.prepared.dataset import PreparedDataset
from instructblip.data.prepared.prepare import prepare
from instructblip.data.reading import streaming as streaming_module
from instructblip.data.reading.streaming import stream_values
from instructblip.data.sources import SOURCES
from tests.testing import write_json, write_picture, write_vqa

GOOD = {"image": "VizWiz_1.jpg", "question": "What?", "answers": [{"answer": "cup"}]}


def vizwiz(root: Path, records: list[Any]) -> list[Any]:
    write_json(root / "annotations" / "val.json", records)
    return list(SOURCES["vizwiz"].read(root, "val"))


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"image": "a.jpg"}, r"val\.json:record 1: field 'question' is missing.*fields present"),
        (GOOD | {"question": 5}, r"record 1: field 'question' is 5; expected a string"),
        (GOOD | {"question": "x" * 100_001}, r"record 1: field 'question' has 100001 characters"),
        (GOOD | {"answers": "cup"}, r"record 1: field 'answers' .* expected a list of objects"),
        (GOOD | {"answers": [{}]}, r"record 1, answers 0: field 'answer' is missing"),
        (GOOD | {"image": "../a.jpg"}, r"record 1: image name '../a.jpg' .*leaves the image root"),
        (GOOD | {"image": "/etc/a.jpg"}, r"record 1: image name '/etc/a.jpg'"),
        (GOOD | {"image": "a\\..\\b.jpg"}, r"record 1: image name"),
        (["not", "an", "object"], r"record 1: is \['not'.*expected an object"),
        (GOOD | {"answers": [{"answer": float("nan")}]}, r"record 1 .*NaN is not a value of JSON"),
    ],
)
def test_bad_records_are_named(record: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        vizwiz(tmp_path, [GOOD, record])


@pytest.mark.parametrize("keep", [0.3, 0.6, 0.95])
def test_truncated_json(keep: float, tmp_path: Path) -> None:
    text = json.dumps([GOOD] * 20)
    path = write_json(tmp_path / "annotations" / "val.json", [])
    path.write_text(text[: int(len(text) * keep)], encoding="utf-8")
    with pytest.raises(ValueError, match=r"val\.json:record \d+ \(line 1\).*[Dd]ownload"):
        list(SOURCES["vizwiz"].read(tmp_path, "val"))


def test_files_that_are_no_json(tmp_path: Path) -> None:
    path = write_json(tmp_path / "annotations" / "val.json", [])
    for content in (b"", b"\xff\xfe\x00", b"<html>", b"[1,", b'{"a" 1}', b"[" * 5000):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"val\.json"):
            list(SOURCES["vizwiz"].read(tmp_path, "val"))


def test_missing_file_lists_what_was_tried(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"coco_karpathy_val\.json, captions_val2014\.json"):
        list(SOURCES["coco_caption"].read(tmp_path, "val"))


def test_broken_line_of_jsonl(tmp_path: Path) -> None:
    path = write_json(tmp_path / "annotations" / "test.jsonl", {})
    path.write_text('{"image": "a.jpg", "caption": "x", "label": 1}\n{"image": \n')
    with pytest.raises(ValueError, match=r"test\.jsonl:line 2: is not JSON"):
        list(SOURCES["vsr"].read(tmp_path, "test"))
    path.write_text('{"image": "a.jpg", "caption": "x", "label": 2}\n')
    with pytest.raises(ValueError, match=r"line 1: field 'label' is 2; expected 0 or 1"):
        list(SOURCES["vsr"].read(tmp_path, "test"))


def test_streaming_crosses_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values = [{"n": 123456, "t": 'a "quoted" \u2028 text', "l": [1, [2.5]]}, 1234567, None] * 20
    path = write_json(tmp_path / "a.json", {"skip": {"x": [1, {"y": 2}]}, "n": 5, "data": values})
    for chunk in (1, 7, 64):
        monkeypatch.setattr(streaming_module, "CHUNK", chunk)
        assert [value for _, value in stream_values(path, "data")] == values
    with pytest.raises(ValueError, match=r"field 'other' is missing"):
        list(stream_values(path, "other"))


def test_value_that_never_closes_is_bounded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streaming_module, "CHUNK", 64)
    monkeypatch.setattr(streaming_module, "MAX_VALUE", 1000)
    path = tmp_path / "a.json"
    path.write_text('[{"a": "' + "x" * 100_000)
    with pytest.raises(ValueError, match=r"a\.json:record 0.*more than 1000 characters"):
        list(stream_values(path))


def test_missing_images_stop_or_are_counted(tmp_path: Path) -> None:
    root = write_vqa(tmp_path / "vqav2", 8)
    lost = root / "images" / "COCO_train2014_000000000002.jpg"
    lost.rename(lost.with_suffix(".JPG"))
    with pytest.raises(ValueError, match=r"(?s)2 of 8 samples are bad.*questions\.json:record 4: "):
        prepare("vqav2", root, "train", tmp_path / "out")
    assert not (tmp_path / "out" / "vqav2" / "train").exists()
    listed = (tmp_path / "out" / "vqav2" / "train.bad_samples.jsonl").read_text().splitlines()
    assert json.loads(listed[0])["kind"] == "missing image"

    data = prepare("vqav2", root, "train", tmp_path / "out", max_bad_rate=0.25)
    assert len(data) == 6
    assert data.manifest["bad_reasons"] == {"missing image": 2}
    lines = (data.path / "bad_samples.jsonl").read_text().splitlines()
    bad = [json.loads(line) for line in lines]
    assert [line["record"] for line in bad] == ["record 4", "record 5"]
    ending = f"000000000002.jpg does not exist; did you mean {lost.stem}.JPG?"
    assert bad[0]["reason"].endswith(ending)


def test_training_example_without_answers(tmp_path: Path) -> None:
    write_json(tmp_path / "annotations" / "train.json", [GOOD, GOOD | {"answers": []}])
    write_picture(tmp_path / "images" / "VizWiz_1.jpg")
    with pytest.raises(
        ValueError, match=r"train\.json:record 1: a training example needs an answer"
    ):
        prepare("vizwiz", tmp_path, "train", tmp_path / "out")
    (tmp_path / "annotations" / "train.json").rename(tmp_path / "annotations" / "test.json")
    assert len(prepare("vizwiz", tmp_path, "test", tmp_path / "out")) == 2


def test_questions_without_annotations_are_not_lost(tmp_path: Path) -> None:
    root = write_vqa(tmp_path, 4)
    path = root / "annotations" / "v2_mscoco_train2014_annotations.json"
    value = json.loads(path.read_text())
    write_json(path, {"annotations": value["annotations"][1:]})
    assert [bool(e.answers) for e in SOURCES["vqav2"].read(root, "train")] == [False] + [True] * 3
    value["annotations"][0]["question_id"] = 99
    write_json(path, value)
    with pytest.raises(ValueError, match="1 annotations have no question"):
        list(SOURCES["vqav2"].read(root, "train"))


def test_failed_preparation_leaves_the_last_one(tmp_path: Path) -> None:
    root = write_vqa(tmp_path / "vqav2", 4)
    before = prepare("vqav2", root, "train", tmp_path / "out")
    path = root / "annotations" / "v2_OpenEnded_mscoco_train2014_questions.json"
    path.write_text(path.read_text()[:-30])
    with pytest.raises(ValueError, match="not readable as JSON"):
        prepare("vqav2", root, "train", tmp_path / "out")
    assert len(PreparedDataset(before.path)) == 4
    assert [p.name for p in before.path.parent.iterdir()] == ["train"]
