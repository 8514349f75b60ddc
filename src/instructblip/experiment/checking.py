"""The doctor for a recipe: its evaluation sets first, then its training sets against them."""

from collections.abc import Iterator, Mapping
from dataclasses import replace

from instructblip.data.prepared.check import (
    Diagnosis,
    check_dataset,
    evaluated_images,
    left_out,
    unchecked,
)
from instructblip.data.prepared.dataset import DatasetView, PreparedDataset
from instructblip.data.tokens import Tokens
from instructblip.experiment import datasets as preparing
from instructblip.model.checkpoints.directory import model_directory
from instructblip.recipe.schema import Recipe


def check_recipe(recipe: Recipe, decode: bool = False) -> Iterator[Diagnosis | str]:
    """Checks every data set of a recipe, one after the other.

    A set that cannot be read gives the reason as a text, a set that passes or fails its diagnosis.
    Evaluation sets that are not on this machine are left out.
    """
    evaluated = []
    for name, split in evaluation_sets(recipe):
        try:
            dataset = preparing.prepare_split(recipe, name, split)
        except FileNotFoundError:
            continue
        except ValueError as error:
            yield str(error)
            continue
        evaluated.append(dataset)
        yield check_dataset(dataset, decode=decode)
    pictures = evaluated_images(evaluated)
    tokens = _tokens(recipe)
    for name in preparing.training_names(recipe):
        if fault := evaluated_too(recipe, name):
            yield fault
            continue
        try:
            dataset = preparing.prepare_entry(recipe, name)
        except (FileNotFoundError, ValueError) as error:
            yield str(error)
            continue
        yield check_dataset(
            dataset,
            evaluated=pictures,
            against=[key(dataset) for dataset in evaluated],
            tokens=tokens,
            drop_leaked=recipe.data.drop_leaked,
            max_images=most_pictures(recipe, name),
            decode=decode,
        )


def most_pictures(recipe: Recipe, name: str) -> int | None:
    """How many pictures a sample of an entry may have: of one's own data none is passed over,
    while the published sets that have several show frames of videos."""
    data = recipe.data
    return data.num_frames if data.sets[name].format else None


def passes(recipe: Recipe, diagnosis: Diagnosis) -> bool:
    """Whether a set has no more bad examples than the recipe allows."""
    return len(diagnosis.left_out) <= recipe.data.max_bad_rate * diagnosis.count


def checked_training(
    recipe: Recipe, datasets: Mapping[str, PreparedDataset]
) -> Mapping[str, preparing.TrainingSet]:
    """The training sets without their bad examples, as the last check found them.

    Raises ValueError for a set that the recipe is measured on, that was not checked as it is now,
    or that has too many bad examples. ``data.check`` may ask for the check to be made here, or for
    none.
    """
    data = recipe.data
    if data.check == "skip":
        return datasets
    for name in datasets:
        if fault := evaluated_too(recipe, name):
            raise ValueError(fault)
    against = _present(recipe)
    stale = {
        name: reason
        for name, dataset in datasets.items()
        if (reason := unchecked(dataset, against, data.drop_leaked, most_pictures(recipe, name)))
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


def evaluation_sets(recipe: Recipe) -> list[tuple[str, str]]:
    """(source, split) of everything the recipe is measured on, each once."""
    settings = recipe.evaluation
    validation = preparing.benchmarks_of(recipe, settings.validation)
    final = preparing.benchmarks_of(recipe, settings.benchmarks)
    chosen = [*(replace(b, split="val") for b in validation), *final]
    return list(dict.fromkeys((b.source, b.split) for b in chosen))


def evaluated_too(recipe: Recipe, name: str) -> str:
    """Why an entry of ``data.sets`` is no training data: the recipe is measured on that very split
    of it. Empty for any other; pictures that two sets share are the check's to find."""
    data = recipe.data
    entry, source = data.sets[name], data.source_of(name)
    if entry.format is not None or (source, entry.split) not in evaluation_sets(recipe):
        return ""
    if (data.root / (entry.root or source)).resolve() != data.root_of(source).resolve():
        return ""
    return (
        f"data.sets.{name}: {source} {entry.split} is a set that this recipe is measured on; train "
        "on another split, or take its benchmark out of evaluation.validation and "
        "evaluation.benchmarks"
    )


def key(dataset: PreparedDataset) -> str:
    return f"{dataset.name} {dataset.split}"


def _present(recipe: Recipe) -> list[str]:
    found = []
    for name, split in evaluation_sets(recipe):
        try:
            found.append(key(preparing.prepare_split(recipe, name, split)))
        except FileNotFoundError:
            continue
    return found


def without_bad(dataset: PreparedDataset, max_bad_rate: float) -> preparing.TrainingSet:
    """The examples that the last check did not find bad; ValueError if those were too many."""
    bad = left_out(dataset)
    if len(bad) > max_bad_rate * len(dataset):
        raise ValueError(
            f"{key(dataset)}: {len(bad)} of {len(dataset)} examples are bad, more than "
            f"data.max_bad_rate {max_bad_rate:g} allows; they are listed in "
            f"{dataset.path / 'bad_samples.jsonl'}. Repair them, or raise the rate to leave them "
            "out"
        )
    if not bad:
        return dataset
    gone = frozenset(bad)
    return DatasetView(dataset, [i for i in range(len(dataset)) if i not in gone])


def _tokens(recipe: Recipe) -> Tokens | None:
    """The tokenizers that measure answers; None when the model is not on this machine."""
    try:
        directory = model_directory(recipe.model.start)
        return Tokens.from_pretrained(directory, max_response=recipe.data.max_response)
    except (FileNotFoundError, ValueError):
        return None
