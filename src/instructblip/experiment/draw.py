"""Text to image: a recipe with a section ``drawing`` trains a decoder around the Q-Former."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch

from instructblip.core import distributed
from instructblip.data.loader import Loader
from instructblip.data.prepared.prepare import Job
from instructblip.data.sources import SOURCES, source_of
from instructblip.experiment.build import Data, Variant, read_assets
from instructblip.experiment.datasets import Held
from instructblip.experiment.model import load_model, training_dtypes
from instructblip.model.instructblip import InstructBlip
from instructblip.recipe.schema import DrawingConfig, DrawingSet, Recipe
from instructblip.text_to_image.batches import DrawLoader, Interleaved, micro_batches_before
from instructblip.text_to_image.config import TextToImageConfig
from instructblip.text_to_image.measure import KINDS, fresh_prompts, measure
from instructblip.text_to_image.model import TextToImage
from instructblip.text_to_image.pretrained import from_pretrained, save_pretrained
from instructblip.text_to_image.sample import Painter
from instructblip.text_to_image.tasks import (
    CaptionedImages,
    Drawings,
    SceneDrawings,
    SubjectDrawings,
    read_instructions,
)
from instructblip.training.config import TrainingConfig
from instructblip.training.train import Batches, Evaluate


class Drawing(Variant):
    """Trains to draw; with ``drawing.understanding`` above 0, ``data`` is interleaved."""

    reads_benchmarks = False

    def refuse(self, recipe: Recipe) -> None:
        if recipe.training.tokens_per_micro_batch == "auto":
            raise ValueError(
                "training.tokens_per_micro_batch=auto predicts the memory of answering, and this "
                "recipe draws: give a number, or leave it out"
            )

    def validates(self, recipe: Recipe) -> bool:
        return _draws_scenes(recipe)

    def read_data(self, recipe: Recipe) -> Data:
        return super().read_data(recipe) if _drawing(recipe).understanding else Data()

    def instructblip(self, recipe: Recipe) -> InstructBlip:
        return load_model(recipe, ("qformer",))

    def model(self, recipe: Recipe, instructblip: InstructBlip) -> TextToImage:
        return make_model(recipe, instructblip)

    def batches(
        self, recipe: Recipe, model: TextToImage, loader: Callable[[TrainingConfig], Loader]
    ) -> Batches:
        share, training = _drawing(recipe).understanding, recipe.training
        starts = {name: entry.start for name, entry in _drawing(recipe).sets.items()}
        if not share:
            return make_draw_loader(recipe, model, training, starts)
        # each loader yields single micro batches, of which `accumulate` mixed ones make a step
        single = training.model_copy(
            update={"batch_size": training.batch_size // training.accumulate, "accumulate": 1}
        )
        for name, start in starts.items():
            starts[name] = micro_batches_before(start * training.accumulate, share)[0]
        drawing = make_draw_loader(recipe, model, single, starts)
        return Interleaved(drawing, loader(single), share, training.accumulate)

    def validate(
        self, recipe: Recipe, instructblip: InstructBlip, model: TextToImage, held: Sequence[Held]
    ) -> Evaluate | None:
        return make_validation(recipe, model)

    def export(self, instructblip: InstructBlip, model: TextToImage) -> Callable[[Path], object]:
        return lambda path: save_pretrained(model, path)


def make_model(recipe: Recipe, instructblip: InstructBlip) -> TextToImage:
    """``instructblip`` with a conditioner and a decoder, fresh or from ``drawing.start``."""
    drawing = _drawing(recipe)
    torch.manual_seed(recipe.training.seed)
    if drawing.start is None:
        config = TextToImageConfig(conditioner=drawing.conditioner, decoder=drawing.decoder)
        model = TextToImage(instructblip, config)
    else:
        model = from_pretrained(drawing.start, instructblip).train()
    model.set_trainable(recipe.training.trainable)
    instructblip.to_training_dtypes(*training_dtypes(recipe.training))
    return model


def make_draw_loader(
    recipe: Recipe, model: TextToImage, training: TrainingConfig, starts: Mapping[str, int]
) -> DrawLoader:
    """This rank's batches of ``drawing.sets``; ``starts`` are in steps of ``training``."""
    sets = _drawing(recipe).sets
    tokens, images = read_assets(recipe, model.instructblip.config)
    return DrawLoader(
        {name: make_set(recipe, name, entry) for name, entry in sets.items()},
        {name: entry.weight for name, entry in sets.items()},
        tokens,
        images.transform,
        model.decoder.image_size,
        batch_size=training.batch_size,
        seed=recipe.data.seed,
        rank=distributed.rank(),
        world_size=distributed.world_size(),
        accumulate=training.accumulate,
        workers=training.workers,
        starts=starts,
    )


def make_set(recipe: Recipe, name: str, entry: DrawingSet) -> Drawings:
    """The examples of one drawing set. Raises ValueError where a setting is missing."""
    data = recipe.data
    if entry.kind == "scenes":
        return SceneDrawings(entry.shapes, seed=data.seed)
    if entry.kind == "subjects":
        return SubjectDrawings(data.seed)
    if entry.kind == "instructions":
        if entry.file is None:
            raise ValueError(f"drawing.sets.{name}: name the instruction file in `file`")
        root = None if entry.root is None else data.root / entry.root
        return read_instructions(data.root / entry.file, root)
    if entry.source not in SOURCES:
        raise ValueError(
            f"drawing.sets.{name}.source: got {entry.source!r}; expected one of "
            f"{', '.join(SOURCES)}"
        )
    where = entry.root or entry.source
    folder = entry.source if where == data.where_of(entry.source) else f"{entry.source}@draw-{name}"
    source, rate = source_of(entry.source), data.max_bad_rate
    prepared = Job(folder, data.root / where, "train", data.prepared_root, source, rate).run()
    return CaptionedImages(prepared, data.seed)


def make_validation(recipe: Recipe, model: TextToImage) -> Evaluate | None:
    """Objects drawn right on Scenes, percent by kind of prompt; None where Scenes is not drawn."""
    if not _draws_scenes(recipe):
        return None
    tokens, images = read_assets(recipe, model.instructblip.config)
    number = _drawing(recipe).validation_prompts

    def validate(_model: object) -> dict[str, float]:
        painter = Painter(model, tokens, images.transform)
        scores = {
            kind: measure(painter, kind, fresh_prompts(kind, number)).figures.objects
            for kind in KINDS
        }
        return {"score": sum(scores.values()) / len(scores), **scores}

    return validate


def _draws_scenes(recipe: Recipe) -> bool:
    return any(entry.kind in ("scenes", "subjects") for entry in _drawing(recipe).sets.values())


def _drawing(recipe: Recipe) -> DrawingConfig:
    assert recipe.drawing is not None
    return recipe.drawing
