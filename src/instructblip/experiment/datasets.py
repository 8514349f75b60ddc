"""The data sets that a recipe names, read and indexed; its mixture and its benchmarks."""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path

from instructblip.data.custom.files import CustomSet
from instructblip.data.custom.formats import custom_source
from instructblip.data.custom.remote import fetch_tree, is_remote
from instructblip.data.order import Mixture
from instructblip.data.prepared.dataset import DatasetView, PreparedDataset
from instructblip.data.prepared.prepare import Job, prepare
from instructblip.data.sources import SOURCES, source_of
from instructblip.data.templates import check_template, templates_of
from instructblip.evaluation.benchmarks import groups_of, select_benchmarks
from instructblip.evaluation.benchmarks.benchmark import Benchmark
from instructblip.evaluation.owners import OWNERS
from instructblip.recipe.schema import DataSet, Recipe
from instructblip.scenes.official import SCENE_SETS, other_data

TrainingSet = PreparedDataset | DatasetView
"""A prepared set, or what is left of it without its bad examples."""


def prepare_training(recipe: Recipe) -> dict[str, PreparedDataset]:
    """The data sets of the mixture, by name, those of weight 0 left out."""
    return {name: prepare_entry(recipe, name) for name in training_names(recipe)}


def training_names(recipe: Recipe) -> list[str]:
    return [name for name, entry in recipe.data.sets.items() if entry.weight]


def prepare_entry(recipe: Recipe, name: str) -> PreparedDataset:
    """The data set of one entry of ``data.sets``."""
    return job_of(recipe, name).run()


def job_of(recipe: Recipe, name: str) -> Job:
    """How an entry of ``data.sets`` is prepared. A root that is a URL is fetched first.

    It is prepared under its source's name; one whose root is not that of the source's first entry
    under a name of its own, ``source@entry``.
    """
    data = recipe.data
    entry = data.sets[name]
    own = entry.format is not None
    source = name if own else data.source_of(name)
    where = entry.root or source
    if is_remote(where):
        root = fetch_tree(where, data.prepared_root / "fetched" / name)
    else:
        root = data.root / where
    reader = custom_source(_custom_set(name, entry, root)) if own else source_of(source)
    folder = source if own or where == data.where_of(source) else f"{source}@{name}"
    return Job(folder, root, entry.split, data.prepared_root, reader, data.max_bad_rate)


def _custom_set(name: str, entry: DataSet, root: Path) -> CustomSet:
    assert entry.format is not None
    if name in SOURCES:
        raise ValueError(f"data.sets.{name}: this name is taken; give data of your own another one")
    images = entry.images
    if images is None:  # an imagefolder's paths start beside its metadata, wherever that is
        below = entry.format != "imagefolder" and (root / "images").is_dir()
        images = "images" if below else "."
    if entry.task is not None:
        templates_of(entry.task)
    columns = tuple(sorted(entry.columns.items()))
    return CustomSet(name, entry.format, entry.path, images, columns, entry.task)


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
            missing.append(f"{benchmark.name}: {error}. {_remedy(recipe, benchmark)}")
    if missing:
        raise FileNotFoundError("benchmarks without their data:\n  " + "\n  ".join(missing))
    return found


def _remedy(recipe: Recipe, benchmark: Benchmark) -> str:
    """Where the files of a benchmark come from, and where they go."""
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
        f"Get {files}, and the pictures, from {OWNERS[benchmark.source]}; they go into "
        f"annotations/ and images/ of {root}"
    )


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
