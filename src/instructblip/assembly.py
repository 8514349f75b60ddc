"""From a recipe to the objects that a run needs: data sets, loader, model, validation."""

import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from instructblip import distributed
from instructblip.data.features import (
    TYPES,
    Encode,
    Features,
    FeatureStore,
    FeatureType,
    fill,
    hash_pictures,
    measure,
    store_name,
)
from instructblip.data.images import ImageTransform
from instructblip.data.loader import Loader
from instructblip.data.mixture import Mixture
from instructblip.data.pictures import Pictures
from instructblip.data.prepare import Job, prepare
from instructblip.data.prepared import PreparedDataset
from instructblip.data.remote import fetch_tree, is_remote
from instructblip.data.sources import SOURCES, source_of
from instructblip.data.sources.own import own_source
from instructblip.data.sources.own_files import Own
from instructblip.data.templates import check_template, templates_of
from instructblip.data.tokens import Tokens
from instructblip.data.view import DatasetView
from instructblip.evaluation.benchmarks import Benchmark, select_benchmarks
from instructblip.evaluation.evaluate import Answerer, evaluate, pick
from instructblip.evaluation.owners import OWNERS
from instructblip.model.config import InstructBlipConfig
from instructblip.model.instructblip import InstructBlip, part_of
from instructblip.model.language import checkpoint_layers, stacks_of
from instructblip.model.lora import adapters, add_lora
from instructblip.model.pretrained import model_directory
from instructblip.model.quantize import quantize_linears
from instructblip.model.weights import read_json
from instructblip.recipe import DataSet, Recipe
from instructblip.serving.engine import Engine
from instructblip.serving.transformers_model import TransformersModel, is_baseline
from instructblip.training.train import resolve_device

TrainingSet = PreparedDataset | DatasetView
"""A prepared set, or what is left of it without its bad examples."""


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


@contextmanager
def main_first() -> Iterator[None]:
    """The first rank does the work, the others then find it done."""
    if not distributed.is_main():
        distributed.barrier()
    yield
    if distributed.is_main():
        distributed.barrier()


def prepare_training(recipe: Recipe) -> dict[str, PreparedDataset]:
    """The data sets of the mixture, by name, those of weight 0 left out."""
    return {name: prepare_entry(recipe, name) for name in training_names(recipe)}


def training_names(recipe: Recipe) -> list[str]:
    return [name for name, entry in recipe.data.sets.items() if entry.weight]


def prepare_entry(recipe: Recipe, name: str) -> PreparedDataset:
    """The data set of one entry of ``data.sets``."""
    return job_of(recipe, name).run()


def job_of(recipe: Recipe, name: str) -> Job:
    """How an entry of ``data.sets`` is prepared. A root that is a URL is fetched first."""
    data = recipe.data
    entry = data.sets[name]
    own = entry.format is not None
    source = name if own else data.source_of(name)
    where = entry.root or source
    if is_remote(where):
        root = fetch_tree(where, data.prepared_root / "fetched" / name)
    else:
        root = data.root / where
    reader = own_source(_own(name, entry, root)) if own else source_of(source)
    return Job(source, root, entry.split, data.prepared_root, reader, data.max_bad_rate)


def _own(name: str, entry: DataSet, root: Path) -> Own:
    assert entry.format is not None
    if name in SOURCES:
        raise ValueError(f"data.sets.{name}: this name is taken; give data of your own another one")
    images = entry.images
    if images is None:
        images = "images" if (root / "images").is_dir() else "."
    if entry.task is not None:
        templates_of(entry.task)
    columns = tuple(sorted(entry.columns.items()))
    return Own(name, entry.format, entry.path, images, columns, entry.task)


def prepare_split(recipe: Recipe, source: str, split: str) -> PreparedDataset:
    """A split of one of the published data sets, as benchmarks need it."""
    data = recipe.data
    root = data.root_of(source)
    return prepare(source, root, split, data.prepared_root, max_bad_rate=data.max_bad_rate)


def prepare_benchmarks(
    recipe: Recipe, benchmarks: Iterable[Benchmark]
) -> dict[str, PreparedDataset]:
    """The data set of each benchmark, by the benchmark's name; FileNotFoundError names all that
    are not there, with the files to get and where."""
    found, missing = {}, []
    for benchmark in benchmarks:
        try:
            found[benchmark.name] = prepare_split(recipe, benchmark.source, benchmark.split)
        except FileNotFoundError as error:
            files = source_of(benchmark.source).files.format(split=benchmark.split)
            owner = OWNERS[benchmark.source]
            missing.append(
                f"{benchmark.name}: {error}. Get {files}, and the pictures, from {owner}; they go "
                f"into annotations/ and images/ of {recipe.data.root_of(benchmark.source)}"
            )
    if missing:
        raise FileNotFoundError("benchmarks without their data:\n  " + "\n  ".join(missing))
    return found


