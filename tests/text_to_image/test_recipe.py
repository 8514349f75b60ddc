"""The recipe `draw` through the stages: trained, interleaved with understanding, drawn from."""

from pathlib import Path

import pytest
import torch

from instructblip.experiment.build import build
from instructblip.experiment.draw import Drawing, make_set
from instructblip.experiment.train import train
from instructblip.recipe.load import load_recipe
from instructblip.scenes.official import write_scenes
from instructblip.text_to_image.pretrained import from_pretrained
from instructblip.text_to_image.sample import Painter
from instructblip.training.optim import trainable_parameters
from tests.testing import write_json, write_picture

SMALL = [
    "drawing.conditioner={num_queries: 2, num_layers: 1, width: 8, num_heads: 2}",
    "drawing.decoder={kind: native, image_size: 64, patch_size: 16, width: 8, num_layers: 1,"
    " num_heads: 2, condition_width: 8}",
    "drawing.validation_prompts=1",
    "training.steps=4",
    "training.batch_size=4",
    "training.warmup_steps=1",
    "training.validate_every=4",
]


def test_the_recipe_trains_and_its_run_draws(directory: Path, tmp_path: Path):
    recipe = load_recipe("draw", [f"model.start={directory}", *SMALL])
    result = train(recipe, tmp_path / "run")
    assert (result.step, result.stopped) == (4, "finished")
    images = Painter.from_pretrained(tmp_path / "run").draw("the red cat", seed=0, steps=2)
    assert images[0].size == (64, 64)


def test_a_run_continues_another(directory: Path, tmp_path: Path):
    recipe = load_recipe("draw", [f"model.start={directory}", *SMALL])
    train(recipe, tmp_path / "run")
    more = load_recipe(
        "draw", [f"model.start={directory}", f"drawing.start={tmp_path / 'run'}", *SMALL[2:]]
    )
    first, second = from_pretrained(tmp_path / "run"), build(more, Drawing()).model
    assert second.config.decoder == first.config.decoder  # sizes come with the weights
    for name, value in first.conditioner.state_dict().items():
        assert torch.equal(value, second.conditioner.state_dict()[name])
    assert any(name.startswith("decoder.") for name in trainable_parameters(second))
    assert second.training
    assert train(more, tmp_path / "more").step == 4


def test_understanding_is_interleaved_while_the_qformer_trains(directory: Path, tmp_path: Path):
    write_scenes(tmp_path / "scenes", scale=0.02, sets=tuple(load_recipe("draw").data.sets))
    recipe = load_recipe(
        "draw",
        [
            f"model.start={directory}", *SMALL, f"data.root={tmp_path / 'scenes'}",
            "training.trainable=[drawing,qformer]", "drawing.understanding=0.5",
            "evaluation.benchmarks=[scenes_vqav2]",
        ],
    )  # fmt: skip
    batches = build(recipe, Drawing()).batches.iterate(0)
    kinds = [batch.target_values is None for _ in range(4) for batch in next(batches)]
    assert kinds == [False, True, False, True]
    assert train(recipe, tmp_path / "run").step == 4


@pytest.mark.parametrize("understanding", [0, 0.25])
def test_a_set_joins_at_its_step(directory: Path, tmp_path: Path, understanding: float):
    """With two micro batches a step, of which none or every fourth answers."""
    write_scenes(tmp_path / "scenes", scale=0.02, sets=tuple(load_recipe("draw").data.sets))
    recipe = load_recipe(
        "draw",
        [
            f"model.start={directory}", *SMALL, f"data.root={tmp_path / 'scenes'}",
            f"drawing.understanding={understanding}", "training.accumulate=2",
            "training.batch_size=16", "drawing.sets.late={kind: subjects, start: 3, weight: 9}",
        ],
    )  # fmt: skip
    batches = build(recipe, Drawing()).batches.iterate(0)
    steps = [{name for batch in next(batches) for name in batch.datasets} for _ in range(5)]
    assert ["late" in names for names in steps] == [False, False, False, True, True]


def test_two_roots_of_one_source_are_prepared_apart(tmp_path: Path):
    for name in ("one", "two"):
        write_picture(tmp_path / name / "images" / "val2014" / f"{name}.png")
        row = {"image": f"val2014/{name}.png", "caption": f"{name} cat", "image_id": "coco_1"}
        write_json(tmp_path / name / "annotations" / "coco_karpathy_train.json", [row])
    captions = "kind: captions, source: coco_caption"
    entries = [f"drawing.sets.{name}={{{captions}, root: {name}}}" for name in ("one", "two")]
    recipe = load_recipe("draw", [f"data.root={tmp_path}", *entries])
    assert recipe.drawing is not None
    for name in ("one", "two"):
        drawings = make_set(recipe, name, recipe.drawing.sets[name])
        assert f"{name} cat" in drawings[0].instruction
    prepared = {path.parent.parent.name for path in tmp_path.glob("prepared/*/*/manifest.json")}
    assert prepared == {"coco_caption@draw-one", "coco_caption@draw-two"}


def test_missing_settings_are_named(directory: Path):
    for entry, message in (
        ("{kind: instructions}", "drawing.sets.x: name the instruction file"),
        ("{kind: captions, source: cocoo}", "got 'cocoo'; expected one of"),
    ):
        recipe = load_recipe("draw", [f"drawing.sets.x={entry}"])
        assert recipe.drawing is not None
        with pytest.raises(ValueError, match=message):
            make_set(recipe, "x", recipe.drawing.sets["x"])
