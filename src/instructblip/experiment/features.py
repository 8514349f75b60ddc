"""Stored image features in place of pixels, where a recipe wants them and they are worth it."""

import json
import shutil
import time
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from instructblip.core import distributed
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
from instructblip.data.prepared.dataset import DatasetView, PreparedDataset
from instructblip.data.prepared.images import ImageFact
from instructblip.data.samples import ImageReader
from instructblip.evaluation.evaluate import pick
from instructblip.experiment.datasets import TrainingSet
from instructblip.inference.engine import Engine
from instructblip.model.instructblip import InstructBlip, part_of
from instructblip.recipe.schema import Recipe
from instructblip.training.checkpoint import saved_steps
from instructblip.training.train import Batches, resolve_device

FEATURES_FILE = "features.json"
"""In a run directory: whether the run reads stored features, which its resumption keeps to."""


def features_note(batches: Batches) -> dict[str, str]:
    """What a run that reads ``batches`` notes down for `began_with`."""
    stored = isinstance(batches, Loader) and batches.images.features is not None
    return {FEATURES_FILE: json.dumps({"stored": stored}) + "\n"}


def began_with(run: Path, resume: bool) -> bool | None:
    """Whether the run that resumes in ``run`` reads stored features; None if none does or knows."""
    path = run / FEATURES_FILE
    if not resume or not saved_steps(run / "checkpoints") or not path.is_file():
        return None
    return json.loads(path.read_text(encoding="utf-8"))["stored"]


def use_features(
    recipe: Recipe,
    engine: Engine,
    datasets: Iterable[PreparedDataset],
    limit: int | None,
    times: int,
) -> None:
    """Let ``engine`` answer from stored features where that is exact; ``times`` over the sets."""
    images = [(d, [d[i].images for i in pick(len(d), limit)]) for d in datasets]
    reads = times * sum(len(frames) for _, frames in images)
    engine.images.features = make_features(
        recipe, engine.model, engine.images, images, reads, exact=True
    )


def make_features(
    recipe: Recipe,
    model: InstructBlip,
    pictures: ImageReader,
    images: Iterable[tuple[TrainingSet, Iterable[tuple[str, ...]]]],
    reads: int,
    exact: bool = False,
    began_with: bool | None = None,
) -> Features | None:
    """Stored features of ``images`` (of each set, ``Example.images``), computed where they are
    missing; None where the recipe does not want them or, with ``cache: auto``, they would not pay.

    ``reads`` is how often a sample will be read; ``exact`` refuses a store that rounds. With
    ``cache: auto``, a run goes on as it ``began_with``. All ranks call this together.
    """
    settings, transform = recipe.features, pictures.transform
    if not _wanted(recipe, model, transform):
        return None
    encode = _encoder(recipe, model)
    size = transform.image_size
    own = encode(torch.zeros(1, 3, size, size)).dtype
    kind: FeatureType = settings.dtype or ("bf16" if own == torch.bfloat16 else "fp32")
    if exact and kind != "fp32" and TYPES[kind] != own:
        return None
    root = settings.root or recipe.data.root / "features"
    frames: set[tuple[str, str]] = set()
    known: dict[str, ImageFact] = {}
    for dataset, names in images:
        for shown in (pictures.paths(own, dataset.image_root) for own in names):
            frames |= {(path, shown[0]) for path in shown}
        known |= _facts_of(dataset)
    features = Features(
        FeatureStore(root / store_name(transform, model.encoder_fingerprint(), kind), kind),
        hash_pictures({path for path, _ in frames}, known),
        views=settings.views if transform.train else 1,
        frames=frozenset(frames if transform.train else ()),
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


def _facts_of(dataset: TrainingSet) -> dict[str, ImageFact]:
    whole = dataset.dataset if isinstance(dataset, DatasetView) else dataset
    return whole.facts() if isinstance(whole, PreparedDataset) else {}


def _wanted(recipe: Recipe, model: InstructBlip, transform: ImageTransform) -> bool:
    """Whether the recipe allows features; ValueError where it insists and they cannot be kept."""
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
    # of augmented pictures one view would be the same crop in each epoch
    return settings.cache == "on" or not transform.train or settings.views > 1


def _encoder(recipe: Recipe, model: InstructBlip) -> Encode:
    device = resolve_device(recipe.training.device)
    model.vision_model.to(device)

    def encode(pixels: Tensor) -> Tensor:
        with torch.no_grad():
            return model.encode_image(pixels.to(device), norm=False)

    return encode


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