def vocabulary_of(recipe: Recipe, benchmark: Benchmark) -> list[str] | None:
    """The distinct answers of the training split, for benchmarks that rank them."""
    if not benchmark.vocabulary:
        return None
    training = prepare_split(recipe, benchmark.source, "train")
    return sorted({answer for example in training for answer in example.answers})


def benchmarks_of(recipe: Recipe, names: Iterable[str]) -> list[Benchmark]:
    """The benchmarks called ``names``, with the recipe's decoding and prompts for their own.
    ValueError for a prompt of an unknown benchmark or with an unknown place."""
    own, prompts = recipe.evaluation.decoding, recipe.evaluation.prompts
    select_benchmarks(prompts)
    asked = [
        replace(b, prompt=check_template(prompts.get(b.name, b.prompt)))
        for b in select_benchmarks(names)
    ]
    return [
        replace(b, decoding={**b.decoding, **own}) if b.mode == "generate" else b for b in asked
    ]


def make_mixture(recipe: Recipe, datasets: Mapping[str, TrainingSet]) -> Mixture:
    return Mixture(
        sizes={name: len(dataset) for name, dataset in datasets.items()},
        weights={name: recipe.data.sets[name].weight for name in datasets},
        temperature=recipe.data.temperature,
    )


def describe_mixture(recipe: Recipe, mixture: Mixture) -> str:
    """A table: how often each data set and each of its examples will be seen."""
    training = recipe.training
    lines = [f"{'data set':24} {'examples':>10} {'weight':>7} {'share':>7} {'epochs':>8}"]
    for row in mixture.table(training.steps * training.batch_size):
        lines.append(
            f"{row.name:24} {row.size:>10,} {row.weight:>7.2f} {row.probability:>7.1%} "
            f"{row.epochs:>8.2f}"
        )
    return "\n".join(lines)


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
    """What the recipe wants of a loaded model: adapter, trainable set, bits, checkpoints."""
    language, adapter = model.language_model, recipe.model.lora
    if adapter is not None:
        if "lora" not in recipe.training.trainable:
            raise ValueError(
                f"model.lora trains as a part of its own, and training.trainable is "
                f"{list(recipe.training.trainable)}: add lora to it"
            )
        if not adapters(language):  # else the start has one, and it goes on
            add_lora(language, adapter)
    model.set_trainable(recipe.training.trainable)
    if recipe.model.quantize is not None:
        quantize_linears(language, recipe.model.quantize)
    if recipe.training.checkpoint_activations:
        checkpoint_layers(language)


def shard_language(model: InstructBlip, recipe: Recipe) -> None:
    """Spread the frozen layers of the language model over the ranks."""
    if recipe.model.quantize is not None or "language_model" in recipe.training.trainable:
        raise ValueError(
            "training.parallel=fsdp2 spreads frozen weights of full precision: set "
            "model.quantize=null and take language_model out of training.trainable, or train "
            "with parallel=ddp"
        )
    device = resolve_device(recipe.training.device)
    for stack, layers in stacks_of(model.language_model):
        distributed.shard(stack, layers, device)


def make_loader(
    recipe: Recipe,
    datasets: Mapping[str, TrainingSet],
    model: InstructBlip | Start,
    resumed: bool = False,
) -> Loader:
    """This rank's training batches, with features in place of pixels where they are kept.

    A ``resumed`` run measures nothing anew: it reads features if it did so before, so that it goes
    on bit for bit.
    """
    data, training = recipe.data, recipe.training
    tokens, transform = read_assets(recipe, model)
    pictures = make_pictures(recipe, transform.for_training() if data.augment else transform)
    if isinstance(model, InstructBlip):
        pictures.features = make_features(
            recipe,
            model,
            pictures,
            ((names, d.image_root) for d in datasets.values() for names in d.images()),
            reads=0 if resumed else training.steps * training.batch_size,
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
) -> Callable[[InstructBlip], dict[str, float]]:
    """Scores of a model, 0 to 100, and their mean over the held-in sets: the ``score``.

    Held-out sets, if named, are scored for the curves of the report and choose nothing, unless
    there are no others.
    """
    chosen = [
        replace(b, split="val") if b.role == "held_in" else b
        for b in benchmarks_of(recipe, recipe.evaluation.validation)
    ]
    choosing = [b.name for b in chosen if b.role == "held_in"] or [b.name for b in chosen]
    with main_first():
        datasets = prepare_benchmarks(recipe, chosen)
        vocabularies = {b.name: vocabulary_of(recipe, b) for b in chosen}
    tokens, transform = read_assets(recipe, model)
    engine = Engine(model, tokens, transform)
    engine.pictures = make_pictures(recipe, transform)
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


