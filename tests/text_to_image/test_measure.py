"""The checker over fresh prompts, Frechet distance, cycle check, CLIP score."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from instructblip.scenes.world import HELD_OUT_PAIRS, Thing
from instructblip.text_to_image.measure import (
    clip_score,
    cycle_check,
    frechet_distance,
    fresh_prompts,
    measure,
    vit_features,
)
from instructblip.text_to_image.tasks import SceneDrawings
from tests.text_to_image.conftest import Renderer


def test_fresh_prompts_differ_from_training_and_name_unseen_pairs():
    seen = {SceneDrawings((1, 1))[i].instruction for i in range(50)}
    prompts = fresh_prompts("one_object", 20)
    assert len({p.instruction for p in prompts}) > 15
    assert not seen >= {p.instruction for p in prompts}
    for example in fresh_prompts("unseen_pairs", 10):
        (thing,) = example.things
        assert (thing.colour, thing.name) in HELD_OUT_PAIRS


def test_measuring_rendered_scenes_gives_full_marks():
    examples = [SceneDrawings((2, 2))[i] for i in range(10)]
    measured = measure(Renderer(), "two_objects", examples)
    figures, images = measured.figures, measured.images
    assert (figures.objects, figures.exact, figures.pictures) == (100, 100, 10)
    assert np.asarray(images[0]).shape == (64, 64, 3)
    swapped = Renderer([images[-1], *images[:-1]])
    assert measure(swapped, "two_objects", examples).figures.objects < 20


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


def test_frechet_distance_refuses_features_without_a_covariance():
    with pytest.raises(ValueError, match="at least 2 rows"):
        frechet_distance(np.zeros((1, 3)), np.zeros((5, 3)))
    with pytest.raises(ValueError, match="3 and 4"):
        frechet_distance(np.zeros((5, 3)), np.zeros((5, 4)))


def test_features_of_the_image_encoder_differ_between_images(painter):
    extract = vit_features(painter.model.instructblip, painter.transform)
    images = [Image.new("RGB", (16, 16), (30 * i, 0, 99)) for i in range(6)]
    features = extract(images)
    assert features.shape[0] == 6
    assert frechet_distance(features[:3], features[3:]) > 1e-6


def test_the_cycle_check_asks_about_every_object():
    class Engine:
        def __init__(self) -> None:
            self.asked: list[str] = []

        def answer(self, images: list, instructions: list[str]) -> list[str]:
            self.asked += instructions
            return ["red", "star"] * (len(images) // 2)

    engine, image = Engine(), Image.new("RGB", (8, 8))
    red_star = Thing("shape", "star", 0, 0, "red")
    blue_star = Thing("shape", "star", 1, 1, "blue")
    assert cycle_check(engine, [image], [[red_star]]) == 100
    assert cycle_check(engine, [image], [[red_star, blue_star]]) == 75
    assert "in the middle" in engine.asked[-1]
    with pytest.raises(ValueError, match="nothing to ask"):
        cycle_check(engine, [image], [[]])


def write_clip(folder: Path) -> Path:
    """A tiny random CLIP that reads letters."""
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizer

    letters = [chr(c) for c in range(97, 123)]
    pieces = [*letters, *(c + "</w>" for c in letters), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({p: i for i, p in enumerate(pieces)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = CLIPTokenizer(
        str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=32
    )
    small = {
        "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }  # fmt: skip
    text = {"vocab_size": len(pieces), "max_position_embeddings": 32, "eos_token_id": 53}
    vision = {"image_size": 16, "patch_size": 8}
    config = CLIPConfig(text_config=small | text, vision_config=small | vision, projection_dim=8)
    torch.manual_seed(0)
    CLIPModel(config).save_pretrained(folder)
    images = CLIPImageProcessor(size={"shortest_edge": 16}, crop_size=16)
    CLIPProcessor(images, tokenizer).save_pretrained(folder)
    return folder


def test_clip_score_is_the_mean_of_clipped_cosines(tmp_path: Path):
    clip = write_clip(tmp_path)
    images = [Image.new("RGB", (16, 16), colour) for colour in ("red", "blue")]
    apart = [clip_score([i], [t], clip) for i, t in zip(images, ("red", "blue"), strict=True)]
    assert clip_score(images, ["red", "blue"], clip) == pytest.approx(np.mean(apart), abs=1e-3)
    assert min(apart) == 0  # a negative cosine
    assert 0 < max(apart) <= 100
    with pytest.raises(ValueError, match="2 images and 1 texts"):
        clip_score(images, ["red"], clip)


def test_clip_score_needs_a_local_clip(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match="holds no CLIP"):
        clip_score([Image.new("RGB", (8, 8))], ["a"], tmp_path)
