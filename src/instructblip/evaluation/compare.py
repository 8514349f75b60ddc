"""Several models on the same benchmarks, side by side; ``tables.py`` prints the comparison.

Differences are paired: both models answered the same samples, and the bootstrap draws the same ones
for both. Only sets that all models have enter the means.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from instructblip.evaluation.bootstrap import (
    Difference,
    Floats,
    difference,
    interval,
    mean_over_sets,
)
from instructblip.evaluation.result import Result

ROLES = {"held_in": "held-in", "held_out": "held-out", "finetuned": "fine-tuned"}


@dataclass(frozen=True, slots=True)
class Cell:
    """A score and its 95 % interval; all None where the metric is not defined."""

    value: float | None
    low: float | None
    high: float | None
    n: int


@dataclass(frozen=True, slots=True)
class Row:
    """One benchmark, or the mean over one role, for all models that have it.

    ``differences`` are those to the baseline, for every other model; ``how`` is ``Result.how``,
    None for a mean.
    """

    name: str
    title: str
    role: str
    metric: str
    unseen_type: bool
    how: dict[str, Any] | None
    cells: dict[str, Cell]
    differences: dict[str, Difference]


@dataclass(frozen=True, slots=True)
class Comparison:
    """``rows`` are benchmarks, held-in before held-out; ``means`` one row per role."""

    models: tuple[str, ...]
    baseline: str
    rows: tuple[Row, ...]
    means: tuple[Row, ...]


def compare(models: Mapping[str, Sequence[Result]], baseline: str | None = None) -> Comparison:
    """Put the results of ``models`` side by side, each compared with ``baseline`` (the first).

    Raises ValueError unless all models answered the same samples of a benchmark with the same
    settings: otherwise their difference means nothing.
    """
    if not models:
        raise ValueError("no model to compare")
    base = next(iter(models)) if baseline is None else baseline
    if base not in models:
        raise ValueError(f"baseline {base!r} is none of the models: {', '.join(models)}")
    by_model = {model: {r.benchmark: r for r in results} for model, results in models.items()}
    names: dict[str, Result] = {}
    for results in models.values():
        for result in results:
            _check_pair(names.setdefault(result.benchmark, result), result)
    ordered = sorted(names.values(), key=lambda r: list(ROLES).index(r.role))
    resampled = {
        (model, name): result.resampled()
        for model, results in by_model.items()
        for name, result in results.items()
        if result.value is not None
    }
    rows = tuple(_row(result, by_model, resampled, base) for result in ordered)
    means = (
        _mean_row([row for row in rows if row.role == role], role, by_model, resampled, base)
        for role in ROLES
    )
    return Comparison(tuple(models), base, rows, tuple(mean for mean in means if mean))


def _check_pair(first: Result, second: Result) -> None:
    if first.settings["benchmark"] != second.settings["benchmark"]:
        raise ValueError(
            f"{first.benchmark}: the models were evaluated with different prompts, decodings or "
            "scorers; evaluate them alike"
        )
    if first.tokenizer != second.tokenizer:
        raise ValueError(
            f"{first.benchmark}: scored with the tokenizers {first.tokenizer} and "
            f"{second.tokenizer}; use one"
        )
    blind = any(result.blind for result in (first, second))
    if _samples(first, not blind) != _samples(second, not blind):
        raise ValueError(
            f"{first.benchmark}: the models did not answer the same samples ({first.n} and "
            f"{second.n}); evaluate both with the same data and limit"
        )


def _samples(result: Result, seeing: bool) -> list[list[Any]]:
    """What was asked, without the images for a blind control, which saw other ones."""
    names = ("id", "prompt", "answers", "candidates", *(["images"] if seeing else []))
    return [[prediction.get(name) for name in names] for prediction in result.predictions]


Results = Mapping[str, Mapping[str, Result]]  # by model and benchmark
Resampled = Mapping[tuple[str, str], Floats]  # of (model, benchmark)


def _row(result: Result, by_model: Results, resampled: Resampled, base: str) -> Row:
    name = result.benchmark
    cells = {
        model: _cell(results[name].value, resampled.get((model, name)), results[name].n)
        for model, results in by_model.items()
        if name in results
    }
    return Row(
        name=name,
        title=result.title,
        role=result.role,
        metric=result.metric,
        unseen_type=result.unseen_type,
        how=result.how,
        cells=cells,
        differences=_differences(cells, {m: resampled.get((m, name)) for m in cells}, base),
    )


def _mean_row(
    rows: list[Row], role: str, by_model: Results, resampled: Resampled, base: str
) -> Row | None:
    """The mean over the sets of one role for which all models have a score."""
    shared = [
        row.name
        for row in rows
        if all(model in row.cells and row.cells[model].value is not None for model in by_model)
    ]
    if not shared:
        return None
    means = {m: mean_over_sets([resampled[m, name] for name in shared]) for m in by_model}
    cells = {}
    for model, results in by_model.items():
        value = sum(results[name].value or 0.0 for name in shared) / len(shared)
        cells[model] = _cell(value, means[model], len(shared))
    return Row(
        name=f"mean_{role}",
        title=f"mean of {len(shared)} {ROLES[role]} sets",
        role=role,
        metric="mean",
        unseen_type=False,
        how=None,
        cells=cells,
        differences=_differences(cells, means, base),
    )


def _cell(value: float | None, resampled: Floats | None, n: int) -> Cell:
    if value is None or resampled is None:
        return Cell(None, None, None, n)
    bounds = interval(resampled)
    return Cell(value, bounds.low, bounds.high, n)


def _differences(
    cells: Mapping[str, Cell], resampled: Mapping[str, Floats | None], base: str
) -> dict[str, Difference]:
    differences = {}
    baseline = cells.get(base)
    for model, cell in cells.items():
        if model == base or baseline is None or cell.value is None or baseline.value is None:
            continue
        a, b = resampled[model], resampled[base]
        assert a is not None
        assert b is not None
        differences[model] = difference(cell.value - baseline.value, a, b)
    return differences
