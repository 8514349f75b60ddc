"""The model that ships with the package: complete, small, readable by transformers."""

import itertools
import json
from importlib.resources import files
from pathlib import Path

import pytest
import torch
from PIL import Image

import instructblip
from instructblip.data.templates import TEMPLATES
from instructblip.data.tokens import Tokens
from instructblip.model.instructblip import InstructBlip
from instructblip.scenes.world import (
    COLOURS,
    SHAPES,
    SIZES,
    Scene,
    Thing,
    render,
)

STARTER = Path(str(files("instructblip"))) / "starter"


@pytest.fixture(scope="module")
def engine():
    return instructblip.load("starter")


@pytest.fixture(scope="module")
def picture() -> Image.Image:
    return render(Scene((Thing("shape", "circle", 1, 1, "red", "large"),), seed=1))


def test_at_most_32_megabytes_with_a_model_card_and_16_for_the_decoder():
    sizes = {f: f.stat().st_size for f in STARTER.rglob("*") if f.is_file()}
    decoder = sum(size for f, size in sizes.items() if f.parent.name == "text_to_image")
    assert 0 < decoder <= 16_000_000
    assert sum(sizes.values()) - decoder <= 32_000_000
    assert (STARTER / "README.md").read_text().startswith("# ")


def test_transformers_reads_it_as_a_blip2_without_a_missing_key():
    from transformers import Blip2ForConditionalGeneration

    model, info = Blip2ForConditionalGeneration.from_pretrained(STARTER, output_loading_info=True)
    assert not any(info.values())
    assert model.config.image_token_index == len(Tokens.from_pretrained(STARTER).language)


def test_is_a_blip2_and_has_a_text_branch_to_tune_from():
    assert not InstructBlip.from_pretrained("starter").config.instruction_aware
    aware = InstructBlip.from_pretrained("starter", instruction_aware=True)
    weight = aware.qformer.embeddings.word_embeddings.weight
    assert 0.0 < weight.std() < 1.0
    assert torch.isfinite(weight).all()


def test_its_words_cover_the_templates():
    tokens = Tokens.from_pretrained(STARTER)
    assert tokens.qformer is not None
    for templates in TEMPLATES.values():
        for template in templates:
            ids = tokens.qformer(template.replace("{", "").replace("}", ""))["input_ids"]
            assert tokens.qformer.unk_token_id not in ids, template


def test_captions_a_picture_and_ranks(engine, picture):
    assert "red circle" in engine.answer(picture, "A short image description.")
    red, blue = engine.rank(picture, "A short image description.", ["a red circle", "a blue star"])
    assert red > blue


def test_says_what_it_learned():
    accuracy = json.loads((STARTER / "text_accuracy.json").read_text())
    assert accuracy["things"]["color"] > 90


def test_int8_captions_as_well(engine):
    """The share of shapes whose colour and name a caption has; 8 bits lose less than 0.5 points."""
    things = [
        (Scene((Thing("shape", shape, 1, 1, colour, size),), seed=i), f"{colour} {shape}")
        for i, (shape, colour, size) in enumerate(itertools.product(SHAPES, COLOURS, SIZES))
    ]
    pictures = [render(scene) for scene, _ in things]

    def score(model) -> float:
        texts = model.answer(pictures, "A short image description.", num_beams=1, max_new_tokens=12)
        right = [said in text for text, (_, said) in zip(texts, things, strict=True)]
        return 100 * sum(right) / len(right)

    plain, coded = score(engine), score(instructblip.load("starter", quantize="int8"))
    assert plain > 80
    assert plain - coded < 0.5
