"""The examples of a page are of the world of its model."""

from pathlib import Path

import pytest

from instructblip.recipe.world import examples_of, world_of


@pytest.mark.parametrize(
    ("recipe", "world"),
    [
        ("model: {start: starter}\ndata: {sets: {vqav2: {format: null}, gqa: }}", "starter"),
        ("model: {start: dense}\ndata: {sets: {vqav2: {}}}", "dense"),
        ("model: {start: starter}\ndata: {sets: {mine: {format: rows}}}", None),
        ("model: [1]\ndata: 2", None),
        (None, None),
    ],
)
def test_examples_are_of_the_world_of_the_model(
    tmp_path: Path, recipe: str | None, world: str | None
) -> None:
    if recipe is not None:
        (tmp_path / "recipe.yaml").write_text(recipe)
    assert world_of("run", tmp_path) == world
    assert world_of("dense", None) == "dense"


def test_no_examples_for_your_images() -> None:
    assert len(examples_of("starter")) == 4
    assert examples_of("dense")[0].image.startswith("data:image/png;base64,")
    assert examples_of(None) == examples_of("/models/blip2") == []
