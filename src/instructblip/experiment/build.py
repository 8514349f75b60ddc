"""From a recipe to the objects that a run needs: model, loader, validation, engine."""

import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from instructblip.core import distributed
from instructblip.data.images import ImageTransform
from instructblip.data.loader import Loader
from instructblip.data.prepared.dataset import PreparedDataset
from instructblip.data.samples import ImageReader
from instructblip.data.tokens import Tokens
from instructblip.evaluation.evaluate import Answerer, evaluate
from instructblip.experiment.datasets import (
    TrainingSet,
    benchmarks_of,
    make_mixture,
    prepare_benchmarks,
    vocabulary_of,
)
from instructblip.experiment.features import make_features, use_features
from instructblip.inference.baseline import TransformersModel, is_baseline
from instructblip.inference.decoding import check_decoding
from instructblip.inference.engine import Engine
from instructblip.model.checkpoints.directory import model_directory
from instructblip.model.checkpoints.weights import read_json
from instructblip.model.config import InstructBlipConfig, LoraConfig
from instructblip.model.instructblip import InstructBlip
from instructblip.model.language.adapters import checkpoint_layers, stacks_of
from instructblip.model.language.lora import adapters, add_lora
from instructblip.model.language.quantize import quantize_linears
from instructblip.recipe.schema import Recipe
from instructblip.training.train import resolve_device


@dataclass(frozen=True, slots=True)
class Start:
    """What of a model the data depends on: its configuration, without the weights."""

    config: InstructBlipConfig


def read_start(recipe: Recipe) -> Start:
    """The configuration that the recipe's model will have."""
    settings = recipe.model
    directory = model_directory(settings.start)
    config = InstructBlipConfig.from_transformers(read_json(directory / "config.json"))
    size = settings.image_size or config.vision.image_size
    vision = config.vision.model_copy(update={"image_size": size})
    aware = settings.instruction_aware
    return Start(config.model_copy(update={"vision": vision, "instruction_aware": aware}))


def make_model(recipe: Recipe) -> InstructBlip:
    """The start of the run with its trainable set and number types, on the CPU."""
    torch.manual_seed(recipe.training.seed)  # a fresh text branch is random, and the same on resume
    model = InstructBlip.from_pretrained(
        recipe.model.start,
        instruction_aware=recipe.model.instruction_aware,
        text_branch=recipe.model.text_branch,
        image_size=recipe.model.image_size,
    )
    shape_language(model, recipe)
    half = torch.bfloat16 if recipe.training.precision == "bf16" else None
    # on a CPU memory is plenty, and fp32 keeps what is frozen exactly as it was when saved again
    frozen = half if resolve_device(recipe.training.device).type == "cuda" else None
    model.to_training_dtypes(frozen_dtype=frozen, compute_dtype=half)
    if recipe.training.parallel == "fsdp2":
        shard_language(model, recipe)
    return model


def shape_language(model: InstructBlip, recipe: Recipe) -> None:
    """What the recipe wants of a loaded model: adapter, trainable set, bits, checkpoints.

    Raises ValueError for settings that do not go together.
    """
    _refuse_unsharded(recipe)
    language, adapter = model.language_model, recipe.model.lora
    if adapter is not None:
        if "lora" not in recipe.training.trainable:
            raise ValueError(
                f"model.lora trains as a part of its own, and training.trainable is "
                f"{list(recipe.training.trainable)}: add lora to it"
            )
        if own := adapters(language):
            _tell_unused(adapter, next(iter(own.values())).config)
        else:
            add_lora(language, adapter)
    model.set_trainable(recipe.training.trainable)
    if recipe.model.quantize is not None:
        quantize_linears(language, recipe.model.quantize)
    if recipe.training.checkpoint_activations:
        checkpoint_layers(language)


def _tell_unused(asked: LoraConfig, own: LoraConfig) -> None:
    """Warn where the start's adapter, which goes on, is another than the recipe asks for."""
    names = [name for name in type(asked).model_fields if name != "targets" or asked.targets]
    other = [n for n in names if getattr(asked, n) != getattr(own, n)]
    if other:
        told = ", ".join(f"{n} {getattr(own, n)!r}" for n in other)
        warnings.warn(
            f"the start has an adapter of its own, which goes on: {told}, whatever model.lora says",
            stacklevel=2,
        )


def _refuse_unsharded(recipe: Recipe) -> None:
    changed = recipe.model.quantize is not None or "language_model" in recipe.training.trainable
    if recipe.training.parallel == "fsdp2" and changed:
        raise ValueError(
            "training.parallel=fsdp2 spreads frozen weights of full precision: set "
            "model.quantize=null and take language_model out of training.trainable, or train "
            "with parallel=ddp"
        )


def shard_language(model: InstructBlip, recipe: Recipe) -> None:
    """Spread the frozen layers of the language model over the ranks."""
    device = resolve_device(recipe.training.device)
    for stack, layers in stacks_of(model.language_model):
        distributed.shard(stack, layers, device)


