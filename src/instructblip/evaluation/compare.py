"""Several models on the same benchmarks, side by side; ``tables.py`` prints the comparison.

Differences are paired: both models answered the same samples, and the bootstrap draws the same ones
for both. Only sets that all models have enter the means.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from instructblip.evaluation.bootstrap import Difference, Floats, Interval, difference, interval
from instructblip.evaluation.constant import Constant
from instructblip.evaluation.result import Result, Spread, spread_of

ROLES = {
    "held_in": "held-in", "held_out": "held-out", "finetuned": "fine-tuned",
    "objects": "invented objects", "retrieval": "retrieval", "own": "your data",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Cell:
    """A score and its 95 % interval, None where they are not defined; ``n`` samples, or sets of a
    mean."""

    value: float | None
    low: float | None
    high: float | None
    n: int


@dataclass(frozen=True, slots=True)
class Row:
    """One benchmark, or the mean over one role, for all models that have it.

    ``differences`` are those to the baseline, for every other model, none where `Result.too_few`;
    ``how`` is ``Result.how``, None for a mean. ``constant`` is the best constant answer, of a
    benchmark of the role "own", which has a row for each of its metrics. ``wordings`` is the spread
    of each model's scores under other prompts, where they were evaluated.
    """

    name: str
    title: str
    role: str
    metric: str
    unseen_type: bool
    how: dict[str, Any] | None
    cells: dict[str, Cell]
    differences: dict[str, Difference]
    constant: Constant | None = None
    wordings: dict[str, Spread] = field(default_factory=dict)
    too_few: bool = False


@dataclass(frozen=True, slots=True)
class Comparison:
    """``rows`` are benchmarks, held-in before held-out; ``means`` one row per role."""

    models: tuple[str, ...]
    baseline: str
    rows: tuple[Row, ...]
    means: tuple[Row, ...]

    def table(self, role: str) -> list[Row]:
        """The benchmarks of a role, then their mean if it is of several."""
        means = [row for row in self.means if max(cell.n for cell in row.cells.values()) > 1]
        return [row for row in (*self.rows, *means) if row.role == role]


def compare(models: Mapping[str, Sequence[Result]], baseline: str | None = None) -> Comparison:
    """Put the results of ``models`` side by side, each compared with ``baseline`` (the first).

    Raises ValueError unless all models answered the same samples of a benchmark with the same
    settings: otherwise their difference means nothing.
    """
    if not models:
        raise ValueError("no model to compare")
    baseline = next(iter(models)) if baseline is None else baseline
    if baseline not in models:
        raise ValueError(f"baseline {baseline!r} is none of the models: {', '.join(models)}")
    sets: dict[str, dict[str, Result]] = {}  # benchmark -> model -> result
    for model, results in models.items():
        for result in (view for each in results for view in each.by_metric()):
            by_model = sets.setdefault(result.benchmark, {})
            _check_pair(next(iter(by_model.values()), result), result)
            by_model[model] = result
    rows, means = [], []
    for role, title in ROLES.items():
        members = [each for each in sets.values() if next(iter(each.values())).role == role]
        rows += [_row(each, baseline) for each in members]
        shared = [
            each
            for each in members
            if all(model in each and each[model].value is not None for model in models)
            and not next(iter(each.values())).is_further
        ]
        if shared and role != "objects":  # yes and no, and captions, have no common mean
            means.append(_mean_row(shared, role, title, baseline))
    return Comparison(tuple(models), baseline, tuple(rows), tuple(means))


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
    blind = first.blind or second.blind
    if blind and first.groups != second.groups and not (first.groups and second.groups):
        raise ValueError(
            f"{first.benchmark}: the blind control was evaluated by an earlier version, which did "
            "not store which image each question is about; evaluate it again into a new folder"
        )
    if _samples(first, not blind) != _samples(second, not blind):
        raise ValueError(
            f"{first.benchmark}: the models did not answer the same samples ({first.n} and "
            f"{second.n}); evaluate both with the same data and limit"
        )


def _samples(result: Result, seeing: bool) -> list[list[Any]]:
    """What was asked, without the images for a blind control, which saw other ones."""
    names = ("id", "prompt", "answers", "candidates", *(["images"] if seeing else []))
    rows = [[prediction.get(name) for name in names] for prediction in result.predictions]
    return [*rows, result.groups]


def _row(results: Mapping[str, Result], baseline: str) -> Row:
    first = next(iter(results.values()))
    cells, differences = _compared(
        {model: _Scored(r.value, r.interval, r.resampled, r.n) for model, r in results.items()},
        baseline,
        first.too_few,
    )
    return Row(
        name=first.benchmark,
        title=first.title,
        role=first.role,
        metric=first.metric,
        unseen_type=first.unseen_type,
        how=first.how,
        cells=cells,
        differences=differences,
        constant=first.constant,
        wordings={m: s for m, r in results.items() if (s := spread_of(r.wordings))},
        too_few=first.too_few,
    )


def _mean_row(sets: Sequence[Mapping[str, Result]], role: str, title: str, baseline: str) -> Row:
    """The mean over sets for which all models have a score; each is resampled within itself. That
    of one set has the title of the set."""
    n, (first, *_) = len(sets), sets[0].values()
    scores = {}
    for model in sets[0]:
        results = [each[model] for each in sets]
        mean = sum(result.value or 0.0 for result in results) / n
        values = np.mean([result.resampled for result in results], axis=0)
        bounds = results[0].interval if n == 1 else interval(values)
        scores[model] = _Scored(mean, bounds, values, n)
    too_few = n == 1 and first.too_few
    cells, differences = _compared(scores, baseline, too_few)
    return Row(
        name=f"mean_{role}",
        title=f"mean of {n} sets ({title})" if n > 1 else first.title,
        role=role,
        metric="mean",
        unseen_type=False,
        how=None,
        cells=cells,
        differences=differences,
    )


class _Scored(NamedTuple):
    """A score with its interval and its resamples; ``n`` samples, or sets of a mean."""

    value: float | None
    bounds: Interval | None
    resampled: Floats
    n: int


def _compared(
    scores: Mapping[str, _Scored], baseline: str, too_few: bool
) -> tuple[dict[str, Cell], dict[str, Difference]]:
    """Cells and differences by model."""
    cells, differences = {}, {}
    base = scores.get(baseline)
    for model, score in scores.items():
        low, high = score.bounds or (None, None)
        cells[model] = Cell(score.value, low, high, score.n)
        if too_few or score.value is None:
            continue
        if model != baseline and base is not None and base.value is not None:
            differences[model] = difference(
                score.value - base.value, score.resampled, base.resampled
            )
    return cells, differences


def summarise(results: Sequence[Result]) -> dict[str, Cell]:
    """Return the mean of each role: held_in, held_out, finetuned; without those that have none.

    The interval comes from resampling the samples within each set; the choice of the sets is taken
    as given. Raises ValueError for a set whose score is not defined.
    """
    undefined = [f"{r.benchmark} ({r.undefined})" for r in results if r.value is None]
    if undefined:
        raise ValueError(
            f"no mean: the score of {', '.join(undefined)} is not defined; evaluate more samples"
        )
    means = compare({"model": results}).means if results else ()
    return {row.role: row.cells["model"] for row in means}
