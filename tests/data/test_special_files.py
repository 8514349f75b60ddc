"""Pipes, devices, links to them and files of terabytes are refused at once."""

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from instructblip.data.custom.folder import read_folder
from instructblip.data.prepared.images import gather_facts
from instructblip.data.reading.images import load_image
from instructblip.data.reading.records import read_json, read_table
from instructblip.data.reading.shards import read_parquet, read_shard
from tests.testing import write_picture


def pipe(path: Path) -> None:
    os.mkfifo(path)


def linked_pipe(path: Path) -> None:
    os.mkfifo(path.with_name("elsewhere"))
    path.symlink_to("elsewhere")


def device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def terabytes(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(1 << 41)


SPECIAL = [pipe, linked_pipe, device, terabytes]


@pytest.fixture(autouse=True)
def patience() -> Iterator[None]:
    """A reader that waits, or reads for ever, fails after ten seconds."""

    def late(*_args: object) -> None:
        raise TimeoutError("waits for a special file")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(10)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("make", SPECIAL)
def test_among_images(make: Callable[[Path], None], tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    make(tmp_path / "images" / "a.jpg")
    with pytest.raises(ValueError, match=r"a\.jpg: cannot be read: .*(pipe, a device|larger)"):
        load_image("images/a.jpg", tmp_path)
    ((_, fact),) = gather_facts(["images/a.jpg"], tmp_path, {})
    assert "pipe, a device" in fact.fault or "bytes" in fact.fault
    (tmp_path / "data.csv").write_text("image,answer\nimages/a.jpg,yes\n")
    with pytest.raises(ValueError, match=r"a\.jpg: cannot be read"):
        read_folder(tmp_path)


READERS = {
    "json": lambda path: read_json(path),
    "jsonl": lambda path: read_json(path),
    "csv": lambda path: read_table(path),
    "parquet": lambda path: read_parquet(path),
    "tar": lambda path: read_shard(path, path.name),
}


@pytest.mark.parametrize("kind", READERS)
@pytest.mark.parametrize("make", SPECIAL)
def test_among_annotations(make: Callable[[Path], None], kind: str, tmp_path: Path) -> None:
    path = tmp_path / f"data.{kind}"
    make(path)
    with pytest.raises(ValueError, match=rf"{path.name} (is a pipe, a device|has 2199023255552)"):
        next(iter(READERS[kind](path)))


@pytest.mark.parametrize("make", SPECIAL)
def test_in_a_folder_of_images(make: Callable[[Path], None], tmp_path: Path) -> None:
    write_picture(tmp_path / "a.jpg", (8, 8))
    make(tmp_path / "metadata.csv")
    with pytest.raises(ValueError, match=r"metadata\.csv (is a pipe, a device|has 2199023255552)"):
        read_folder(tmp_path)


def test_a_table_whose_line_does_not_end(tmp_path: Path) -> None:
    path = tmp_path / "data.csv"
    with path.open("wb") as file:
        file.write(b"image,answer\n")
        file.truncate(1 << 37)
    with pytest.raises(ValueError, match=r"data\.csv:line 2 is not readable as CSV \(more than"):
        list(read_table(path))
