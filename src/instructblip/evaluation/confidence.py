"""The mathematics of confidence: how far it may be trusted, and maps that make it so.

Of n answers with a confidence c and a mark r (1 right, 0 wrong):

- the expected calibration error is the mean over bins of |mean r - mean c|, weighted by their size;
- temperature scaling divides the log-likelihoods of candidates by one number before the softmax;
- isotonic regression maps a score to the share of right answers among such scores, never falling;
- a conformal set holds the candidates whose misfit, -log p, is at most q. The misfits of the right
  candidates of n other samples give q: the k-th smallest, k = ceil((n + 1) coverage). A set then
  has the right candidate with at least that probability, whatever the model does, on average over
  samples that are drawn as those n (Vovk et al., 2005);
- risk and coverage: how many answers are wrong if only the most confident are given.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float64, Real
from numpy import ndarray

from instructblip.evaluation.bootstrap import Floats, Statistic

BINS = 15
"""Bins of equal width, as in Guo et al. (2017)."""
HOTTEST = 100.0
"""The temperatures that are tried are between this and its inverse."""


class Bin(NamedTuple):
    """The answers whose confidence is in one bin."""

    confidence: float
    accuracy: float
    n: int


def _bin_of(confidences: Real[ndarray, " n"], bins: int) -> ndarray:
    """The bin of each confidence; an edge belongs to the bin below it."""
    return np.clip(np.ceil(np.asarray(confidences) * bins).astype(int) - 1, 0, bins - 1)


def reliability(
    confidences: Real[ndarray, " n"], right: Real[ndarray, " n"], bins: int = BINS
) -> list[Bin]:
    """Mean confidence and share of right answers of each bin that has any."""
    place = _bin_of(confidences, bins)
    return [
        Bin(float(confidences[at].mean()), float(right[at].mean()), int(at.sum()))
        for at in (place == i for i in range(bins))
        if at.any()
    ]


def ece_of(
    confidences: Real[ndarray, " n"], right: Real[ndarray, " n"], bins: int = BINS
) -> Statistic:
    """The expected calibration error, 0 to 1, of resamples of the answers."""
    gaps = np.zeros((len(right), bins))
    gaps[np.arange(len(right)), _bin_of(confidences, bins)] = confidences - right
    return lambda weights: np.abs(weights @ gaps).sum(axis=1) / weights.sum(axis=1)


def ece(confidences: Real[ndarray, " n"], right: Real[ndarray, " n"], bins: int = BINS) -> float:
    """The expected calibration error, 0 to 1."""
    return float(ece_of(confidences, right, bins)(np.ones((1, len(right))))[0])


def log_scaled(log_likelihoods: Sequence[float], temperature: float) -> Floats:
    """The log-probabilities of the candidates of one sample at a temperature."""
    values = np.asarray(log_likelihoods, dtype=np.float64) / temperature
    values = values - values.max()
    return values - np.log(np.exp(values).sum())


def fit_temperature(
    log_likelihoods: Sequence[Sequence[float]], right: Real[ndarray, " n"]
) -> float:
    """The temperature under which the probability of the likeliest candidate predicts best whether
    it is right, by the log loss.

    The log loss of the right candidate itself, as in Guo et al., is ruled by the answers that the
    model cannot say at all: a few of them make every other probability wrong. For two candidates
    both are the same.
    """
    from scipy.optimize import minimize_scalar

    rows = np.full((len(right), max(map(len, log_likelihoods))), -np.inf)  # [n, most candidates]
    for row, values in zip(rows, log_likelihoods, strict=True):
        row[: len(values)] = np.sort(values)[::-1] - max(values)  # the likeliest first

    def loss(log_temperature: float) -> float:
        weights = np.exp(rows * math.exp(-log_temperature))
        others = weights[:, 1:].sum(axis=1)
        wrong = np.log(np.maximum(others, np.finfo(float).tiny))
        return float((np.log(1 + others) - (1 - right) * wrong).sum())

    far = math.log(HOTTEST)
    return math.exp(minimize_scalar(loss, bounds=(-far, far), method="bounded").x)


def fit_isotonic(
    scores: Real[ndarray, " n"], right: Real[ndarray, " n"]
) -> tuple[list[float], list[float]]:
    """Knots (score, probability) of the map that never falls; ``np.interp`` applies it."""
    from sklearn.isotonic import IsotonicRegression

    fitted = IsotonicRegression(y_min=0, y_max=1, out_of_bounds="clip").fit(scores, right)
    return fitted.X_thresholds_.tolist(), fitted.y_thresholds_.tolist()


def conformal_quantile(misfits: Real[ndarray, " n"], coverage: float) -> float:
    """The largest misfit that a candidate of a set may have; infinity where ``misfits`` are too few
    for the coverage: then every candidate is in the set.

    Raises ValueError for a coverage that is not between 0 and 1.
    """
    if not 0 < coverage < 1:
        raise ValueError(f"coverage must be between 0 and 1, such as 0.9; got {coverage:g}")
    n = len(misfits)
    k = math.ceil((n + 1) * coverage - 1e-9)
    return math.inf if k > n else float(np.sort(misfits)[k - 1])


def in_set(log_probabilities: Real[ndarray, " c"], quantile: float) -> list[int]:
    """The candidates whose misfit is at most ``quantile``, the likeliest first: perhaps none."""
    order = np.argsort(-log_probabilities, kind="stable").tolist()
    return [i for i in order if -log_probabilities[i] <= quantile]


def selective_accuracies(
    confidences: Real[ndarray, " n"], right: Real[ndarray, " n"]
) -> Float64[ndarray, " n"]:
    """The share of right answers among the 1, 2, ... n most confident. Among equal confidences it
    is that of a random order."""
    order = np.argsort(-np.asarray(confidences), kind="stable")
    ranked, marks = np.asarray(confidences)[order], np.asarray(right, dtype=np.float64)[order]
    starts = np.flatnonzero(np.r_[True, np.diff(ranked) != 0])
    sizes = np.diff(np.r_[starts, len(marks)])
    even = np.repeat(np.add.reduceat(marks, starts) / sizes, sizes)
    return np.cumsum(even) / np.arange(1, len(marks) + 1)


def selective_accuracy(
    confidences: Real[ndarray, " n"], right: Real[ndarray, " n"], coverage: float = 0.7
) -> float:
    """The share of right answers among the most confident ``coverage`` of them."""
    return float(selective_accuracies(confidences, right)[math.ceil(coverage * len(right)) - 1])


def aurc(confidences: Real[ndarray, " n"], right: Real[ndarray, " n"]) -> float:
    """The area under the risk-coverage curve, 0 to 1: the mean share of wrong answers among the 1,
    2, ... n most confident."""
    return float(1 - selective_accuracies(confidences, right).mean())


def abstention_threshold(
    confidences: Real[ndarray, " n"], right: Real[ndarray, " n"], accuracy: float = 0.9
) -> float | None:
    """The least confidence from which on at least ``accuracy`` of the answers are right; None where
    not even the most confident are."""
    order = np.argsort(-np.asarray(confidences), kind="stable")
    ranked = np.asarray(confidences)[order]
    enough = np.cumsum(np.asarray(right)[order]) / np.arange(1, len(ranked) + 1) >= accuracy
    enough &= np.r_[np.diff(ranked) != 0, True]  # equal confidences are given together
    return float(ranked[enough].min()) if enough.any() else None
