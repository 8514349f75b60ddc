"""Bootstrap intervals and paired tests, seeded and vectorised.

A resample draws n of n samples with replacement or, where samples belong to groups such as the
questions about one image, n of n groups with all their samples: those of a group are no independent
samples, and drawing them one by one gives intervals that are too narrow. The draws depend on the
seed and the groups alone, so two models that answered the same samples are resampled with the SAME
draws and their difference is paired. A score is a `Statistic` of how often each sample was drawn.

Below `SMALL` groups the percentiles of the resamples are too narrow and off centre; the intervals
are then BCa ("bias-corrected and accelerated", Efron 1987), which moves the two percentiles by the
bias of the resamples and by how unequally the groups weigh (from the scores without each group).
"""

import math
from collections.abc import Callable, Hashable, Iterator, Sequence
from statistics import NormalDist
from typing import NamedTuple

import numpy as np
from jaxtyping import Float64, Int64, Real
from numpy import ndarray

Floats = Float64[ndarray, " _"]
Statistic = Callable[[Float64[ndarray, "block n"]], Float64[ndarray, " block"]]
"""Scores, 0 to 1, of resamples; a row of the weights has how often each sample was drawn."""

RESAMPLES = 1000
SMALL = 200
"""Groups from which on intervals are plain percentiles."""
LEAST_GROUPS = 10
"""Groups below which resampling them shows no difference: intervals of n groups are too narrow by
sqrt((n - 1) / n) and by the normal in place of Student's quantile, 18 % at 10 and 47 % at 4
(Hesterberg 2015), and tests reject too often (Cameron, Gelbach and Miller 2008)."""
_TAIL = (1 - 0.95) / 2
"""Share of the resampled values on either side of an interval."""
_NORMAL = NormalDist()
_DETECTED = _NORMAL.inv_cdf(1 - _TAIL) + _NORMAL.inv_cdf(0.8)
_BLOCK = 1 << 22
"""Draws in memory at a time."""


class Interval(NamedTuple):
    """The central 95 % of the resampled values."""

    low: float
    high: float


class Difference(NamedTuple):
    """a minus b on the same samples, its interval, and the two-sided p of "no difference".

    ``error`` is its standard error, the spread of the resampled differences.
    """

    value: float
    low: float
    high: float
    p: float
    error: float = 0.0

    @property
    def detectable(self) -> float:
        """The smallest true difference that four of five such evaluations would detect at p < 0.05:
        2.8 standard errors (1.96 for the test and 0.84 for the power)."""
        return _DETECTED * self.error

    def samples(self, difference: float, n: int) -> int:
        """How many samples would detect a true ``difference`` in four of five evaluations, from the
        standard error with ``n``."""
        return math.ceil(n * (self.detectable / difference) ** 2)


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


def leave_out(statistic: Statistic, groups: Sequence[Hashable] | int) -> Floats | None:
    """Return ``statistic`` without each group, times 100, for BCa intervals; None from `SMALL`
    groups on, and for fewer than three."""
    ids = np.arange(groups) if isinstance(groups, int) else _numbered(groups)
    count = int(ids.max()) + 1
    if not 3 <= count < SMALL:
        return None
    return 100 * statistic((ids != np.arange(count)[:, None]).astype(np.float64))


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


def interval(
    values: Float64[ndarray, " r"], value: float = 0.0, left_out: Floats | None = None
) -> Interval:
    """Return the 95 % interval of resampled values; nan only if all of them are.

    It is the percentile interval, or BCa with ``left_out`` of `leave_out` and the score itself,
    ``value``.
    """
    values = values[~np.isnan(values)]
    if not len(values):
        return Interval(float("nan"), float("nan"))
    bias, acceleration = _corrections(values, value, left_out)
    shares = []
    for tail in (_TAIL, 1 - _TAIL):
        z = bias + _NORMAL.inv_cdf(tail)
        shares.append(_NORMAL.cdf(bias + z / (1 - acceleration * z)))
    low, high = np.quantile(values, shares)
    return Interval(float(low), float(high))


def exact_interval(value: float, groups: int) -> Interval:
    """Return the 95 % interval of a share that is 0 or 100 in all groups (Clopper and Pearson):
    resamples of equal values are all equal, and would give an interval without width."""
    miss = 100 * (1 - _TAIL ** (1 / groups))
    return Interval(0.0, miss) if value == 0 else Interval(100 - miss, 100.0)


def difference(value: float, a: Float64[ndarray, " r"], b: Float64[ndarray, " r"]) -> Difference:
    """Return ``value``, which is a - b, with its interval and p from values of the same draws.

    Both are percentiles with any number of groups: the corrections of BCa move the two apart, and a
    paired difference is nearly symmetric.
    """
    deltas = a - b
    deltas = deltas[~np.isnan(deltas)]
    # Adding one keeps p above 0: a finite number of resamples cannot show that p is 0.
    below = (np.sum(deltas <= 0) + 1) / (len(deltas) + 1)
    above = (np.sum(deltas >= 0) + 1) / (len(deltas) + 1)
    error = float(deltas.std()) if len(deltas) else float("nan")
    return Difference(value, *interval(deltas), float(min(1.0, 2 * min(below, above))), error)


def _corrections(values: Floats, value: float, left_out: Floats | None) -> tuple[float, float]:
    """The bias and the acceleration of BCa; zeros for a percentile interval."""
    if left_out is None or not np.ptp(values):
        return 0.0, 0.0
    ties = np.isclose(values, value, atol=1e-9)  # half of them count as below
    below = (np.sum((values < value) & ~ties) + ties.sum() / 2) / len(values)
    ends = 1 / (len(values) + 1)
    bias = _NORMAL.inv_cdf(min(max(below, ends), 1 - ends))
    apart = np.nanmean(left_out) - left_out[~np.isnan(left_out)]
    spread = np.sum(apart**2) ** 1.5
    return bias, float(np.sum(apart**3) / (6 * spread)) if spread else 0.0


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