def make_loader(
    recipe: Recipe,
    datasets: Mapping[str, TrainingSet],
    model: InstructBlip | Start,
    began_with: bool | None = None,
) -> Loader:
    """This rank's training batches, with features in place of pixels where they are kept.

    ``began_with`` is whether a run that resumes began with stored features: so it goes on, bit for
    bit. None decides now.
    """
    data, training = recipe.data, recipe.training
    tokens, transform = read_assets(recipe, model)
    pictures = make_pictures(recipe, transform.for_training() if data.augment else transform)
    if isinstance(model, InstructBlip):
        pictures.features = make_features(
            recipe,
            model,
            pictures,
            ((dataset, dataset.images()) for dataset in datasets.values()),
            reads=training.steps * training.batch_size,
            began_with=began_with,
        )
    return Loader(
        datasets,
        make_mixture(recipe, datasets),
        tokens,
        pictures,
        batch_size=training.batch_size,
        seed=data.seed,
        rank=distributed.rank(),
        world_size=distributed.world_size(),
        accumulate=training.accumulate,
        workers=training.workers,
        bucket_steps=data.bucket_steps,
        templates={name: entry.templates for name, entry in data.sets.items() if entry.templates},
        languages={name: entry.language for name, entry in data.sets.items()},
    )


def make_validation(
    recipe: Recipe, model: InstructBlip
) -> Callable[[InstructBlip], dict[str, float]] | None:
    """Scores of a model, 0 to 100, and their mean over the held-in sets: the ``score``.

    Held-out sets, if named, are scored for the curves of the report and choose nothing, unless
    there are no others. None where the recipe names no set at all: no weights are the best then.
    """
    if not recipe.evaluation.validation:
        return None
    check_decoding(recipe.evaluation.decoding)
    chosen = [
        replace(b, split="val") if b.role == "held_in" else b
        for b in benchmarks_of(recipe, recipe.evaluation.validation)
    ]
    choosing = [b.name for b in chosen if b.role == "held_in"] or [b.name for b in chosen]
    with distributed.main_first():
        datasets = prepare_benchmarks(recipe, chosen)
        vocabularies = {b.name: vocabulary_of(recipe, b) for b in chosen}
    tokens, transform = read_assets(recipe, model)
    engine = Engine(model, tokens, transform)
    engine.images = make_pictures(recipe, transform)
    limit, batch_size = recipe.evaluation.validation_limit, recipe.evaluation.batch_size
    times = recipe.training.steps // (recipe.training.validate_every or recipe.training.steps)
    use_features(recipe, engine, datasets.values(), limit, times)

    def validate(_model: InstructBlip) -> dict[str, float]:
        scores = {}
        for benchmark in chosen:
            result = evaluate(
                engine,
                benchmark,
                datasets[benchmark.name],
                limit=limit,
                batch_size=batch_size,
                vocabulary=vocabularies[benchmark.name],
                tokenizer=recipe.evaluation.tokenizer,
                progress=False,
                together=recipe.training.parallel == "fsdp2",
            )
            scores[benchmark.name] = result.value or 0.0
        return {"score": sum(scores[name] for name in choosing) / len(choosing), **scores}

    return validate


def read_assets(recipe: Recipe, model: InstructBlip | Start) -> tuple[Tokens, ImageTransform]:
    """Tokenizers and picture transform of the start, with the recipe's limits."""
    directory = model_directory(recipe.model.start)
    tokens = with_limits(Tokens.from_pretrained(directory), recipe, model)
    if not model.config.instruction_aware:
        tokens = replace(tokens, qformer=None)
    transform = ImageTransform.from_pretrained(directory)
    return tokens, replace(transform, image_size=model.config.vision.image_size)


def with_limits(tokens: Tokens, recipe: Recipe, model: InstructBlip | Start) -> Tokens:
    """The tokenizers with the recipe's lengths, within what the Q-Former can read."""
    data = recipe.data
    return replace(
        tokens,
        max_instruction=min(data.max_instruction, model.config.qformer.max_position_embeddings),
        max_prompt=data.max_prompt,
        max_response=data.max_response,
    )


def make_answerer(
    recipe: Recipe,
    model: str,
    datasets: Iterable[PreparedDataset],
    instruction_aware: bool | None = None,
) -> Answerer:
    """A saved model of ours, or any transformers image-text-to-text model, to be evaluated on
    ``datasets``."""
    if is_baseline(Path(model)):
        device = resolve_device(recipe.training.device)
        return TransformersModel(Path(model), device, recipe.data.num_frames)
    engine = make_engine(recipe, model, instruction_aware)
    # Twice: benchmarks are answered again, by the next model or without the pictures.
    use_features(recipe, engine, datasets, recipe.evaluation.limit, times=2)
    return engine


def make_pictures(recipe: Recipe, transform: ImageTransform) -> ImageReader:
    data = recipe.data
    return ImageReader(transform, num_frames=data.num_frames, cache_images_mb=data.cache_images_mb)


def make_engine(recipe: Recipe, model: str, instruction_aware: bool | None = None) -> Engine:
    """A saved model ready to answer, on the device and with the lengths of the recipe."""
    engine = Engine.from_pretrained(
        model,
        device=resolve_device(recipe.training.device),
        instruction_aware=instruction_aware,
    )
    engine.tokens = with_limits(engine.tokens, recipe, engine.model)
    engine.images = replace(engine.images, num_frames=recipe.data.num_frames)
    return engine
