"""Every reader reads a hand-made miniature of its owner's file."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from instructblip.core.example import Example
from instructblip.data.prepared.prepare import prepare
from instructblip.data.reading.members import read_image
from instructblip.data.reading.opened import note_files
from instructblip.data.sources import SOURCES
from instructblip.data.templates import TEMPLATES
from tests.data.miniatures import CASES, VISDIAL, write_files
from tests.testing import bad_samples, write_json, write_tar


@pytest.mark.parametrize("case", CASES, ids=[f"{c[0]}-{c[1]}-{i}" for i, c in enumerate(CASES)])
def test_miniature(case: tuple[Any, ...], tmp_path: Path) -> None:
    name, split, files, index, expected, count = case
    write_files(tmp_path, files)
    examples = list(SOURCES[name].read(tmp_path, split))
    assert len(examples) == count
    got = {field: getattr(examples[index], field) for field in expected}
    assert got == expected
    for example in examples:
        assert isinstance(example, Example)
        assert (example.dataset, example.split) == (name, split)
        assert example.task == SOURCES[name].task
        assert example.where


def test_every_source_has_a_miniature_and_templates() -> None:
    assert {case[0] for case in CASES} == set(SOURCES)
    assert {source.task for source in SOURCES.values()} <= set(TEMPLATES)


def test_shards_of_web_capfilt(tmp_path: Path) -> None:
    """As img2dataset writes them; an owner's list of URLs is refused as such."""
    facts = json.dumps({"url": "https://images.example/1.jpg", "caption": "a cup"}).encode()
    files = {"0.jpg": b"\xff\xd8\xff picture", "0.txt": b"a cup", "0.json": facts}
    write_tar(tmp_path / "00000.tar", files)
    (example,) = SOURCES["web_capfilt"].read(tmp_path, "train")
    assert (example.answers, example.dataset) == (("a cup",), "web_capfilt")
    assert (
        read_image(tmp_path / SOURCES["web_capfilt"].images / example.images[0]) == files["0.jpg"]
    )
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["00000.tar"]
    write_tar(tmp_path / "00001.tar", {"1.jpg": b"\xff\xd8\xff", "1.txt": b"a" * 100_001})
    with note_files() as files:
        rows = SOURCES["web_capfilt"].read(tmp_path, "train")
        assert [isinstance(row, ValueError) for row in rows] == [False, True]
    size = sum(path.stat().st_size for path in tmp_path.glob("*.tar"))
    assert files.position() == (size, size)  # what the progress bar shows
    rows = prepare("web_capfilt", tmp_path, "train", tmp_path / "out", max_bad_rate=0.5)
    assert len(rows) == 1
    assert [bad["kind"] for bad in bad_samples(rows)] == ["bad row"]
    shutil.rmtree(tmp_path / "out")
    record = {"url": "https://images.example/1.jpg", "caption": "a cup"}
    write_json(tmp_path / "annotations" / "ccs_synthetic_filtered_large.json", [record])
    with pytest.raises(ValueError, match=r"record 0: field 'image' is missing.*from its URL"):
        list(SOURCES["web_capfilt"].read(tmp_path, "train"))


@pytest.mark.parametrize("folder", ["images/test", "images"])
@pytest.mark.parametrize("name", ["scienceqa", "iconqa"])
def test_an_archive_without_its_folders_is_not_one_image_for_all(
    name: str, folder: str, tmp_path: Path
) -> None:
    problem = {"question": "Which?", "choices": ["a", "b"], "answer": 0, "split": "test"}
    files: dict[str, Any] = {
        "annotations/problems.json": {k: {**problem, "image": "image.png"} for k in ("17", "18")},
        "annotations/iconqa_test.json": [
            {**problem, "image": f"test/{k}/image.png"} for k in ("17", "18")
        ],
        f"{folder}/image.png": "",
    }
    write_files(tmp_path, files)
    with pytest.raises(
        ValueError,
        match=r"'test/17/image.png' nor 'test/18/image.png' is in .*"
        "the archive was unpacked without its folders; unpack it again",
    ):
        list(SOURCES[name].read(tmp_path, "test"))


def test_missing_images_are_named_as_the_file_writes_them(tmp_path: Path) -> None:
    joined = [
        {"question_id": i, "question": "What?", "answer": ["a"], "image": f"{folder}/COCO_{i}.jpg"}
        for i, folder in enumerate(["train2014", "val2014", "val2014"])
    ]
    files: dict[str, Any] = {
        "annotations/vqa_train.json": joined,
        "images/train2014/COCO_0.jpg": "",
        "images/COCO_1.jpg": "",
    }
    write_files(tmp_path, files)
    examples = SOURCES["vqav2"].read(tmp_path, "train")
    names = ["train2014/COCO_0.jpg", "COCO_1.jpg", "val2014/COCO_2.jpg"]
    assert [example.images for example in examples] == [(name,) for name in names]


def test_images_are_searched_in_all_folders_of_their_archives(tmp_path: Path) -> None:
    question = {"question_id": "q", "question": "What?", "image_id": 7}
    files = {"annotations/aokvqa_v1p0_val.json": [question], "images/train2014/": None}
    write_files(tmp_path, {**files, "images/val2014/000000000007.jpg": ""})
    (example,) = SOURCES["aokvqa_direct"].read(tmp_path, "val")
    assert example.images == ("val2014/000000000007.jpg",)


def test_difficult_direct_answers_are_marked(tmp_path: Path) -> None:
    question = {"question": "What?", "image_id": 7, "direct_answers": ["a"] * 10}
    marked = [{**question, "question_id": i, "difficult_direct_answer": i == 1} for i in range(2)]
    write_files(tmp_path, {"annotations/aokvqa_v1p0_val.json": marked})
    examples = SOURCES["aokvqa_direct"].read(tmp_path, "val")
    assert [e.extra for e in examples] == [{}, {"difficult_direct_answer": True}]


def test_the_list_of_nocaps_of_lavis_is_named(tmp_path: Path) -> None:
    listed = [{"image": "val/0013ea2087020901.jpg", "img_id": 0}]
    write_files(tmp_path, {"annotations/nocaps_val.json": listed})
    with pytest.raises(ValueError, match=r"LAVIS's list of images, without captions.*4500_capt"):
        list(SOURCES["nocaps"].read(tmp_path, "val"))


@pytest.mark.parametrize("line", ["10.jpg\tA man.", "10.jpg#x\tA man.", "10.jpg#1 A man.", "#"])
def test_broken_lines_of_flickr(line: str, tmp_path: Path) -> None:
    files = {"annotations/results_20130124.token": line, "annotations/test.txt": "10"}
    write_files(tmp_path, files)
    with pytest.raises(ValueError, match=r"results_20130124\.token:line 1: is '.*expected"):
        list(SOURCES["flickr30k"].read(tmp_path, "test"))


def test_visdial_train_images_are_in_either_half_of_coco(tmp_path: Path) -> None:
    image = "images/val2014/COCO_val2014_000000000185.jpg"
    files = {"annotations/visdial_1.0_train.json": VISDIAL, "images/train2014/": None, image: ""}
    write_files(tmp_path, files)
    first = next(iter(SOURCES["visual_dialog"].read(tmp_path, "train")))
    assert first.images == ("val2014/COCO_val2014_000000000185.jpg",)
    assert first.choices == ()
