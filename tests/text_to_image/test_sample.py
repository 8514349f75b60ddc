"""Guided sampling, the painter, saving and loading, the engine and the command line."""

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from instructblip.cli.main import main
from instructblip.inference.engine import Engine
from instructblip.text_to_image.batches import DrawLoader
from instructblip.text_to_image.model import TextToImage
from instructblip.text_to_image.pretrained import (
    FOLDER,
    from_pretrained,
    save_addition,
    save_pretrained,
)
from instructblip.text_to_image.sample import Painter, sample
from tests.testing import write_picture

ASKED = "what is red?"


def same(left: Image.Image, right: Image.Image) -> bool:
    return np.array_equal(np.asarray(left), np.asarray(right))


@pytest.fixture
def saved(model: TextToImage, tmp_path: Path) -> Path:
    save_pretrained(model, tmp_path / "saved")
    return tmp_path / "saved"


def test_scales_combine_as_in_the_formula(model: TextToImage, loader: DrawLoader, monkeypatch):
    """One step of a decoder that answers with a fixed value for each of the three conditions."""
    batch = loader.batch(0)
    values = {"both": 5.0, "image": 3.0, "none": 2.0}

    def condition(features, index, ids, mask):
        text = bool(mask.any())
        kind = "both" if text else "image" if (index >= 0).any() else "none"
        return torch.full((len(ids), 1, 16), values[kind]), torch.ones(len(ids), 1).bool()

    monkeypatch.setattr(model, "condition", condition)
    decoder = model.decoder
    monkeypatch.setattr(
        decoder, "predict", lambda x, t, c, m: c[:, :, :1, None].expand(-1, 3, 1, 1)
    )
    monkeypatch.setattr(
        decoder, "sample", lambda guided, n, steps, g: guided(torch.zeros(n, 3, 1, 1), 1.0)
    )

    def drawn(**scales) -> float:
        return sample(model, batch, **scales).flatten()[0].item()

    assert drawn(guidance=1.0) == pytest.approx(5)
    assert drawn(guidance=3.0) == pytest.approx(2 + 3 * (5 - 2))
    assert drawn(guidance=3.0, image_guidance=1.5) == pytest.approx(2 + 1.5 * 1 + 3 * 2)
    assert drawn(guidance=0.0, image_guidance=1.0) == pytest.approx(3)


def test_a_seed_draws_the_same_again(painter: Painter, tmp_path: Path):
    first = painter.draw(ASKED, num_images=2, seed=4, steps=3)
    again = painter.draw(ASKED, num_images=2, seed=4, steps=3)
    assert [p.size for p in first] == [(16, 16)] * 2
    assert all(map(same, first, again))
    assert not same(*first)
    assert not same(first[0], painter.draw(ASKED, seed=5, steps=3)[0])
    subject = write_picture(tmp_path / "a.png", seed=1)
    assert not same(first[0], painter.draw(ASKED, subject, seed=4, steps=3)[0])


def test_the_batch_size_changes_no_image(painter: Painter):
    from instructblip.text_to_image.measure import fresh_prompts

    examples = fresh_prompts("subject", 2) + fresh_prompts("one_object", 3)
    together = painter.draw_examples(examples, torch.Generator().manual_seed(1), steps=2)
    single = Painter(painter.model, painter.tokens, painter.transform, batch_size=1)
    alone = single.draw_examples(examples, torch.Generator().manual_seed(1), steps=2)
    for one, other in zip(together, alone, strict=True):
        difference = np.asarray(one).astype(int) - np.asarray(other).astype(int)
        assert abs(difference).max() <= 1  # rounding


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"instruction": "  "}, "empty; state what to draw"),
        ({"instruction": "red " * 2000}, "8000 characters, expected at most 2000"),
        ({"instruction": "red " * 100}, "tokens and the Q-Former reads at most"),
        ({"num_images": 0}, "num_images must be 1 to 64; got 0"),
        ({"guidance": math.nan}, "guidance must be a finite number; got nan"),
        ({"image_guidance": math.inf}, "guidance must be a finite number; got inf"),
        ({"seed": 10**20}, "seed must be 0 to"),
        ({"steps": 0}, "steps must be 1 to 1000; got 0"),
    ],
)
def test_bad_requests_are_refused(painter: Painter, arguments: dict, message: str):
    with pytest.raises(ValueError, match=message):
        painter.draw(**{"instruction": ASKED, **arguments})


def test_unreadable_images_are_named(painter: Painter, tmp_path: Path):
    with pytest.raises(FileNotFoundError, match=r"nothing\.png"):
        painter.draw(ASKED, tmp_path / "nothing.png")
    (tmp_path / "cut.png").write_bytes(b"\x89PNG\r\n")
    with pytest.raises(ValueError, match=r"cut\.png.*cannot be decoded"):
        painter.draw(ASKED, tmp_path / "cut.png")


def test_a_loaded_model_draws_the_same(painter: Painter, saved: Path):
    expected = painter.draw(ASKED, seed=1, steps=3)[0]
    assert same(expected, Painter.from_pretrained(saved).draw(ASKED, seed=1, steps=3)[0])
    engine = Engine.from_pretrained(saved, device="cpu")
    assert same(expected, engine.draw(ASKED, seed=1, steps=3)[0])
    assert isinstance(engine.answer(expected, ASKED), str)


def test_half_precision_is_half_the_size(model: TextToImage, tmp_path: Path):
    for name, dtype in (("full", torch.float32), ("half", torch.float16)):
        save_addition(model, tmp_path / name, dtype)
    sizes = [(tmp_path / n / "model.safetensors").stat().st_size for n in ("full", "half")]
    assert sizes[1] < 0.6 * sizes[0]


def test_another_qformer_is_refused(saved: Path, directory: Path, tmp_path: Path):
    other = shutil.copytree(directory, tmp_path / "other")
    shutil.copytree(saved / FOLDER, other / FOLDER)
    assert isinstance(from_pretrained(other), TextToImage)  # the same weights, elsewhere
    config = json.loads((saved / FOLDER / "config.json").read_text())
    config["qformer"] = "0" * 16
    (other / FOLDER / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"another Q-Former.*instructblip train draw"):
        from_pretrained(other)


def test_a_directory_without_a_decoder_names_the_remedy(directory: Path):
    with pytest.raises(FileNotFoundError, match=r"cannot draw.*instructblip train draw"):
        Engine.from_pretrained(directory, device="cpu").draw(ASKED)


def test_a_decoder_of_another_width_is_refused(saved: Path):
    config = json.loads((saved / FOLDER / "config.json").read_text())
    config["decoder"]["condition_width"] = 24
    (saved / FOLDER / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="width 16, the decoder reads 24"):
        from_pretrained(saved)


def test_the_command_line_draws(saved: Path, tmp_path: Path, capsys):
    out = tmp_path / "images" / "x.png"
    arguments = ["draw", ASKED, "--model", str(saved), "--seed", "3", "--steps", "2"]
    with pytest.raises(SystemExit, match="0"):
        main([*arguments, "--out", str(out), "--num-images", "2"])
    assert Image.open(out.with_stem("x_1")).size == (16, 16)
    with pytest.raises(SystemExit, match="2"):
        main([*arguments, "--out", "x.txt"])
    assert "expected a file that ends in .png" in capsys.readouterr().err
