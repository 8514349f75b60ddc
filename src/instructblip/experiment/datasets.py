"""The data sets of a recipe: prepared, mixed, checked; and the benchmarks it names."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from instructblip.data.custom.formats import custom_source
from instructblip.data.custom.remote import fetch_tree, is_remote
from instructblip.data.custom.rows import CustomSet
from instructblip.data.order import Mixture
from instructblip.data.prepared.check import (
    Diagnosis,
    check_dataset,
    evaluated_by,
    fingerprint,
    left_out,
    unchecked,
)
from instructblip.data.prepared.dataset import DatasetView, PreparedDataset
from instructblip.data.prepared.prepare import Job, prepare
from instructblip.data.samples import Examples
from instructblip.data.sources import SOURCES, source_of
from instructblip.data.templates import check_template, templates_of
from instructblip.data.tokens import Tokens
from instructblip.evaluation.benchmarks import OWNERS, Benchmark, groups_of, select_benchmarks
from instructblip.model.checkpoints.directory import model_directory
from instructblip.model.decoding import merge_overrides
from instructblip.recipe.schema import DataSet, Recipe
from instructblip.scenes.official import SCENE_SETS, other_data

TrainingSet = PreparedDataset | DatasetView
"""A prepared set, or the examples of it that passed the check."""


@dataclass(frozen=True, slots=True)
class Held:
    """A benchmark with the examples that answer it."""

    benchmark: Benchmark
    dataset: Examples
    vocabulary: list[str] | None = None
    """The candidates of a benchmark that ranks all answers of its training split."""


# --- training sets -------------------------------------------------------------------------------


def training_names(recipe: Recipe) -> list[str]:
    """The entries of ``data.sets`` that are drawn: those of weight 0 are not."""
    return [name for name, entry in recipe.data.sets.items() if entry.weight]


def prepare_training(recipe: Recipe) -> dict[str, PreparedDataset]:
    """The data sets of the mixture by name, read and indexed."""
    return {name: job_of(recipe, name).run() for name in training_names(recipe)}


def job_of(recipe: Recipe, name: str) -> Job:
    """How the entry ``name`` of ``data.sets`` is prepared. A root that is a URL is fetched first.

    The prepared folder has the name of the source. An entry whose root differs from the root of
    the source's first entry gets a folder of its own, ``source@entry``.
    """
    data = recipe.data
    entry = data.sets[name]
    custom = entry.format is not None
    source = name if custom else data.source_of(name)
    where = entry.root or source
    if is_remote(where):
        root = fetch_tree(where, data.prepared_root / "fetched" / name)
    else:
        root = data.root / where
    reader = custom_source(_custom_set(name, entry, root)) if custom else source_of(source)
    folder = source if custom or where == data.where_of(source) else f"{source}@{name}"
    return Job(folder, root, entry.split, data.prepared_root, reader, data.max_bad_rate)


def _custom_set(name: str, entry: DataSet, root: Path) -> CustomSet:
    assert entry.format is not None
    if name in SOURCES:
        raise ValueError(
            f"data.sets.{name}: {name} is a published data set; choose another name for your data"
        )
    images = entry.images
    if images is None:  # an imagefolder's paths start beside its metadata, wherever that is
        below = entry.format != "imagefolder" and (root / "images").is_dir()
        images = "images" if below else "."
    if entry.task is not None:
        templates_of(entry.task)
    columns = tuple(sorted(entry.columns.items()))
    return CustomSet(
        name, entry.format, entry.path, images, columns, entry.task, entry.group, entry.language
    )


def make_mixture(recipe: Recipe, datasets: Mapping[str, Examples]) -> Mixture:
    """How often each data set is drawn."""
    return Mixture(
        sizes={name: len(dataset) for name, dataset in datasets.items()},
        weights={name: recipe.data.sets[name].weight for name in datasets},
        temperature=recipe.data.temperature,
    )


def describe_mixture(recipe: Recipe, mixture: Mixture) -> str:
    """A table: the share of each data set, and how often each of its examples is seen."""
    training = recipe.training
    lines = [f"{'data set':24} {'examples':>10} {'weight':>7} {'share':>7} {'epochs':>8}"]
    for row in mixture.table(training.steps * training.batch_size):
        lines.append(
            f"{row.name:24} {row.size:>10,} {row.weight:>7.2f} {row.probability:>7.1%} "
            f"{row.epochs:>8.2f}"
        )
    return "\n".join(lines)


# --- benchmarks ----------------------------------------------------------------------------------


def benchmarks_of(recipe: Recipe, names: Iterable[str]) -> list[Benchmark]:
    """The benchmarks or groups called ``names``, with the recipe's prompts and decoding.

    Raises ValueError for a prompt of an unknown benchmark or with an unknown placeholder.
    """
    decoding, prompts = recipe.evaluation.decoding, recipe.evaluation.prompts
    select_benchmarks(prompts)
    chosen = [
        replace(b, prompt=check_template(prompts.get(b.name, b.prompt)))
        for b in select_benchmarks(names)
    ]
    return [
        replace(b, decoding=merge_overrides(b.decoding, decoding)) if b.mode == "generate" else b
        for b in chosen
    ]


def validation_of(recipe: Recipe) -> list[Benchmark]:
    """The benchmarks scored during training, the held-in ones on their validation split."""
    return [
        replace(b, split="val") if b.role == "held_in" else b
        for b in benchmarks_of(recipe, recipe.evaluation.validation)
    ]


def prepare_split(recipe: Recipe, source: str, split: str) -> PreparedDataset:
    """A split of one of the published data sets."""
    data = recipe.data
    root = data.root_of(source)
    return prepare(source, root, split, data.prepared_root, max_bad_rate=data.max_bad_rate)


def prepare_benchmarks(recipe: Recipe, benchmarks: Iterable[Benchmark]) -> list[Held]:
    """Each benchmark with its examples.

    Raises FileNotFoundError that names every benchmark without data, the files it needs and where
    they belong.
    """
    held, missing = [], []
    for benchmark in benchmarks:
        try:
            dataset = prepare_split(recipe, benchmark.source, benchmark.split)
            held.append(Held(benchmark, dataset, _vocabulary(recipe, benchmark)))
        except FileNotFoundError as error:
            missing.append(f"{benchmark.name}: {error}. {_remedy(recipe, benchmark)}")
    if missing:
        raise FileNotFoundError("benchmarks without their data:\n  " + "\n  ".join(missing))
    return held


def _vocabulary(recipe: Recipe, benchmark: Benchmark) -> list[str] | None:
    """The distinct answers of the training split, for benchmarks that rank them."""
    if not benchmark.vocabulary:
        return None
    training = prepare_split(recipe, benchmark.source, "train")
    return sorted({answer for example in training for answer in example.answers})


def _remedy(recipe: Recipe, benchmark: Benchmark) -> str:
    """Where the files of a benchmark come from, and where they belong."""
    if "scenes" in groups_of(benchmark.name, benchmark.role):
        if taken := other_data(recipe.data.root, SCENE_SETS):
            return (
                f"`instructblip scenes` draws it, but not beside other data such as {taken[0]}: "
                "draw it elsewhere and set data.root"
            )
        return f"`instructblip scenes {recipe.data.root}` draws it"
    files = source_of(benchmark.source).files.format(split=benchmark.split)
    root = recipe.data.root_of(benchmark.source)
    return (
        f"Get {files}, and the images, from {OWNERS[benchmark.source]}; they go into "
        f"annotations/ and images/ of {root}"
    )


# --- the check -----------------------------------------------------------------------------------


def check_recipe(recipe: Recipe, decode: bool = False) -> Iterator[Diagnosis | str]:
    """Check every data set of a recipe: first what it is evaluated on, then what it trains on.

    Yields a diagnosis for each set, or the reason why a set cannot be read. Evaluation sets that
    are not on this machine are skipped. Near-duplicates are looked for in custom data.
    """
    perceptual = any(recipe.data.sets[name].format for name in training_names(recipe))
    evaluated = []
    for name, split in evaluation_sets(recipe):
        try:
            dataset = _prepare_if_present(recipe, name, split)
        except ValueError as error:
            yield str(error)
            continue
        if dataset is not None:
            evaluated.append(dataset)
            yield check_dataset(dataset, decode=decode, perceptual=perceptual)
    shown = evaluated_by(evaluated)
    tokens = _response_tokens(recipe)
    for name in training_names(recipe):
        if fault := evaluated_too(recipe, name):
            yield fault
            continue
        try:
            dataset = job_of(recipe, name).run()
        except (FileNotFoundError, ValueError) as error:
            yield str(error)
            continue
        yield check_dataset(
            dataset,
            evaluated=shown,
            against=[_key(dataset) for dataset in evaluated],
            tokens=tokens,
            drop_leaked=recipe.data.drop_leaked,
            max_images=_most_images(recipe, name),
            decode=decode,
            perceptual=recipe.data.sets[name].format is not None,
        )


def passes(recipe: Recipe, diagnosis: Diagnosis) -> bool:
    """Whether a set has no more bad examples than the recipe allows."""
    return len(diagnosis.left_out) <= recipe.data.max_bad_rate * diagnosis.count


def checked_training(
    recipe: Recipe, datasets: Mapping[str, PreparedDataset]
) -> Mapping[str, TrainingSet]:
    """The training sets without the examples that the last check found bad.

    ``data.check`` decides: ``required`` needs a check of the data as they are now, ``run`` makes
    one, ``skip`` takes the data as they are.

    Raises ValueError for a set that the recipe is evaluated on, a set that was not checked, and a
    set with too many bad examples.
    """
    data = recipe.data
    if data.check == "skip":
        return datasets
    for name in datasets:
        if fault := evaluated_too(recipe, name):
            raise ValueError(fault)
    against = [
        _key(dataset) for source, split in evaluation_sets(recipe)
        if (dataset := _prepare_if_present(recipe, source, split)) is not None
    ]  # fmt: skip
    stale = {
        name: reason
        for name, dataset in datasets.items()
        if (reason := unchecked(dataset, against, data.drop_leaked, _most_images(recipe, name)))
    }
    if stale and data.check == "run":
        for diagnosis in check_recipe(recipe):
            if isinstance(diagnosis, str):
                raise ValueError(diagnosis)
    elif stale:
        listed = "".join(f"\n  {name} {reason}" for name, reason in stale.items())
        raise ValueError(
            f"these data sets cannot be trained on yet:{listed}\nRun `instructblip check` with "
            "this recipe, or set data.check=run (checks now) or data.check=skip (takes any data)"
        )
    return {name: without_bad(dataset, data.max_bad_rate) for name, dataset in datasets.items()}


def without_bad(dataset: PreparedDataset, max_bad_rate: float) -> TrainingSet:
    """The examples that the last check did not find bad; ValueError if too many were."""
    bad = frozenset(left_out(dataset))
    if len(bad) > max_bad_rate * len(dataset):
        raise ValueError(
            f"{_key(dataset)}: {len(bad)} of {len(dataset)} examples are bad, more than "
            f"data.max_bad_rate {max_bad_rate:g} allows; they are listed in "
            f"{dataset.path / 'bad_samples.jsonl'}. Repair them, or raise the rate to leave them "
            "out"
        )
    if not bad:
        return dataset
    return DatasetView(dataset, [i for i in range(len(dataset)) if i not in bad])


def evaluation_sets(recipe: Recipe) -> list[tuple[str, str]]:
    """(source, split) of everything that the recipe is evaluated on, each once."""
    final = benchmarks_of(recipe, recipe.evaluation.benchmarks)
    return list(dict.fromkeys((b.source, b.split) for b in (*validation_of(recipe), *final)))


def evaluated_too(recipe: Recipe, name: str) -> str:
    """Why an entry of ``data.sets`` cannot be trained on: the recipe is evaluated on the same
    split. Empty otherwise; the check finds single images that two sets share."""
    data = recipe.data
    entry, source = data.sets[name], data.source_of(name)
    if entry.format is not None or (source, entry.split) not in evaluation_sets(recipe):
        return ""
    if (data.root / (entry.root or source)).resolve() != data.root_of(source).resolve():
        return ""
    return (
        f"data.sets.{name}: {source} {entry.split} is a set that this recipe is evaluated on; "
        "train on another split, or take its benchmark out of evaluation.validation and "
        "evaluation.benchmarks"
    )


def data_fingerprints(
    prepared: Mapping[str, PreparedDataset], checked: Mapping[str, TrainingSet]
) -> dict[str, str]:
    """Number of examples and fingerprint of each data set, which a resumed run compares."""
    return {name: f"{len(checked[name])} {fingerprint(prepared[name])}" for name in checked}


def _most_images(recipe: Recipe, name: str) -> int | None:
    """The most images that a sample of an entry may have: custom data may not have images that
    the model never sees. Published sets with several show frames of a video: None."""
    return recipe.data.num_frames if recipe.data.sets[name].format else None


def _key(dataset: PreparedDataset) -> str:
    return f"{dataset.name} {dataset.split}"


def _prepare_if_present(recipe: Recipe, source: str, split: str) -> PreparedDataset | None:
    try:
        return prepare_split(recipe, source, split)
    except FileNotFoundError:
        return None


def _response_tokens(recipe: Recipe) -> Tokens | None:
    """The tokenizers that measure responses; None where the model is not on this machine."""
    try:
        directory = model_directory(recipe.model.start)
        return Tokens.from_pretrained(directory, max_response=recipe.data.max_response)
    except (FileNotFoundError, ValueError):
        return None
