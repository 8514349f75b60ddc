"""Bootstrap intervals and paired tests, seeded and vectorised.

A resample draws n of n samples with replacement or, where samples belong to groups such as
patients, n of n groups with all their samples: those of a group are no independent samples, and
drawing them one by one gives intervals that are too narrow. The draws depend on the seed and the
groups alone, so two models that answered the same samples are resampled with the SAME draws and
their difference is paired. A score is a `Statistic` of how often each sample was drawn.
"""

from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float64, Int64, Real
from numpy import ndarray

Floats = Float64[ndarray, " _"]
Statistic = Callable[[Float64[ndarray, "block n"]], Float64[ndarray, " block"]]
"""Scores, 0 to 1, of resamples; a row of the weights has how often each sample was drawn."""

RESAMPLES = 1000
_TAIL = 50 * (1 - 0.95)
"""Percent of the resampled values on either side of an interval."""
_BLOCK = 1 << 22
"""Draws in memory at a time."""


class Interval(NamedTuple):
    """The central 95 % of the resampled values."""

    low: float
    high: float


class Difference(NamedTuple):
    """a minus b on the same samples, its interval, and the two-sided p of "no difference"."""

    value: float
    low: float
    high: float
    p: float


def resample(
    statistic: Statistic,
    groups: Sequence[Hashable] | int,
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> Float64[ndarray, " resamples"]:
    """Return ``statistic`` of each resample, times 100.

    ``groups`` is the number of samples, or the group of each. A resample for which the score is
    not defined, as an AUROC of one class, has the value nan.
    """
    ids = np.arange(groups) if isinstance(groups, int) else _numbered(groups)
    return 100 * np.concatenate([statistic(w) for w in _weights(ids, seed, resamples)])


def mean_of(samples: Real[ndarray, " n"]) -> Statistic:
    """The mean of the samples."""
    values = np.asarray(samples, dtype=np.float64)
    return lambda weights: weights @ values / weights.sum(axis=1)


def auroc_of(scores: Real[ndarray, " n"], labels: Real[ndarray, " n"]) -> Statistic:
    """The area under the ROC curve of scores of samples labelled 0 or 1."""
    order = np.argsort(scores, kind="stable")
    starts = np.flatnonzero(np.r_[True, np.diff(scores[order]) != 0])
    truth = np.asarray(labels[order], dtype=np.float64)
    return lambda weights: _weighted_auroc(weights[:, order], truth, starts)


def class_mean_of(hits: Real[ndarray, " n"], classes: Int64[ndarray, "n k"]) -> Statistic:
    """The mean over the classes of k times their hits over how often they occur in the k columns.
    The first column has the class of each sample. Classes that occur in other columns only, or in
    no sample that was drawn, do not count.

    With the right class alone that is the mean recall; with the predicted one beside it the mean
    F1, as 2 * hits / (right + predicted).
    """
    k, size = classes.shape[1], int(classes.max()) + 1

    def statistic(weights: Float64[ndarray, "block n"]) -> Float64[ndarray, " block"]:
        rows = len(weights)
        first = np.arange(rows)[:, None] * size

        def count(column: int, weights: ndarray) -> ndarray:
            places = (first + classes[:, column]).ravel()
            return np.bincount(places, weights.ravel(), rows * size).reshape(rows, size)

        right, found = count(0, weights), count(0, weights * hits)
        total = sum((count(i, weights) for i in range(1, k)), right)
        shares = np.divide(k * found, total, out=np.zeros((rows, size)), where=right > 0)
        return shares.sum(axis=1) / (right > 0).sum(axis=1)

    return statistic


def interval(values: Float64[ndarray, " r"]) -> Interval:
    """Return the 95 % percentile interval of resampled values; nan only if all of them are."""
    if np.isnan(values).all():
        return Interval(float("nan"), float("nan"))
    low, high = np.nanpercentile(values, [_TAIL, 100 - _TAIL])
    return Interval(float(low), float(high))


def difference(value: float, a: Float64[ndarray, " r"], b: Float64[ndarray, " r"]) -> Difference:
    """Return ``value``, which is a - b, with its interval and p from values of the same draws."""
    deltas = a - b
    deltas = deltas[~np.isnan(deltas)]
    # Adding one keeps p above 0: a finite number of resamples cannot show that p is 0.
    below = (np.sum(deltas <= 0) + 1) / (len(deltas) + 1)
    above = (np.sum(deltas >= 0) + 1) / (len(deltas) + 1)
    return Difference(value, *interval(deltas), float(min(1.0, 2 * min(below, above))))


def _numbered(groups: Sequence[Hashable]) -> Int64[ndarray, " n"]:
    """The groups as numbers from 0, in the order of their first samples."""
    numbers: dict[Hashable, int] = {}
    return np.array([numbers.setdefault(group, len(numbers)) for group in groups], np.int64)


def _weights(
    ids: Int64[ndarray, " n"], seed: int, resamples: int
) -> Iterator[Float64[ndarray, "block n"]]:
    """Yield how often each sample is drawn, always the same for the same groups and seed."""
    if not len(ids):
        raise ValueError("cannot resample an empty set")
    count = int(ids.max()) + 1
    rng = np.random.default_rng([seed, count])
    rows = max(1, _BLOCK // len(ids))
    for start in range(0, resamples, rows):
        draws = rng.integers(0, count, size=(min(rows, resamples - start), count))
        flat = (draws + np.arange(len(draws))[:, None] * count).ravel()
        drawn = np.bincount(flat, minlength=len(draws) * count).reshape(len(draws), count)
        yield drawn[:, ids].astype(np.float64)


def _weighted_auroc(
    weights: Float64[ndarray, "block n"],
    labels: Float64[ndarray, " n"],
    starts: Int64[ndarray, " groups"],
) -> Float64[ndarray, " block"]:
    """AUROCs of samples sorted by score; ``starts`` mark groups of equal score.

    The AUROC is the share of (positive, negative) pairs that the score orders rightly: a positive
    wins against every negative in a lower group, and half against one in its own.
    """
    positive = np.add.reduceat(weights * labels, starts, axis=1)
    negative = np.add.reduceat(weights * (1 - labels), starts, axis=1)
    below = np.cumsum(negative, axis=1) - negative
    won = (positive * (below + negative / 2)).sum(axis=1)
    pairs = positive.sum(axis=1) * negative.sum(axis=1)
    return np.divide(won, pairs, out=np.full(len(won), np.nan), where=pairs > 0)
