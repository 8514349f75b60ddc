"""Stored image features in place of pixels, where a recipe wants them and they save time."""

import json
import shutil
import time
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from instructblip.core import distributed
from instructblip.core.files import read_json
from instructblip.data.features import (
    TYPES,
    Encode,
    Features,
    FeatureStore,
    FeatureType,
    fill,
    hash_images,
    measure,
    store_name,
)
from instructblip.data.images import ImageTransform
from instructblip.data.prepared.dataset import DatasetView, PreparedDataset
from instructblip.data.prepared.images import ImageFact
from instructblip.data.samples import Examples, ImageReader
from instructblip.evaluation.evaluate import pick
from instructblip.inference.engine import Engine
from instructblip.model.instructblip import InstructBlip
from instructblip.model.trainable import part_of
from instructblip.recipe.schema import Recipe
from instructblip.training.checkpoint import saved_steps

FEATURES_FILE = "features.json"
"""In a run directory: whether the run reads stored features. A resumed run keeps to it."""


def features_note(readers: Iterable[ImageReader]) -> dict[str, str]:
    """The file that `began_with` reads."""
    stored = any(reader.features is not None for reader in readers)
    return {FEATURES_FILE: json.dumps({"stored": stored}) + "\n"}


def began_with(run: Path | None, resume: bool) -> bool | None:
    """Whether the run that resumes in ``run`` reads stored features; None for a new run."""
    if run is None or not resume or not saved_steps(run / "checkpoints"):
        return None
    path = run / FEATURES_FILE
    return read_json(path)["stored"] if path.is_file() else None


def training_features(
    recipe: Recipe,
    model: InstructBlip,
    readers: Mapping[str, ImageReader],
    datasets: Mapping[str, Examples],
    began_with: bool | None = None,
) -> dict[str, ImageReader]:
    """``readers`` of the data sets, with stored features where they save time: all or none, as a
    batch has pixels or features. A run that resumes passes what it `began_with`, so that it resumes
    bit for bit."""
    reads = recipe.training.steps * recipe.training.batch_size
    transforms = dict.fromkeys(reader.transform for reader in readers.values())
    if not all([_wanted(recipe, model, transform) for transform in transforms]):
        return dict(readers)
    plain, stored = {}, {}
    for transform in transforms:
        names = [name for name in readers if readers[name].transform == transform]
        images = readers[names[0]]
        if not transform.is_random:  # whether features pay must not change what a run reads
            images = replace(images, transform=transform.for_features())
        plain |= dict.fromkeys(names, images)
        shown = [(datasets[name], _images_of(datasets[name])) for name in names]
        features = make_features(recipe, model, images, shown, reads, began_with=began_with)
        stored |= dict.fromkeys(names, replace(images, features=features))
    return stored if all(reader.features for reader in stored.values()) else plain


def with_features(
    recipe: Recipe, engine: Engine, datasets: Iterable[Examples], limit: int | None, times: int
) -> Engine:
    """``engine``, which reads exact features of ``limit`` examples of each set, where they save
    time; the examples are answered ``times`` times."""
    shown = [(d, [d[i].images for i in pick(len(d), limit)]) for d in datasets]
    reads = times * sum(len(names) for _, names in shown)
    features = make_features(recipe, engine.model, engine.images, shown, reads, exact=True)
    return engine.with_images(replace(engine.images, features=features))


def _images_of(dataset: Examples) -> Iterable[tuple[str, ...]]:
    if isinstance(dataset, PreparedDataset | DatasetView):
        return dataset.images()  # from the index, without reading the examples
    return [dataset[i].images for i in range(len(dataset))]


