"""Preparation: memory-mapped, idempotent, cheap to send to a worker."""

import hashlib
import json
import os
import pickle
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

from instructblip.core.example import Example
from instructblip.core.files import locked
from instructblip.data.features import hash_images
from instructblip.data.prepared import images as facts_module
from instructblip.data.prepared import prepare as prepare_module
from instructblip.data.prepared.check import check_dataset, unchecked
from instructblip.data.prepared.dataset import PreparedDataset
from instructblip.data.prepared.images import read_facts, summary
from instructblip.data.prepared.prepare import (
    LOCK_FILE,
    Job,
    prepare,
    prepare_all,
)
from instructblip.data.reading.opened import note_files
from instructblip.data.sources import SOURCES, Source
from tests.testing import write_picture, write_vqa


def test_prepared_examples_equal_those_read(tmp_path: Path) -> None:
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
    source = Source(lambda root, split: iter([full] * 5000), "dialogue", "own", "none")
    data = prepare("own", tmp_path, "train", tmp_path / "out", source=source)
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


def test_a_file_that_appears_later_is_read(tmp_path: Path) -> None:
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
    prepared = prepare_all([*jobs, jobs[0]], workers=2)
    assert [data.name for data in prepared] == ["vqav2", "vqav2_question", "vqav2"]
    assert [len(data) for data in prepared] == [6, 6, 6]
    assert prepared[1][0].answers == ("what is 0?",)
    monkeypatch.setattr(prepare_module, "ProcessPoolExecutor", None)  # all is done: none starts
    assert len(prepare_all(jobs, workers=2)) == 2


def test_position_of_a_reader(tmp_path: Path) -> None:
    root = write_vqa(tmp_path, 4)
    size = sum(path.stat().st_size for path in (root / "annotations").iterdir())
    with note_files() as files:
        assert files.position() == (0, 0)
        examples = SOURCES["vqav2"].read(root, "train")
        next(examples)
        assert 0 < files.position()[0] <= files.position()[1] == size
        assert len(list(examples)) == 3
        assert files.position() == (size, size)


class Stopped(BaseException):
    """Raised like a signal that ends the program."""


def interrupted(read: Any, after: int) -> Source:
    """A source that stops after some examples; ``settings`` are those of the whole one."""

    def part(root: Path, split: str) -> Iterator[Example]:
        yield from islice(read(root, split), after)
        raise Stopped

    return Source(part, "vqa", "own", "none")


def test_an_interrupted_preparation_resumes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, out = write_vqa(tmp_path / "vqav2", 40), tmp_path / "out"
    (root / "images" / "COCO_train2014_000000000002.jpg").unlink()
    monkeypatch.setattr(prepare_module, "ROWS_PER_BATCH", 5)
    monkeypatch.setattr(prepare_module, "SAVE_SECONDS", -1.0)
    read = SOURCES["vqav2"].read
    whole = Source(read, "vqa", "own", "none")
    expected = prepare("own", root, "train", tmp_path / "other", source=whole, max_bad_rate=0.1)
    with pytest.raises(Stopped):
        prepare("own", root, "train", out, source=interrupted(read, 33), max_bad_rate=0.1)

    part = out / "own" / ".train.part"
    state = json.loads((part / "state.json").read_text())
    assert (state["tasks"], len(state["bad"])) == ({"vqa": 30}, 2)
    with (part / "data.arrow").open("ab") as file:
        file.write(b"half a batch")  # what a power cut leaves
    appended: list[str] = []
    real = prepare_module.to_batch
    monkeypatch.setattr(
        prepare_module, "to_batch", lambda e: (appended.extend(x.id for x in e), real(e))[1]
    )
    data = prepare("own", root, "train", out, source=whole, max_bad_rate=0.1)
    assert appended == [str(i) for i in range(32, 40)]
    assert list(data) == list(expected)
    differing = {"bytes"}  # batches are cut elsewhere
    for name in expected.manifest.keys() - differing:
        assert data.manifest[name] == expected.manifest[name], name
    bad = [(p.path / "bad_samples.jsonl").read_text() for p in (data, expected)]
    assert bad[0] == bad[1]
    assert [p.name for p in (out / "own").iterdir()] == ["train"]


