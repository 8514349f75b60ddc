"""The data sets of a recipe: prepared, mixed, checked; and the benchmarks it names."""

import os.path
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from instructblip.data.custom.folder import FolderSet
from instructblip.data.custom.formats import FORMATS, custom_source, group_column
from instructblip.data.custom.remote import fetch_tree, is_remote
from instructblip.data.custom.rows import CustomSet
from instructblip.data.order import Mixture
from instructblip.data.prepared.check import (
    Context,
    Diagnosis,
    check_dataset,
    evaluated_by,
    findings,
    fingerprint,
    left_out,
    num_bad,
    unchecked,
)
from instructblip.data.prepared.dataset import DatasetView, PreparedDataset
from instructblip.data.prepared.images import gather_facts
from instructblip.data.prepared.prepare import Job, all_of, prepare, prepare_all
from instructblip.data.reading.decode import NARROW
from instructblip.data.reading.records import local_path
from instructblip.data.samples import Examples
from instructblip.data.sources import SOURCES, source_of
from instructblip.data.templates import Language, check_template, language_of, templates_of
from instructblip.data.tokens import Tokens
from instructblip.evaluation.benchmarks import OWNERS, Benchmark, groups_of, select_benchmarks
from instructblip.evaluation.evaluate import check_rows
from instructblip.model.checkpoints.directory import model_directory, read_config
from instructblip.model.decoding import GREEDY, merge_overrides
from instructblip.model.language.adapters import context_length
from instructblip.recipe.schema import DataSet, Recipe
from instructblip.scenes.official import SCENE_SETS, other_data

TrainingSet = PreparedDataset | DatasetView
"""A prepared set, or the examples of it that passed the check."""


LONG_TASKS = {"caption", "caption_ocr", "instruct"}
"""Tasks whose answers are sentences."""


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
    names = training_names(recipe)
    return dict(zip(names, prepare_all(jobs_of(recipe, names), workers=1), strict=True))


def jobs_of(recipe: Recipe, names: Sequence[str]) -> list[Job]:
    """How the entries ``names`` of ``data.sets`` are prepared; what is wrong with them in one
    error."""
    return all_of(partial(job_of, recipe, name) for name in names)


