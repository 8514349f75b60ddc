"""What `show` prints is what the loader gives to the model."""

import re
from pathlib import Path

import numpy as np
import pytest

from instructblip.data.images import ImageTransform
from instructblip.data.loader import Loader
from instructblip.data.order import Mixture
from instructblip.data.prepared.prepare import prepare
from instructblip.data.reading.images import load_image
from instructblip.data.samples import ImageReader
from instructblip.data.show import (
    to_terminal,
    training_samples,
    write_page,
)
from instructblip.data.tokens import Tokens
from tests.testing import write_json, write_picture, write_vqa


@pytest.fixture
def loader(tmp_path: Path, tokens: Tokens) -> Loader:
    write_vqa(tmp_path / "vqav2", 30)
    record = {"video_id": 1, "question": "<script>?", "answer": "red", "id": 1}
    write_json(tmp_path / "msvdqa" / "annotations" / "train_qa.json", [record])
    for i in range(6):
        write_picture(tmp_path / "msvdqa" / "images" / "vid1" / f"{i}.png", seed=i)
    datasets = {
        name: prepare(name, tmp_path / name, "train", tmp_path / "out")
        for name in ("vqav2", "msvdqa")
    }
    mixture = Mixture({name: len(dataset) for name, dataset in datasets.items()})
    images = ImageReader(ImageTransform(image_size=16), num_frames=4)
    return Loader(datasets, mixture, tokens, images, batch_size=4)


def test_samples_are_those_of_training(loader: Loader):
    shown = list(training_samples(loader, 3))
    assert [one.name for one in shown] == ["vqav2"] * 3 + ["msvdqa"] * 3
    for one in shown:
        slots = range(one.step * 4, one.step * 4 + 4)
        ids = [token.id for token in one.language]
        samples = [loader.sample(slot) for slot in slots]
        same = [s for s in samples if s.prompt_ids + s.response_ids == ids]
        assert same
        assert [t.id for t in one.language if t.loss] == same[0].response_ids
        assert [t.id for t in one.qformer] == same[0].qformer_ids
        assert one.rendered.response in ("red", *one.example.answers)
    assert shown[0].language[-1].text == "<|end|>"
    assert len(shown[0].images) == 1
    assert len(shown[3].images) == 4


def test_images_are_those_that_the_model_sees(loader: Loader):
    one = next(training_samples(loader, 1))
    path = loader.datasets[0].image_root / one.example.images[0]
    expected = ImageTransform(image_size=16).resize(load_image(path))
    assert np.array_equal(np.asarray(one.images[0]), expected)


def test_show_names_the_frames_that_the_model_sees(loader: Loader, tmp_path: Path):
    *_, video = training_samples(loader, 1)
    assert video.image_names == tuple(f"vid1/{i}.png" for i in (0, 2, 3, 5))
    assert len(video.images) == 4
    assert f"image      {', '.join(video.image_names)}\n" in to_terminal(video, colour=False).plain
    page = write_page(tmp_path / "show.html", [video], {}).read_text(encoding="utf-8")
    assert "vid1/5.png" in page
    assert "vid1/1.png" not in page


def test_text_for_a_terminal(loader: Loader):
    one = next(training_samples(loader, 1))
    plain = to_terminal(one, colour=False).plain
    assert f"prompt     {one.rendered.prompt}\n" in plain
    assert "[<|end|>]" in plain
    labels = sum(token.loss for token in one.language)
    assert f"{labels} of {len(one.language)} carry loss (in brackets)" in plain
    drawn = to_terminal(one, colour=True)
    assert drawn.plain.count("▀") == 32 * 16
    assert any("bold green" in str(span.style) for span in drawn.spans)


def test_page_is_offline_and_escapes_text(loader: Loader, tmp_path: Path):
    page = write_page(tmp_path / "show.html", training_samples(loader, 2), {"model": "tiny"})
    text = page.read_text(encoding="utf-8")
    assert "<script>" not in text
    assert "&lt;script&gt;?" in text
    assert text.count("data:image/png;base64,") == 2 + 2 * 4
    assert not re.search(r"(src|href)=\"(?!data:|#)", text)
    labels = sum(token.loss for one in training_samples(loader, 2) for token in one.language)
    assert text.count('class="loss"') == labels + 1
