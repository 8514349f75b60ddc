"""Bootstrap intervals and paired tests, seeded and vectorised.

A resample draws n of n samples with replacement. Two models that answered the same samples are
resampled with the SAME draws (the draws depend on seed and n alone), so that a difference compares
like with like. Every function works with a ``Score``'s raw material: ``samples`` [n] and, for the
area under the ROC curve, ``labels`` [n].
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

RESAMPLES = 1000
LEVEL = 0.95
_BLOCK = 1 << 22
"""Draws held in memory at a time."""


@dataclass(frozen=True, slots=True)
class Interval:
    """The central 95 % of the resampled values."""

    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Difference:
    """a minus b on the same samples, its interval, and the two-sided p of "no difference"."""

    value: float
    low: float
    high: float
    p: float


def resample(
    samples: Floats, labels: Floats | None = None, seed: int = 0, resamples: int = RESAMPLES
) -> Floats:
    """Values [resamples], 0 to 100: means of ``samples``, or AUROCs if ``labels`` are given.

    A resample that happens to hold one class only has no AUROC and gives nan.
    """
    values = np.asarray(samples, dtype=np.float64)
    if labels is None:
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


def interval(values: Floats, level: float = LEVEL) -> Interval:
    """Percentile interval of resampled values; nan only if all of them are."""
    tail = 50 * (1 - level)
    if np.isnan(values).all():
        return Interval(float("nan"), float("nan"))
    low, high = np.nanpercentile(values, [tail, 100 - tail])
    return Interval(float(low), float(high))


def difference(value: float, a: Floats, b: Floats, level: float = LEVEL) -> Difference:
    """``value`` = a - b with interval and p from values resampled with the same draws."""
    deltas = a - b
    deltas = deltas[~np.isnan(deltas)]
    bounds = interval(deltas, level)
    # One is added so that no finite number of resamples claims p = 0.
    below = (np.sum(deltas <= 0) + 1) / (len(deltas) + 1)
    above = (np.sum(deltas >= 0) + 1) / (len(deltas) + 1)
    return Difference(value, bounds.low, bounds.high, float(min(1.0, 2 * min(below, above))))


def mean_over_sets(resampled: Sequence[Floats]) -> Floats:
    """Resampled values of a mean over data sets: sample by sample within each set."""
    return np.mean(np.stack(list(resampled)), axis=0)


def _draws(n: int, seed: int, resamples: int) -> Iterator[NDArray[np.int64]]:
    """Indices [block, n]; always the same for the same n and seed."""
    if n == 0:
        raise ValueError("cannot resample an empty set")
    rng = np.random.default_rng([seed, n])
    rows = max(1, _BLOCK // n)
    for start in range(0, resamples, rows):
        yield rng.integers(0, n, size=(min(rows, resamples - start), n))


def _counts(draws: NDArray[np.int64]) -> Floats:
    """How often each of n samples was drawn, [block, n]."""
    rows, n = draws.shape
    flat = (draws + np.arange(rows)[:, None] * n).ravel()
    return np.bincount(flat, minlength=rows * n).reshape(rows, n).astype(np.float64)


def _weighted_auroc(weights: Floats, labels: Floats, starts: NDArray[np.int64]) -> Floats:
    """AUROC [block] of samples sorted by score; ``starts`` mark groups of equal score."""
    positive = np.add.reduceat(weights * labels, starts, axis=1)
    negative = np.add.reduceat(weights * (1 - labels), starts, axis=1)
    below = np.cumsum(negative, axis=1) - negative
    won = (positive * (below + negative / 2)).sum(axis=1)
    pairs = positive.sum(axis=1) * negative.sum(axis=1)
    return np.divide(won, pairs, out=np.full(len(won), np.nan), where=pairs > 0)
