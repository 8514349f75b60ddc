"""Frechet distance, cycle check, CLIP score, gallery."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from instructblip.scenes.world import Thing
from instructblip.text_to_image.gallery import write_gallery
from instructblip.text_to_image.metrics import (
    clip_score,
    cycle_check,
    frechet_distance,
    vit_features,
)


def test_frechet_distance_of_known_gaussians():
    rng = np.random.default_rng(0)
    left = rng.normal(size=(400, 3))
    assert frechet_distance(left, left) == pytest.approx(0, abs=1e-8)
    assert frechet_distance(left, left + 2) == pytest.approx(12)  # 3 axes, 2 squared
    # commuting covariances C and 9 C: trace of (1 - 3)^2 C
    trace = np.trace(np.cov(left, rowvar=False))
    wider = 3 * (left - left.mean(0)) + left.mean(0)
    assert frechet_distance(left, wider) == pytest.approx(4 * trace)
    from scipy.linalg import sqrtm

    right = rng.normal(size=(300, 3)) @ rng.normal(size=(3, 3))
    a, b = np.cov(left, rowvar=False), np.cov(right, rowvar=False)
    expected = ((left.mean(0) - right.mean(0)) ** 2).sum() + np.trace(a + b - 2 * sqrtm(a @ b).real)
    assert frechet_distance(left, right) == pytest.approx(expected)


def test_frechet_distance_refuses_what_has_no_covariance():
    with pytest.raises(ValueError, match="at least 2 rows"):
        frechet_distance(np.zeros((1, 3)), np.zeros((5, 3)))
    with pytest.raises(ValueError, match="3 and 4"):
        frechet_distance(np.zeros((5, 3)), np.zeros((5, 4)))


def test_our_own_features_tell_pictures_apart(painter):
    extract = vit_features(painter.model.instructblip, painter.transform)
    pictures = [Image.new("RGB", (16, 16), (30 * i, 0, 99)) for i in range(6)]
    features = extract(pictures)
    assert features.shape[0] == 6
    assert frechet_distance(features[:3], features[3:]) > 1e-6


def test_the_cycle_asks_about_everything_drawn():
    class Engine:
        def __init__(self) -> None:
            self.asked: list[str] = []

        def answer(self, images: list, instructions: list[str]) -> list[str]:
            self.asked += instructions
            return ["red", "star"] * (len(images) // 2)

    engine, picture = Engine(), Image.new("RGB", (8, 8))
    red_star = Thing("shape", "star", 0, 0, "red")
    blue_star = Thing("shape", "star", 1, 1, "blue")
    assert cycle_check(engine, [picture], [[red_star]]) == 100
    assert cycle_check(engine, [picture], [[red_star, blue_star]]) == 75
    assert "in the middle" in engine.asked[-1]
    with pytest.raises(ValueError, match="nothing to ask"):
        cycle_check(engine, [picture], [[]])


def test_clip_score_needs_a_local_clip(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match="holds no CLIP"):
        clip_score([Image.new("RGB", (8, 8))], ["a"], tmp_path)


def test_the_gallery_shows_every_picture(tmp_path: Path):
    pictures = [Image.new("RGB", (8, 8), c) for c in ("red", "blue", "green")]
    names = ["draw red", "draw blue", "draw green"]
    path = write_gallery(
        tmp_path / "g.png", pictures, names, [True, False, True], [None, pictures[0], None], 2
    )
    with Image.open(path) as grid:
        colours = {tuple(v) for v in np.asarray(grid.convert("RGB")).reshape(-1, 3)}
    assert {(255, 0, 0), (0, 0, 255), (0, 128, 0)} <= colours
