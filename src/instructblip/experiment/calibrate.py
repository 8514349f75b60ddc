"""Calibration of a saved model: answer samples that it was not trained on, fit, store beside it."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from instructblip.data.prepared.dataset import DatasetView
from instructblip.evaluation.calibration import CALIBRATION_FILE, FEWEST, Calibration, Fitted, fit
from instructblip.evaluation.evaluate import MOST_CLASSES, pick
from instructblip.evaluation.scoring import CAPTION_METRICS
from instructblip.experiment.datasets import (
    Held,
    benchmarks_of,
    prepare_benchmarks,
    prepare_split,
    training_names,
    validation_of,
)
from instructblip.experiment.evaluate import load_answerer, score
from instructblip.experiment.folder import OWN, SET
from instructblip.inference.engine import Engine
from instructblip.inference.fingerprint import fingerprint
from instructblip.model.checkpoints.directory import HUB, NAMES, model_directory
from instructblip.recipe.schema import EvaluationConfig, Recipe

MOST = 1000
"""Samples of a set that are answered, unless a limit is given."""


def calibrate(
    recipe: Recipe,
    model: str,
    benchmarks: Sequence[str] = (),
    split: str | None = None,
    limit: int = MOST,
) -> tuple[Fitted, Path]:
    """Fit a calibration to ``model`` and write it into its directory; returns the file too.

    Args:
        recipe: of the run: what it was trained and validated on, and the prompts.
        model: a model or run directory.
        benchmarks: those whose samples are answered; none for ``evaluation.validation``.
        split: of the samples; by default that of the validation, and val.
        limit: samples of each benchmark.

    Of a set that chose the step of the training the samples that did not are taken, where there are
    100.

    Raises ValueError for a model that cannot be written to, for samples of a test split or that
    were trained on, and as `evaluation.calibration.fit`; FileNotFoundError for missing data.
    """
    if model in NAMES or model.startswith(HUB):
        raise ValueError(
            f"{model} is no directory of yours, and the calibration is stored beside the model: "
            f"`instructblip export {model} DIRECTORY` writes one"
        )
    directory = model_directory(model)
    validated = {(b.source, b.split) for b in validation_of(recipe)}
    chosen = [replace(b, split=split or "val") for b in benchmarks_of(recipe, benchmarks)] or [
        replace(b, split=split or b.split) for b in validation_of(recipe)
    ]
    if not chosen:
        raise ValueError(_why_nothing_to_fit(recipe, model, directory))
    for benchmark in chosen:
        if benchmark.split == "test":
            raise ValueError(
                f"{benchmark.name}: the test split is kept for the final score; calibrate on "
                "another one with --split val, or on another set with --benchmarks"
            )
        for name in training_names(recipe):
            entry = recipe.data.sets[name]
            if (recipe.data.source_of(name), entry.split) == (benchmark.source, benchmark.split):
                raise ValueError(
                    f"{benchmark.name}: split {benchmark.split} was trained on (data.sets.{name}), "
                    "and a model is surer there than anywhere else; calibrate on another split "
                    "with --split, or on another set with --benchmarks"
                )
    held, chose_step = [], False
    for each in prepare_benchmarks(recipe, chosen):
        refuse_rows_trained_on(recipe, each)
        if (each.benchmark.source, each.benchmark.split) in validated:
            unused = _did_not_choose(each, recipe.evaluation.validation_limit)
            chose_step |= unused is None
            each = each if unused is None else replace(each, dataset=unused)
        held.append(each)
    settings = recipe.evaluation.model_copy(update={"limit": limit})
    recipe = recipe.model_copy(update={"evaluation": settings})
    engine = load_answerer(recipe, model, [each.dataset for each in held])
    if not isinstance(engine, Engine):
        raise ValueError(f"{model} is a model of transformers: give a directory of this package")
    fitted = fit_model(engine, directory, held, settings, limit, chose_step)
    return fitted, fitted.calibration.save(directory)


def _why_nothing_to_fit(recipe: Recipe, model: str, directory: Path) -> str:
    """Why a recipe has no samples to calibrate on, and what to do now."""
    named = "name sets that the model was not trained on with --benchmarks"
    entry = recipe.data.sets.get(SET)
    if entry is None or entry.format != OWN.format:
        return f"the recipe names no validation: {named}"
    serve = f"`instructblip serve --model {model}`"
    if (directory / CALIBRATION_FILE).is_file():
        return (
            f"`tune` calibrated {model} on the examples that it held back: {serve} gives its "
            f"confidences; to calibrate it on others, {named}"
        )
    return (
        f"`tune` calibrates {model} on the examples that it holds back, from {FEWEST} on, right "
        f"and wrong ones, and these were too few or all alike: tune on more images, or {named}. "
        f"Without confidences, {serve} and `instructblip answer --model {model}` answer now"
    )


def fit_model(
    engine: Engine,
    directory: Path,
    held: Sequence[Held],
    settings: EvaluationConfig,
    limit: int,
    chose_step: bool = False,
) -> Fitted:
    """Fit a calibration to the model in ``directory`` by what ``engine`` answers: to each set as it
    is, and to a set of few short answers also with these as candidates.

    ``chose_step`` as in `Calibration`. ValueError as `evaluation.calibration.fit`.
    """
    options = {"limit": limit, "details": True, "baseline": False}
    results = [
        score(engine, one, settings, **options)
        for each in held
        for one in (each, *closed_question(each))
    ]
    aware = engine.model.config.instruction_aware
    model = fingerprint(directory, aware, quantize=settings.quantize)
    return fit(results, model, chose_step)


def closed_question(held: Held) -> list[Held]:
    """The set with its answers as candidates, if they are at most 20, each of five samples on
    average; else nothing."""
    benchmark, data = held.benchmark, held.dataset
    if benchmark.mode == "rank" or benchmark.metric in CAPTION_METRICS:
        return []
    names = sorted({data[i].answers[0] for i in range(len(data))})
    if len(names) > MOST_CLASSES or 5 * len(names) > len(data):
        return []
    asked = {"mode": "rank", "metric": "exact_match", "others": (), "decoding": {}}
    return [replace(held, benchmark=replace(benchmark, candidates=tuple(names), **asked))]


def refuse_rows_trained_on(recipe: Recipe, held: Held) -> None:
    """ValueError for custom data of which some rows are training rows too, whatever their split is
    called."""
    benchmark, data = held.benchmark, held.dataset
    if benchmark.role != "own" or benchmark.source not in training_names(recipe):
        return
    split = recipe.data.sets[benchmark.source].split
    trained = {(e.images, e.question) for e in prepare_split(recipe, benchmark, split)}
    rows = [data[i] for i in range(len(data))]
    if same := [row for row in rows if (row.images, row.question) in trained]:
        raise ValueError(
            f"{benchmark.name}: {len(same)} of {len(rows)} rows were trained on, such as "
            f"{same[0].where}: calibrate on rows that were not, with --split or --benchmarks"
        )


def _did_not_choose(held: Held, limit: int | None) -> DatasetView | None:
    """The samples that validation left out; None for fewer than 100."""
    data = held.dataset
    kept = sorted(set(range(len(data))).difference(pick(len(data), limit)))
    return DatasetView(data, kept) if len(kept) >= FEWEST else None


def note(calibration: Calibration) -> str:
    """What to know of a calibration whose samples also chose the step of the training; else
    nothing."""
    if not calibration.chose_step:
        return ""
    return (
        "the same samples chose the step that was kept, so the model is a little better on them "
        "than on others, and its confidences a little too high"
    )