@pytest.mark.parametrize("change", ["annotations", "pictures", "settings"])
def test_after_a_change_everything_is_read_again(
    change: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, out = write_vqa(tmp_path / "vqav2", 12), tmp_path / "out"
    image = root / "images" / "COCO_train2014_000000000000.jpg"
    content = image.read_bytes()
    image.unlink()
    monkeypatch.setattr(prepare_module, "ROWS_PER_BATCH", 2)
    monkeypatch.setattr(prepare_module, "SAVE_SECONDS", -1.0)
    read = SOURCES["vqav2"].read
    with pytest.raises(Stopped):
        prepare("own", root, "train", out, source=interrupted(read, 8), max_bad_rate=0.5)
    whole = Source(read, "vqa", "own", "none")
    if change == "annotations":
        write_vqa(root, 14)
    elif change == "pictures":
        image.write_bytes(content)
    else:
        whole = replace(whole, settings="others")
    data = prepare("own", root, "train", out, source=whole, max_bad_rate=0.5)
    count = {"annotations": (14, 0), "pictures": (12, 0), "settings": (10, 2)}[change]
    assert (len(data), data.manifest["bad"]) == count


def test_images_are_not_read_again_after_an_interruption(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, out = write_vqa(tmp_path / "vqav2", 8), tmp_path / "out"
    real, read = Path.read_bytes, []

    def some(path: Path) -> bytes:
        read.append(path.name)
        if len(read) == 3:
            raise Stopped
        return real(path)

    monkeypatch.setattr(facts_module, "_NAMES_PER_TASK", 1)
    monkeypatch.setattr(os, "cpu_count", lambda: 1)
    monkeypatch.setattr(Path, "read_bytes", some)
    with pytest.raises(Stopped):
        prepare("vqav2", root, "train", out)
    data = prepare("vqav2", root, "train", out)
    names = sorted(path.name for path in (root / "images").iterdir())
    assert set(names) <= set(read)
    assert [read.count(name) for name in names[:2]] == [1, 1]
    images = data.manifest["images"]
    assert images["count"] == 4
    assert images["bytes"] == sum(path.stat().st_size for path in (root / "images").iterdir())


def test_hashes_of_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root, out = write_vqa(tmp_path / "vqav2", 6), tmp_path / "out"
    data = prepare("vqav2", root, "train", out)
    facts = read_facts(data.path / "pictures.arrow")
    for name, fact in facts.items():
        assert fact.sha256 == hashlib.sha256((root / "images" / name).read_bytes()).digest()
    assert data.manifest["images"] == summary(facts)
    monkeypatch.setattr(
        facts_module, "examine_image", None
    )  # prepare has read them: they are not read again
    check_dataset(data)
    paths = [str(root / "images" / name) for name in facts]
    digests = hash_images(paths, data.facts())  # nor by a feature store
    assert digests == {path: facts[Path(path).name].sha256.hex() for path in paths}
    monkeypatch.undo()
    write_picture(root / "images" / "COCO_train2014_000000000001.jpg", seed=99)
    check_dataset(data)
    changed = PreparedDataset(data.path).manifest["images"]
    assert changed == summary(read_facts(data.path / "pictures.arrow")) != summary(facts)
    assert not unchecked(data)


def test_two_processes_prepare_one_set(tmp_path: Path) -> None:
    """The second waits for the first and returns its result."""
    root, out = write_vqa(tmp_path / "vqav2", 6), tmp_path / "out"
    folder = out / "vqav2" / ".train.part"
    made: list[PreparedDataset] = []
    second = Thread(target=lambda: made.append(prepare("vqav2", root, "train", out)))
    with locked(folder / LOCK_FILE):
        second.start()
        second.join(0.3)
        assert second.is_alive()
    second.join(30)
    assert [len(data) for data in made] == [6]
    assert [p.name for p in folder.parent.iterdir()] == ["train"]
