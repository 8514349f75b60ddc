"""Training by a recipe: instruction tuning, or drawing or training from preferences where the
recipe has a section for it."""

from pathlib import Path

from instructblip.core import distributed
from instructblip.experiment.build import Variant, build
from instructblip.recipe.schema import Recipe
from instructblip.training.run_directory import claim
from instructblip.training.train import TrainResult


def train(recipe: Recipe, out: Path, resume: bool = False) -> TrainResult:
    """Train the recipe's model; checkpoints, metrics, curves and the model go to ``out``.

    Raises ValueError if another process trains there.
    """
    with distributed.process_group(), claim(out):
        return build(recipe, variant_of(recipe, out, resume), out, resume).train(out, resume)


def cache(recipe: Recipe) -> None:
    """Compute and store the image features that training and validation read."""
    settings = recipe.features.model_copy(update={"cache": "on"})
    recipe = recipe.model_copy(update={"features": settings, "preference": None})
    with distributed.process_group():
        build(recipe, variant_of(recipe))


def variant_of(recipe: Recipe, out: Path | None = None, resume: bool = False) -> Variant:
    """What `train` does with a recipe in the run directory ``out``."""
    if recipe.preference is not None:
        from instructblip.experiment.preference import Preference

        return Preference(out, resume)
    if recipe.drawing is None:
        return Variant()
    from instructblip.experiment.draw import Drawing

    return Drawing()
