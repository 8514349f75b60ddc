"""Preparation: memory-mapped, idempotent, cheap to send to a worker."""

import json
import os
import pickle
from pathlib import Path

import pytest

from instructblip.batch import Example
from instructblip.data import prepare as prepare_module
from instructblip.data.prepare import Job, PreparedDataset, prepare, prepare_all
from instructblip.data.sources import SOURCES, Source
from instructblip.data.sources.opened import note_files
from tests.data.tiny import write_vqa


def test_examples_come_back_as_they_were_read(tmp_path: Path) -> None:
    full = Example(
        dataset="own",
        split="train",
        id="7",
        images=("a.jpg", "b.jpg"),
        task="dialogue",
        question="q",
        answers=("a", "b"),
        choices=("a", "c"),
        context="c",
        ocr_tokens=("t",),
        history=(("q1", "a1"), ("q2", "a2")),
        where="file.json:record 7",
        extra={"label": 1, "scores": [0.5]},
    )
    (tmp_path / "images").mkdir()
    for name in full.images:
        (tmp_path / "images" / name).touch()
    own = Source(lambda root, split: iter([full] * 5000), "dialogue", "own", "none")
    data = prepare("own", tmp_path, "train", tmp_path / "out", source=own)
    assert len(data) == 5000
    assert data[0] == data[4999] == full
    assert data.image_root == tmp_path / "images"
    with pytest.raises(IndexError):
        data[5000]


def test_datasets_library_opens_the_file(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    data = prepare("vqav2", write_vqa(tmp_path, 3), "train", tmp_path / "out")
    opened = datasets.Dataset.from_file(str(data.path / "data.arrow"))
    assert opened[2]["question"] == "what is 2?"


def test_manifest_and_idempotence(tmp_path: Path) -> None:
    root = write_vqa(tmp_path / "vqav2", 6)
    data = prepare("vqav2", root, "train", tmp_path / "out")
    manifest = data.manifest
    assert (manifest["count"], manifest["tasks"], manifest["bad"]) == (6, {"vqa": 6}, 0)
    assert manifest["licence"] == SOURCES["vqav2"].licence
    files = {entry["file"]: entry for entry in manifest["annotations"]}
    assert len(files) == 2
    assert all(len(entry["sha256"]) == 64 and entry["bytes"] > 0 for entry in files.values())

    marker = data.path / "data.arrow"
    made = marker.stat().st_mtime_ns
    prepare("vqav2", root, "train", tmp_path / "out")
    annotations = root / "annotations" / "v2_mscoco_train2014_annotations.json"
    os.utime(annotations)  # touched, but the same content
    prepare("vqav2", root, "train", tmp_path / "out")
    assert marker.stat().st_mtime_ns == made

    write_vqa(root, 8)
    assert len(prepare("vqav2", root, "train", tmp_path / "out")) == 8


def test_a_file_that_appears_later_is_noticed(tmp_path: Path) -> None:
    record = {"question_id": 1, "image_id": "a", "question": "q", "answers": ["x"]}
    (tmp_path / "annotations").mkdir()
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.jpg").touch()
    (tmp_path / "annotations" / "TextVQA_0.5.1_val.json").write_text(json.dumps({"data": [record]}))
    assert prepare("textvqa", tmp_path, "val", tmp_path / "out")[0].ocr_tokens == ()
    ocr = {"data": [{"image_id": "a", "ocr_tokens": ["stop"]}]}
    (tmp_path / "annotations" / "TextVQA_Rosetta_OCR_v0.2_val.json").write_text(json.dumps(ocr))
    assert prepare("textvqa", tmp_path, "val", tmp_path / "out")[0].ocr_tokens == ("stop",)


def test_a_copy_for_a_worker_is_small(tmp_path: Path) -> None:
    data = prepare("vqav2", write_vqa(tmp_path, 40), "train", tmp_path / "out")
    first = data[0]
    sent = pickle.dumps(data)
    assert len(sent) < 3000
    assert pickle.loads(sent)[0] == first


def test_unknown_names(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no data source 'vqa2'; expected one of aokvqa"):
        prepare("vqa2", tmp_path, "train", tmp_path)
    with pytest.raises(FileNotFoundError, match="not a prepared data set"):
        PreparedDataset(tmp_path)
    with pytest.raises(ValueError, match="split 'dev'"):
        prepare("vqav2", tmp_path, "dev", tmp_path)


def test_sets_are_prepared_side_by_side(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_vqa(tmp_path, 6)
    monkeypatch.setattr(prepare_module, "PARALLEL_BYTES", 1)
    names = ("vqav2", "vqav2_question")
    jobs = [Job(name, tmp_path, "train", tmp_path / "out", SOURCES[name]) for name in names]
    found = prepare_all([*jobs, jobs[0]], workers=2)
    assert [data.name for data in found] == ["vqav2", "vqav2_question", "vqav2"]
    assert [len(data) for data in found] == [6, 6, 6]
    assert found[1][0].answers == ("what is 0?",)
    monkeypatch.setattr(prepare_module, "ProcessPoolExecutor", None)  # all is done: none starts
    assert len(prepare_all(jobs, workers=2)) == 2


def test_how_far_a_reader_is(tmp_path: Path) -> None:
    root = write_vqa(tmp_path, 4)
    size = sum(path.stat().st_size for path in (root / "annotations").iterdir())
    with note_files() as files:
        assert files.position() == (0, 0)
        examples = SOURCES["vqav2"].read(root, "train")
        next(examples)
        assert 0 < files.position()[0] <= files.position()[1] == size
        assert len(list(examples)) == 3
        assert files.position() == (size, size)