def make_features(
    recipe: Recipe,
    model: InstructBlip,
    images: ImageReader,
    shown: Iterable[tuple[Examples, Iterable[tuple[str, ...]]]],
    reads: int,
    exact: bool = False,
    began_with: bool | None = None,
) -> Features | None:
    """Stored features of images, computed where they are missing.

    Returns None where the recipe does not want them or, with ``features.cache=auto``, where they
    would not save time. All ranks call this together.

    Args:
        images: how images are read, without stored features.
        shown: data sets, each with `Example.images` of those of its examples that are read.
        reads: how often a sample will be read in total.
        exact: refuse a store that rounds.
        began_with: the decision of the run that resumes, which ``auto`` keeps.
    """
    settings, transform = recipe.features, images.transform.for_features()
    if not _wanted(recipe, model, images.transform):
        return None
    device = distributed.resolve_device(recipe.training.device)
    model.vision_model.to(device)

    def encode(pixels: Tensor) -> Tensor:
        with torch.no_grad():
            return model.encode_image(pixels.to(device))

    size = transform.image_size
    native = encode(torch.zeros(1, 3, size, size)).dtype
    kind: FeatureType = settings.dtype or ("bf16" if native == torch.bfloat16 else "fp32")
    if exact and kind != "fp32" and TYPES[kind] != native:
        return None
    root = settings.root or recipe.data.root / "features"
    frames: set[tuple[str, str]] = set()
    known: dict[str, ImageFact] = {}
    for dataset, names in shown:
        for paths in (images.paths(each, dataset.image_root) for each in names):
            frames |= {(path, paths[0]) for path in paths}
        whole = dataset.dataset if isinstance(dataset, DatasetView) else dataset
        known |= whole.facts() if isinstance(whole, PreparedDataset) else {}
    features = Features(
        FeatureStore(root / store_name(transform, model.encoder_fingerprint(), kind), kind),
        hash_images({path for path, _ in frames}, known),
        views=settings.views if transform.crop else 1,
        frames=frozenset(frames if transform.crop else ()),
    )
    if settings.cache == "auto":
        keeps = began_with
        if keeps is None and distributed.is_main():
            keeps = features_pay(features, transform, encode, reads)
        if not distributed.broadcast_object(keeps):
            if began_with is False and distributed.is_main() and not features.missing():
                print(
                    f"image features: not read from {root}, as the run began without them; "
                    "features.cache=on reads them"
                )
            return None
    began = time.monotonic()
    count = fill(features, transform, encode, model.image_chunk, recipe.training.workers)
    if count and distributed.is_main():
        seconds = time.monotonic() - began
        print(f"image features: {count:,} computed in {seconds:.0f} s, kept in {root}")
    return features


def _wanted(recipe: Recipe, model: InstructBlip, transform: ImageTransform) -> bool:
    """Whether the recipe allows features; ValueError where it insists and the encoder trains."""
    settings = recipe.features
    if settings.cache == "off":
        return False
    if any(p.requires_grad for n, p in model.named_parameters() if part_of(n) == "vision_tower"):
        if settings.cache == "on":
            raise ValueError(
                "features.cache=on needs a frozen image encoder, and training.trainable has "
                "vision_tower; take it out, or set features.cache=off"
            )
        return False
    # one stored view of an augmented image would be the same crop in each epoch
    views = settings.views > 1 and transform.crop
    return settings.cache == "on" or not transform.is_random or views


def features_pay(features: Features, transform: ImageTransform, encode: Encode, reads: int) -> bool:
    """Whether storing what is missing takes less time than encoding at every use, and fits."""
    missing = len(features.missing())
    if not missing:
        return True
    costs = measure(features, transform, encode, num_images=16)
    free = shutil.disk_usage(features.store.folder.parent).free
    pays = costs.saving(missing, reads) > 0 and missing * costs.nbytes < free / 2
    print(
        f"image features: {costs.encode * 1000:.2g} ms to compute, {costs.read * 1000:.2g} ms to "
        f"read, {missing:,} to store in {missing * costs.nbytes / 1e9:.2g} GB, {reads:,} uses: "
        + ("kept" if pays else "computed at each use")
    )
    return pays
