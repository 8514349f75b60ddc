"""Folders and files without read permission are named in errors and never ignored."""

import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from instructblip.data.custom.folder import read_folder
from instructblip.data.prepared.check import check_dataset
from instructblip.data.prepared.prepare import prepare
from instructblip.data.sources import SOURCES
from tests.testing import (
    bad_samples,
    prepare_vizwiz,
    read_custom,
    write_json,
    write_picture,
    write_vqa,
)

NOBODY = 65534


@contextmanager
def as_a_user() -> Iterator[None]:
    """Runs the test as a user whom permissions apply to."""
    if os.geteuid():
        yield
        return
    os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder of that user, since pytest's folders belong to root."""
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o777)
        yield Path(name)
        for path in Path(name).rglob("*"):
            path.chmod(0o777)


@contextmanager
def shut(path: Path) -> Iterator[None]:
    """Nobody may read ``path`` inside the block."""
    mode = path.stat().st_mode
    path.chmod(0)
    try:
        with as_a_user():
            yield
    finally:
        path.chmod(mode)


def custom_folder(root: Path) -> None:
    for name in ("a/0.png", "b/1.png"):
        write_picture(root / name)
        (root / name).with_suffix(".txt").write_text("A cup.")


def custom_tables(root: Path) -> None:
    for part in ("a", "b"):
        write_json(root / part / "rows.json", [{"image": "x.png", "answer": "cup"}])


def icons(root: Path) -> None:
    for part in ("a", "b"):
        problem = {"question": "How many?", "choices": ["3", "4"], "answer": 1}
        write_json(root / "images" / "test" / "choose_txt" / part / "data.json", problem)


def frames(root: Path) -> None:
    write_json(root / "annotations" / "test_qa.json", [{"id": 1, "video_id": "b", "question": "?"}])
    write_picture(root / "images" / "b" / "0.png")


CASES: dict[str, tuple[Callable[[Path], None], str, Callable[[Path], Any]]] = {
    "imagefolder": (custom_folder, "b", lambda root: read_custom(root, "imagefolder")),
    "tune": (custom_folder, "b", read_folder),
    "table": (custom_tables, "b", lambda root: read_custom(root, "table", path="*/*.json")),
    "deep table": (custom_tables, "b", lambda root: read_custom(root, "table", path="**/*.json")),
    "table, root": (custom_tables, ".", lambda root: read_custom(root, "table", path="*/*.json")),
    "file": (
        custom_tables,
        "b/rows.json",
        lambda root: read_custom(root, "table", path="*/*.json"),
    ),
    "iconqa": (
        icons,
        "images/test/choose_txt/b",
        lambda r: list(SOURCES["iconqa"].read(r, "test")),
    ),
    "msvdqa": (frames, "images/b", lambda r: list(SOURCES["msvdqa"].read(r, "test"))),
    "annotations": (frames, "annotations", lambda r: list(SOURCES["msvdqa"].read(r, "test"))),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_unreadable_files_and_folders_are_named(case: tuple[Any, ...], folder: Path) -> None:
    write, name, read = case
    write(folder)
    for path in [folder, *folder.rglob("*")]:
        path.chmod(0o755)
        os.chown(path, NOBODY if os.geteuid() == 0 else -1, -1)
    read(folder)  # imports all modules that it needs while they are readable
    with as_a_user():
        read(folder)
    with shut(folder / name), pytest.raises((ValueError, PermissionError)) as raised:
        read(folder)
    assert str(folder / name) in str(raised.value)


def test_images_in_an_unreadable_folder_are_listed(folder: Path) -> None:
    root = write_vqa(folder / "vqav2", 4)
    inside = root / "images" / "train2014"
    inside.mkdir()
    (root / "images" / "COCO_train2014_000000000000.jpg").rename(
        inside / "COCO_train2014_000000000000.jpg"
    )
    out = folder / "out"
    out.mkdir()
    out.chmod(0o777)
    with (
        shut(inside),
        pytest.raises(ValueError, match="cannot be read: Permission denied") as error,
    ):
        prepare("vqav2", root, "train", out, max_bad_rate=0.1)
    assert str(inside) in str(error.value)
    assert "questions.json:record 0: folder" in str(error.value)


def test_an_image_without_permission_is_a_bad_sample(folder: Path) -> None:
    dataset = prepare_vizwiz(folder, [{}, {}])
    for path in [folder, *folder.rglob("*")]:
        path.chmod(0o777)
    check_dataset(dataset)
    os.utime(folder / "images" / "train1.png", ns=(1, 1))  # so that it is read again
    with shut(folder / "images" / "train1.png"):
        diagnosis = check_dataset(dataset)
    assert diagnosis.left_out == (1,)
    assert "train1.png: cannot be read: Permission denied" in bad_samples(dataset)[0]["reason"]