def make_pictures(recipe: Recipe, transform: ImageTransform) -> Pictures:
    data = recipe.data
    return Pictures(transform, num_frames=data.num_frames, cache_images_mb=data.cache_images_mb)


def use_features(
    recipe: Recipe,
    engine: Engine,
    datasets: Iterable[PreparedDataset],
    limit: int | None,
    times: int,
) -> None:
    """Let ``engine`` answer from stored features where that is exact; ``times`` over the sets."""
    images = [
        (dataset[i].images, dataset.image_root)
        for dataset in datasets
        for i in pick(len(dataset), limit)
    ]
    engine.pictures.features = make_features(
        recipe, engine.model, engine.pictures, images, reads=times * len(images), exact=True
    )


def make_features(
    recipe: Recipe,
    model: InstructBlip,
    pictures: Pictures,
    images: Iterable[tuple[tuple[str, ...], Path]],
    reads: int,
    exact: bool = False,
) -> Features | None:
    """Stored features of ``images`` (frames and their root), computed where they are missing; None
    where the recipe does not want them or, with ``cache: auto``, where they would not pay.

    ``reads`` is how often a sample will be read; ``exact`` refuses a store that rounds. All ranks
    call this together.
    """
    settings, transform = recipe.features, pictures.transform
    wanted = settings.cache == "on"
    if settings.cache == "off":
        return None
    if any(p.requires_grad for n, p in model.named_parameters() if part_of(n) == "vision_tower"):
        if wanted:
            raise ValueError(
                "features.cache=on needs a frozen image encoder, and training.trainable has "
                "vision_tower; take it out, or set features.cache=off"
            )
        return None
    if transform.train and settings.views == 1 and not wanted:
        return None  # each epoch would see the same crop
    device = resolve_device(recipe.training.device)
    model.vision_model.to(device)

    def encode(pixels: Tensor) -> Tensor:
        with torch.no_grad():
            return model.encode_image(pixels.to(device), norm=False)

    size = transform.image_size
    own = encode(torch.zeros(1, 3, size, size)).dtype
    kind: FeatureType = settings.dtype or ("bf16" if own == torch.bfloat16 else "fp32")
    if exact and kind != "fp32" and TYPES[kind] != own:
        return None
    root = settings.root or recipe.data.root / "features"
    paths = {path for names, place in images for path in pictures.paths(names, place)}
    features = Features(
        FeatureStore(root / store_name(transform, model.encoder_fingerprint(), kind), kind),
        hash_pictures(paths, root / "pictures.json"),
        views=settings.views if transform.train else 1,
    )
    if not wanted:
        pays = features_pay(features, transform, encode, reads) if distributed.is_main() else None
        if not distributed.broadcast_object(pays):
            return None
    began = time.monotonic()
    count = fill(features, transform, encode, model.image_chunk, recipe.training.workers)
    if count and distributed.is_main():
        seconds = time.monotonic() - began
        print(f"image features: {count:,} computed in {seconds:.0f} s, kept in {root}")
    return features


def features_pay(features: Features, transform: ImageTransform, encode: Encode, reads: int) -> bool:
    """Whether storing what is missing takes less time than encoding at every use, and fits."""
    missing = len(features.missing())
    if not missing:
        return True
    costs = measure(features, transform, encode, num_pictures=16)
    free = shutil.disk_usage(features.store.folder.parent).free
    pays = costs.saving(missing, reads) > 0 and missing * costs.nbytes < free / 2
    print(
        f"image features: {costs.encode * 1000:.2g} ms to compute, {costs.read * 1000:.2g} ms to "
        f"read, {missing:,} to store in {missing * costs.nbytes / 1e9:.2g} GB, {reads:,} uses: "
        + ("kept" if pays else "computed at each use")
    )
    return pays


def make_engine(recipe: Recipe, model: str, instruction_aware: bool | None = None) -> Engine:
    """A saved model ready to answer, on the device and with the lengths of the recipe."""
    engine = Engine.from_pretrained(
        model,
        device=resolve_device(recipe.training.device),
        instruction_aware=instruction_aware,
    )
    engine.tokens = with_limits(engine.tokens, recipe, engine.model)
    engine.pictures = replace(engine.pictures, num_frames=recipe.data.num_frames)
    return engine
