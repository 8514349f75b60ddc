"""From a recipe with a section ``drawing`` to the objects that its run needs."""

from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from instructblip.core import distributed
from instructblip.data.prepared.prepare import Job
from instructblip.data.sources import SOURCES, source_of
from instructblip.experiment import (
    build as assembly,
)
from instructblip.experiment import (
    datasets as preparing,
)
from instructblip.experiment import (
    features as caching,
)
from instructblip.recipe.schema import (
    DrawingConfig,
    DrawingSet,
    Recipe,
)
from instructblip.text_to_image.batches import DrawLoader, Interleaved
from instructblip.text_to_image.config import TextToImageConfig
from instructblip.text_to_image.measure import (
    KINDS,
    fresh_prompts,
    measure,
)
from instructblip.text_to_image.model import TextToImage
from instructblip.text_to_image.pretrained import from_pretrained, save_pretrained
from instructblip.text_to_image.sample import Painter
from instructblip.text_to_image.tasks import (
    CaptionedPictures,
    Drawings,
    InstructionFile,
    SceneDrawings,
    SubjectDrawings,
)
from instructblip.training.train import TrainResult, resolve_device
from instructblip.training.train import train as run_training


def train(recipe: Recipe, out: Path, resume: bool, notes: Mapping[str, str]) -> TrainResult:
    """Train the recipe's drawing model into ``out``; ``notes`` go beside its checkpoints."""
    model = make_model(recipe)
    batches = make_batches(recipe, model, caching.began_with(out, resume))
    read = batches.understanding if isinstance(batches, Interleaved) else batches
    return run_training(
        model,
        batches,
        make_validation(recipe, model),
        recipe.training,
        out,
        resume=resume,
        export=lambda path: save_pretrained(model, path),
        notes={**notes, **caching.features_note(read)},
    )


def make_model(recipe: Recipe) -> TextToImage:
    """The InstructBLIP of the recipe with a conditioner and a decoder, fresh or begun before."""
    drawing = _drawing(recipe)
    understood = recipe.model_copy(
        update={"training": recipe.training.model_copy(update={"trainable": ("qformer",)})}
    )
    instructblip = assembly.make_model(understood)
    torch.manual_seed(recipe.training.seed)
    if drawing.start is None:
        config = TextToImageConfig(conditioner=drawing.conditioner, decoder=drawing.decoder)
        model = TextToImage(instructblip, config)
    else:
        model = from_pretrained(drawing.start, instructblip).train()
    model.set_trainable(recipe.training.trainable)
    half = torch.bfloat16 if recipe.training.precision == "bf16" else None
    frozen = half if resolve_device(recipe.training.device).type == "cuda" else None
    return model.to_training_dtypes(frozen_dtype=frozen, compute_dtype=half)


def make_batches(
    recipe: Recipe, model: TextToImage, began_with: bool | None = None
) -> DrawLoader | Interleaved:
    """This rank's batches to draw, with those of ``data`` among them as the recipe says;
    ``began_with`` as in `assembly.make_loader`."""
    drawing, training = _drawing(recipe), recipe.training
    tokens, transform = assembly.read_assets(recipe, model.instructblip)
    mixed = drawing.understanding > 0
    whole_steps = 1 if mixed else training.accumulate
    loader = DrawLoader(
        {name: make_set(recipe, name, entry) for name, entry in drawing.sets.items()},
        {name: entry.weight for name, entry in drawing.sets.items()},
        tokens,
        transform,
        model.decoder.image_size,
        batch_size=training.batch_size // (training.accumulate if mixed else 1),
        seed=recipe.data.seed,
        rank=distributed.rank(),
        world_size=distributed.world_size(),
        accumulate=whole_steps,
        starts={name: entry.start for name, entry in drawing.sets.items()},
    )
    if not mixed:
        return loader
    with distributed.main_first():
        datasets = preparing.prepare_training(recipe)
    micro = training.model_copy(
        update={"batch_size": training.batch_size // training.accumulate, "accumulate": 1}
    )
    understanding = assembly.make_loader(
        recipe.model_copy(update={"training": micro}), datasets, model.instructblip, began_with
    )
    return Interleaved(loader, understanding, drawing.understanding, training.accumulate)


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
        return InstructionFile(data.root / entry.file, root)
    if entry.source not in SOURCES:
        raise ValueError(
            f"drawing.sets.{name}.source: got {entry.source!r}; expected one of "
            f"{', '.join(SOURCES)}"
        )
    where = entry.root or entry.source
    folder = entry.source if where == data.where_of(entry.source) else f"{entry.source}@draw-{name}"
    source, rate = source_of(entry.source), data.max_bad_rate
    prepared = Job(folder, data.root / where, "train", data.prepared_root, source, rate).run()
    return CaptionedPictures(prepared, data.seed)


def make_validation(
    recipe: Recipe, model: TextToImage
) -> Callable[[TextToImage], dict[str, float]] | None:
    """Objects drawn right on Scenes, percent by kind of prompt; None where Scenes is not drawn."""
    drawing = _drawing(recipe)
    if not any(entry.kind in ("scenes", "subjects") for entry in drawing.sets.values()):
        return None
    tokens, transform = assembly.read_assets(recipe, model.instructblip)
    number = drawing.validation_prompts

    def validate(_model: TextToImage) -> dict[str, float]:
        painter = Painter(model, tokens, transform)
        scores = {
            kind: measure(painter, kind, fresh_prompts(kind, number)).figures.objects
            for kind in KINDS
        }
        return {"score": sum(scores.values()) / len(scores), **scores}

    return validate


def _drawing(recipe: Recipe) -> DrawingConfig:
    assert recipe.drawing is not None
    return recipe.drawing