def job_of(recipe: Recipe, name: str, split: str | None = None) -> Job:
    """How the entry ``name`` of ``data.sets``, or another split of it, is prepared. A root that is
    a URL is fetched first.

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
        root = data.root / local_path(where, f"data.sets.{name}.root")
    if not custom and source not in SOURCES:
        raise ValueError(
            f"data.sets.{name}: {source!r} is no published data set. For your data set `format:` "
            f"(one of {', '.join(FORMATS)}) and `root:`, their folder; else set `source:` to one "
            f"of {', '.join(sorted(SOURCES))}"
        )
    reader = (
        custom_source(_custom_set(name, entry, root, data.root)) if custom else source_of(source)
    )
    if not root.is_dir():
        raise FileNotFoundError(
            f"data.sets.{name}: {root.absolute()} does not exist; expected "
            f"{reader.files.format(split=split or entry.split)} there, and images. Put them there, "
            f"or set `root:` of the entry to their folder below data.root, which is {data.root}"
        )
    folder = source if custom or where == data.where_of(source) else f"{source}@{name}"
    return Job(folder, root, split or entry.split, data.prepared_root, reader, data.max_bad_rate)


def _custom_set(name: str, entry: DataSet, root: Path, data_root: Path) -> CustomSet:
    assert entry.format is not None
    if name in SOURCES:
        raise ValueError(
            f"data.sets.{name}: {name} is a published data set; choose another name for your data"
        )
    for key in ("images", "path"):
        given = getattr(entry, key) or "."
        place = os.path.abspath(root / given)  # noqa: PTH100 (links are followed later)
        if not any(Path(place).is_relative_to(top.absolute()) for top in (data_root, root)):
            raise ValueError(
                f"data.sets.{name}.{key}: {given!r} leaves the data root {data_root}; expected a "
                "path below it"
            )
    images = entry.images
    if images is None:  # an imagefolder's paths start beside its metadata, wherever that is
        below = entry.format != "imagefolder" and (root / "images").is_dir()
        images = "images" if below else "."
    if entry.task is not None:
        templates_of(entry.task)
    columns = tuple(sorted(entry.columns.items()))
    language = entry.language or "en"
    return CustomSet(
        name, entry.format, entry.path, images, columns, entry.task, entry.group, language
    )


def make_mixture(recipe: Recipe, datasets: Mapping[str, Examples]) -> Mixture:
    """How often each data set is drawn."""
    return Mixture(
        sizes={name: len(dataset) for name, dataset in datasets.items()},
        weights={name: recipe.data.sets[name].weight for name in datasets},
        temperature=recipe.data.temperature,
    )


def languages_of(recipe: Recipe, datasets: Mapping[str, Examples]) -> dict[str, Language]:
    """The language of the instructions of each data set: what the recipe says, or that of the
    answers of custom data, by up to 1000 examples."""
    languages: dict[str, Language] = {}
    for name, dataset in datasets.items():
        entry = recipe.data.sets[name]
        language = entry.language or "en"
        if entry.language is None and entry.format is not None:
            chosen = range(0, len(dataset), len(dataset) // 1000 + 1)
            language = language_of(answer for i in chosen for answer in dataset[i].answers)
        languages[name] = language
    return languages


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


def window_note(recipe: Recipe, datasets: Mapping[str, Examples]) -> str:
    """The line that says which training images ``data.window=auto`` changes; empty for none."""
    if recipe.data.window != "auto":
        return ""
    counts = {name: _count_narrow(dataset) for name, dataset in datasets.items()}
    listed = ", ".join(f"{count} of {name}" for name, count in counts.items() if count)
    return listed and (
        f"data.window=auto: {listed} use a small part of their grey values, and each image is "
        "stretched to what it uses; data.window=[low, high] sets one window for all, full none"
    )


def _count_narrow(dataset: Examples) -> int:
    whole = dataset.dataset if isinstance(dataset, DatasetView) else dataset
    if isinstance(whole, PreparedDataset):
        return findings(whole).get(NARROW, 0)
    names = {name for i in range(len(dataset)) for name in dataset[i].images}
    facts = gather_facts(names, dataset.image_root, {})
    return sum((fact.note or "").startswith(NARROW) for _, fact in facts)


# --- benchmarks ----------------------------------------------------------------------------------


def benchmarks_of(recipe: Recipe, names: Iterable[str]) -> list[Benchmark]:
    """The benchmarks or groups called ``names``, with the recipe's prompts and decoding.

    Raises ValueError for a prompt of an unknown benchmark or with an unknown placeholder.
    """
    decoding, prompts = recipe.evaluation.decoding, recipe.evaluation.prompts
    own = recipe.evaluation.own_benchmarks
    select_benchmarks(prompts, own)
    chosen = [
        replace(b, prompt=check_template(prompts[b.name])) if b.name in prompts else b
        for b in select_benchmarks(names, own)
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


def choosing_note(recipe: Recipe) -> str:
    """The line about own benchmarks that choose the weights and score them too; empty without."""
    final = {b.name for b in benchmarks_of(recipe, recipe.evaluation.benchmarks)}
    both = [b.name for b in validation_of(recipe) if b.role == "own" and b.name in final]
    if not both:
        return ""
    return (
        f"{', '.join(both)} of evaluation.own chooses the best weights (evaluation.validation) and "
        "is scored at the end too (evaluation.benchmarks), which makes that score a little too "
        "high: validate on a benchmark with another split"
    )


def prepare_split(
    recipe: Recipe, benchmark: Benchmark, split: str | None = None
) -> PreparedDataset:
    """The split of a benchmark, or another one of the same data set."""
    source, split, data = benchmark.source, split or benchmark.split, recipe.data
    if benchmark.role == "own":
        return job_of(recipe, source, split).run()
    root = data.root_of(source)
    return prepare(source, root, split, data.prepared_root, max_bad_rate=data.max_bad_rate)


def scored_rows(
    recipe: Recipe, benchmark: Benchmark, dataset: PreparedDataset | FolderSet
) -> Examples:
    """The examples of ``dataset`` that a benchmark scores. Raises ValueError for an own benchmark
    that its rows do not fit, before a model answers any."""
    if benchmark.role != "own":
        return dataset
    key, task = f"evaluation.own.{benchmark.name}", recipe.evaluation.own[benchmark.name].task
    tasks = Counter(example.task for example in dataset)
    counted = ", ".join(f"{count} of {name}" for name, count in tasks.items())
    long = tasks.keys() & LONG_TASKS
    if task is None and long and tasks.keys() - long:
        raise ValueError(
            f"{key}: its rows are {counted}, short and long answers, which need different prompts, "
            f"lengths and metrics; make a benchmark for each, with `task: {next(iter(tasks))}`"
        )
    if task is not None and task not in tasks:
        raise ValueError(f"{key}: no row has the task {task}; there are {counted or 'no rows'}")
    check_rows(benchmark, (row for row in dataset if task in (None, row.task)), key)
    chosen = [i for i, row in enumerate(dataset) if task in (None, row.task)]
    return dataset if len(chosen) == len(dataset) else DatasetView(dataset, chosen)


def prepare_benchmarks(recipe: Recipe, benchmarks: Iterable[Benchmark]) -> list[Held]:
    """Each benchmark with its examples.

    Raises FileNotFoundError that names every benchmark without data, the files it needs and where
    they belong.
    """
    held, missing = [], []
    for benchmark in benchmarks:
        try:
            dataset = scored_rows(recipe, benchmark, prepare_split(recipe, benchmark))
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
    training = prepare_split(recipe, benchmark, "train")
    return sorted({answer for example in training for answer in example.answers})


def _remedy(recipe: Recipe, benchmark: Benchmark) -> str:
    """Where the files of a benchmark come from, and where they belong."""
    if benchmark.role == "own":
        return f"The data are those of data.sets.{benchmark.source}"
    if any(group.startswith("scenes") for group in groups_of(benchmark.name, benchmark.role)):
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
    tokens, evaluated = _response_tokens(recipe), []
    context = _context(recipe)
    for benchmark in evaluation_sets(recipe):
        try:
            dataset = _prepare_if_present(recipe, benchmark)
            if dataset is not None:
                scored_rows(recipe, benchmark, dataset)
        except (FileNotFoundError, ValueError) as error:
            yield str(error)
            continue
        if dataset is not None and dataset.path not in {each.path for each in evaluated}:
            evaluated.append(dataset)
            limits = _written_tokens(recipe, tokens, benchmark)
            yield check_dataset(
                dataset,
                tokens=limits,
                context=context,
                decode=decode,
                perceptual=perceptual,
                window=recipe.data.window,
            )
    shown = evaluated_by(evaluated)
    for name in training_names(recipe):
        if fault := evaluated_too(recipe, name):
            yield fault
            continue
        try:
            job = job_of(recipe, name)
            dataset = job.run()
            _refuse_shared_rows(recipe, name, dataset, evaluated)
        except (FileNotFoundError, ValueError) as error:
            yield str(error)
            continue
        entry = recipe.data.sets[name]
        if entry.format and entry.group is None:
            custom = _custom_set(name, entry, job.root, recipe.data.root)
            if column := group_column(custom, job.root, job.split):
                warnings.warn(column.describe(custom.name), stacklevel=2)
        yield check_dataset(
            dataset,
            evaluated=shown,
            against=[_key(dataset) for dataset in evaluated],
            tokens=tokens,
            context=context,
            drop_leaked=recipe.data.drop_leaked,
            max_images=_most_images(recipe, name),
            decode=decode,
            perceptual=entry.format is not None,
            window=recipe.data.window,
        )


def passes(recipe: Recipe, diagnosis: Diagnosis) -> bool:
    """Whether a set has no more bad examples than the recipe allows."""
    return diagnosis.num_bad <= recipe.data.max_bad_rate * diagnosis.count


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
    evaluated = [
        dataset for benchmark in evaluation_sets(recipe)
        if (dataset := _prepare_if_present(recipe, benchmark)) is not None
    ]  # fmt: skip
    for name, dataset in datasets.items():
        _refuse_shared_rows(recipe, name, dataset, evaluated)
    against = [_key(dataset) for dataset in evaluated]
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
    """The examples that the last check did not leave out; ValueError if too many are bad, or all
    are left out."""
    skipped, bad = frozenset(left_out(dataset)), num_bad(dataset)
    if bad > max_bad_rate * len(dataset):
        raise ValueError(
            f"{_key(dataset)}: {bad} of {len(dataset)} examples are bad, more than "
            f"data.max_bad_rate {max_bad_rate:g} allows; they are listed in "
            f"{dataset.path / 'bad_samples.jsonl'}. Repair them, or raise the rate to leave them "
            "out"
        )
    if not skipped:
        return dataset
    if len(skipped) == len(dataset):
        raise ValueError(
            f"{_key(dataset)}: the check leaves all {len(dataset)} examples out; see "
            f"{dataset.path / 'bad_samples.jsonl'}"
        )
    return DatasetView(dataset, [i for i in range(len(dataset)) if i not in skipped])


def evaluation_sets(recipe: Recipe) -> list[Benchmark]:
    """The benchmarks that the recipe is evaluated on; of published ones one for each (source,
    split)."""
    final = benchmarks_of(recipe, recipe.evaluation.benchmarks)
    sets = {}
    for b in (*validation_of(recipe), *final):
        sets.setdefault((b.source, b.split, b.name if b.role == "own" else ""), b)
    return list(sets.values())


def evaluated_too(recipe: Recipe, name: str) -> str:
    """Why an entry of ``data.sets`` cannot be trained on: the recipe is evaluated on the same
    split. Empty otherwise; the check finds single images that two sets share."""
    data, evaluated = recipe.data, evaluation_sets(recipe)
    entry, source = data.sets[name], data.source_of(name)
    for b in evaluated:
        if b.role == "own" and (b.source, b.split) == (name, entry.split):
            return (
                f"data.sets.{name}: evaluation.own.{b.name} scores the split {b.split} that it "
                "trains on; train on another split, or score another one"
            )
    published = {(b.source, b.split) for b in evaluated if b.role != "own"}
    if entry.format is not None or (source, entry.split) not in published:
        return ""
    if (data.root / (entry.root or source)).resolve() != data.root_of(source).resolve():
        return ""
    return (
        f"data.sets.{name}: {source} {entry.split} is a set that this recipe is evaluated on; "
        "train on another split, or take its benchmark out of evaluation.validation and "
        "evaluation.benchmarks"
    )


def _refuse_shared_rows(
    recipe: Recipe, name: str, training: PreparedDataset, evaluated: Iterable[PreparedDataset]
) -> None:
    """ValueError if custom data have rows of a set that the recipe is evaluated on, as where one
    file without splits is read for both."""
    for other in evaluated if recipe.data.sets[name].format else ():
        if other.image_root != training.image_root:
            continue
        shared = {*_records(training)} & {*_records(other)}
        if shared:
            raise ValueError(
                f"data.sets.{name}: {len(shared)} of its {len(training)} rows are also in "
                f"{_key(other)}, which the recipe is evaluated on; split the rows, such as into "
                "files with `path: {split}.jsonl`"
            )


def _records(dataset: PreparedDataset) -> Iterator[tuple[object, ...]]:
    return ((e.where, e.images, e.question, e.answers) for e in dataset)


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


def _prepare_if_present(recipe: Recipe, benchmark: Benchmark) -> PreparedDataset | None:
    try:
        return prepare_split(recipe, benchmark)
    except FileNotFoundError:
        if benchmark.role == "own":
            raise
        return None


def _written_tokens(recipe: Recipe, tokens: Tokens | None, benchmark: Benchmark) -> Tokens | None:
    """The tokenizers with the greatest length that own benchmarks let the model write on the same
    rows; None without such a benchmark."""
    if tokens is None or benchmark.role != "own":
        return None
    place = benchmark.source, benchmark.split
    lengths = [
        int(b.decoding.get("max_new_tokens", GREEDY.max_new_tokens))
        for b in evaluation_sets(recipe)
        if b.role == "own" and b.mode == "generate" and (b.source, b.split) == place
    ]
    return replace(tokens, max_response=max(lengths)) if lengths else None


def _context(recipe: Recipe) -> Context | None:
    """What a sample of the recipe's model has to fit into; None without a limit, and where the
    model is not on this machine."""
    try:
        config = read_config(recipe.model.start)
    except (FileNotFoundError, ValueError):
        return None
    length = context_length(config.language)
    if length is None:
        return None
    return Context(length, config.num_query_tokens, recipe.data.num_frames)


def _response_tokens(recipe: Recipe) -> Tokens | None:
    """The tokenizers that measure responses; None where the model is not on this machine."""
    try:
        directory = model_directory(recipe.model.start)
        return Tokens.from_pretrained(directory, max_response=recipe.data.max_response)
    except (FileNotFoundError, ValueError):
        return None
