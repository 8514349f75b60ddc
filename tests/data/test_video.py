"""Frames of video files: evenly spaced, in RGB, extracted once."""

from pathlib import Path

import numpy as np
import pytest

from instructblip.data.prepared.prepare import prepare
from instructblip.data.reading.images import load_image
from tests.testing import write_json, write_video

pytest.importorskip("av")


def questions(root: Path) -> None:
    record = {"video_id": 1301, "question": "what?", "answer": "cook", "id": 5}
    write_json(root / "annotations" / "test_qa.json", [record])


def test_frames_are_evenly_spaced_and_rgb(tmp_path: Path):
    questions(tmp_path)
    red, blue = (250, 20, 20), (20, 20, 250)
    write_video(tmp_path / "images" / "vid1301.mp4", [red] * 40 + [blue] * 40)
    (example,) = prepare("msvdqa", tmp_path, "test", tmp_path / "out")
    assert [Path(name).stem for name in example.images] == [f"{5 * i + 2:06d}" for i in range(16)]
    for i, name in enumerate(example.images):
        mean = np.asarray(load_image(name, tmp_path / "images")).mean((0, 1))
        assert np.abs(mean - (red if i < 8 else blue)).max() < 25, name
    assert len(list((tmp_path / "images" / "extracted").iterdir())) == 1


def test_a_folder_of_frames_comes_first(tmp_path: Path):
    questions(tmp_path)
    write_video(tmp_path / "images" / "vid1301.mp4", [(9, 9, 9)] * 4)
    (tmp_path / "images" / "vid1301").mkdir()
    (tmp_path / "images" / "vid1301" / "0.jpg").touch()
    (example,) = prepare("msvdqa", tmp_path, "test", tmp_path / "out")
    assert example.images == ("vid1301/0.jpg",)


def test_a_video_without_frames_is_named(tmp_path: Path):
    questions(tmp_path)
    for folder in ("elsewhere", "vid1301"):
        (tmp_path / "images" / folder).mkdir(parents=True)
        with pytest.raises(ValueError, match=r"video '1301' is not in .*images; expected .*1301/"):
            prepare("msvdqa", tmp_path, "test", tmp_path / "out")


@pytest.mark.parametrize("content", [b"", b"no video at all", b"\0" * 5000])
def test_broken_videos_are_named(content: bytes, tmp_path: Path):
    questions(tmp_path)
    path = tmp_path / "images" / "vid1301.mp4"
    path.parent.mkdir()
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"vid1301\.mp4: cannot be decoded"):
        prepare("msvdqa", tmp_path, "test", tmp_path / "out")
    assert not (tmp_path / "images" / "extracted" / "vid1301.mp4").exists()
