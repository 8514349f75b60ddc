"""Bootstrap intervals and paired tests, seeded and vectorised.

A resample draws n of n samples with replacement. The draws depend on seed and n alone, so two
models that answered the same samples are resampled with the SAME draws and their difference is
paired. The functions take the ``samples`` [n] of a ``Score`` and, for the area under the ROC curve,
its ``labels`` [n], for a mean over classes its ``classes`` [n, k].
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from jaxtyping import Float64, Int64, Real
from numpy import ndarray

Floats = Float64[ndarray, " _"]

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
    samples: Real[ndarray, " n"],
    labels: Real[ndarray, " n"] | None = None,
    seed: int = 0,
    resamples: int = RESAMPLES,
    classes: Int64[ndarray, "n k"] | None = None,
) -> Float64[ndarray, " resamples"]:
    """Return values from 0 to 100: means of ``samples``, AUROCs if ``labels`` are given, or
    `class_means` if ``classes`` are.

    A resample that contains one class only has no AUROC: its value is nan.
    """
    values = np.asarray(samples, dtype=np.float64)
    if classes is not None:
        draws = _draws(len(values), seed, resamples)
        blocks = [class_means(values[each], classes[each]) for each in draws]
    elif labels is None:
        blocks = [values[draws].mean(axis=1) for draws in _draws(len(values), seed, resamples)]
    else:
        truth = np.asarray(labels, dtype=np.float64)
        order = np.argsort(values, kind="stable")
        starts = np.flatnonzero(np.r_[True, np.diff(values[order]) != 0])
        blocks = [
            _weighted_auroc(_counts(draws)[:, order], truth[order], starts)
            for draws in _draws(len(values), seed, resamples)
        ]
    return 100 * np.concatenate(blocks)


def class_means(
    hits: Real[ndarray, "block n"], classes: Int64[ndarray, "block n k"]
) -> Float64[ndarray, " block"]:
    """Return, for each row, the mean over the classes of k times their hits over how often they
    occur in the k columns. The first column has the class of each sample. Classes that occur in
    other columns only, or in other rows only, do not count.

    With the right class alone that is the mean recall; with the predicted one beside it the mean
    F1, as 2 * hits / (right + predicted).
    """
    rows, _, k = classes.shape
    size = int(classes.max()) + 1
    places = classes + np.arange(rows)[:, None, None] * size

    def count(column: Int64[ndarray, "block n"], weights: ndarray | None = None) -> ndarray:
        return np.bincount(column.ravel(), weights, rows * size).reshape(rows, size)

    right = count(places[:, :, 0])
    found = count(places[:, :, 0], np.asarray(hits, dtype=np.float64).ravel())
    total = sum((count(places[:, :, i]) for i in range(1, k)), right)
    shares = np.divide(k * found, total, out=np.zeros((rows, size)), where=right > 0)
    return shares.sum(axis=1) / (right > 0).sum(axis=1)


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


def _draws(n: int, seed: int, resamples: int) -> Iterator[Int64[ndarray, "block n"]]:
    """Yield indices, always the same for the same n and seed."""
    if n == 0:
        raise ValueError("cannot resample an empty set")
    rng = np.random.default_rng([seed, n])
    rows = max(1, _BLOCK // n)
    for start in range(0, resamples, rows):
        yield rng.integers(0, n, size=(min(rows, resamples - start), n))


def _counts(draws: Int64[ndarray, "block n"]) -> Float64[ndarray, "block n"]:
    """Count how often each of n samples was drawn, with one bincount for the whole block."""
    rows, n = draws.shape
    flat = (draws + np.arange(rows)[:, None] * n).ravel()
    return np.bincount(flat, minlength=rows * n).reshape(rows, n).astype(np.float64)


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
