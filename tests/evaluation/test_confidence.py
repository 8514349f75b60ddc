"""The mathematics of confidence, compared with independent libraries and with definitions."""

import math

import crepes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.calibration import calibration_curve
from sklearn.isotonic import IsotonicRegression
from sklearn.linear_model import LogisticRegression

from instructblip.evaluation.bootstrap import resample
from instructblip.evaluation.confidence import (
    abstention_threshold,
    aurc,
    conformal_quantile,
    ece,
    ece_of,
    fit_isotonic,
    fit_temperature,
    in_set,
    log_scaled,
    reliability,
    selective_accuracies,
    selective_accuracy,
)

Answers = tuple[np.ndarray, np.ndarray]


def answers(n: int = 400, seed: int = 0, digits: int = 6) -> Answers:
    """Confidences that are too high, and marks; few digits make ties."""
    rng = np.random.default_rng(seed)
    confidences = rng.uniform(size=n).round(digits)
    return confidences, (rng.uniform(size=n) < confidences**2).astype(float)


@pytest.mark.parametrize("bins", [5, 15])
def test_bins_are_those_of_scikit_learn(bins: int) -> None:
    confidences, right = answers(digits=2)  # many confidences on the edges of bins
    accuracy, mean = calibration_curve(right, confidences, n_bins=bins)
    found = reliability(confidences, right, bins)
    assert [b.accuracy for b in found] == pytest.approx(accuracy)
    assert [b.confidence for b in found] == pytest.approx(mean)
    counts = np.array([b.n for b in found])
    assert counts.sum() == len(right)
    expected = (counts * np.abs(accuracy - mean)).sum() / len(right)
    assert ece(confidences, right, bins) == pytest.approx(expected)


def test_resampled_errors_are_those_of_the_drawn_answers() -> None:
    confidences, right = answers(50)
    drawn = np.random.default_rng(1).integers(0, 50, 50)
    weights = np.bincount(drawn, minlength=50)[None].astype(float)
    error = ece_of(confidences, right)(weights)[0]
    assert error == pytest.approx(ece(confidences[drawn], right[drawn]))
    assert resample(ece_of(confidences, right), 50).shape == (1000,)


def test_the_temperature_is_that_of_a_logistic_regression() -> None:
    """Of two candidates it is the inverse of a logistic regression's coefficient, without bias."""
    rng = np.random.default_rng(0)
    margins = rng.normal(scale=6, size=2000)
    right = (rng.uniform(size=2000) < 1 / (1 + np.exp(-margins / 3))).astype(int)
    rows = [[0.0, margin] for margin in margins]
    model = LogisticRegression(C=np.inf, fit_intercept=False, tol=1e-10)
    coefficient = model.fit(margins[:, None], right).coef_.item()
    marks = (right == (margins > 0)).astype(float)
    assert fit_temperature(rows, marks) == pytest.approx(1 / coefficient, rel=1e-3)
    halves = np.exp(log_scaled([1.0, 1.0 + math.log(9)], 2.0))
    assert halves == pytest.approx([0.25, 0.75])


def test_answers_of_no_probability_do_not_rule_the_temperature() -> None:
    rng = np.random.default_rng(0)
    logits = rng.normal(scale=4, size=(1000, 5))
    chances = np.exp(logits / 2) / np.exp(logits / 2).sum(axis=1, keepdims=True)
    right = [rng.choice(5, p=row) for row in chances]
    marks = (logits.argmax(axis=1) == right).astype(float)
    assert fit_temperature(logits.tolist(), marks) == pytest.approx(2, rel=0.15)
    far = [[*row, -500.0] if i % 10 == 0 else list(row) for i, row in enumerate(logits)]
    never = np.where(np.arange(1000) % 10 == 0, 0.0, marks)  # the sixth is right, never generated
    assert 1.5 < fit_temperature(far, never) < 4


def test_the_isotonic_map_is_that_of_scikit_learn() -> None:
    scores, right = answers(digits=2)
    x, y = fit_isotonic(scores, right)
    wanted = np.linspace(-1, 2, 301)
    expected = IsotonicRegression(out_of_bounds="clip").fit(scores, right).predict(wanted)
    assert np.interp(wanted, x, y) == pytest.approx(expected)


@pytest.mark.parametrize("coverage", [0.5, 0.8, 0.9, 0.95])
def test_conformal_sets_are_those_of_crepes(coverage: float) -> None:
    rng = np.random.default_rng(3)
    probabilities = rng.dirichlet([0.5] * 4, size=159)
    misfits = -np.log(probabilities)
    theirs = crepes.ConformalClassifier().fit(misfits[:100, 0])
    sets = theirs.predict_set(misfits[100:], confidence=coverage, smoothing=False)
    quantile = conformal_quantile(misfits[:100, 0], coverage)
    for row, expected in zip(misfits[100:], sets, strict=True):
        assert sorted(in_set(-row, quantile)) == np.flatnonzero(expected).tolist()


def test_conformal_sets_cover_what_they_promise() -> None:
    """The mean over many splits is at least the coverage, and above it by 1 / (n + 1) at most."""
    rng = np.random.default_rng(0)
    misfits = rng.beta(0.3, 0.6, size=(4000, 60))  # of 59 samples and the one that is asked
    covered = [m[-1] <= conformal_quantile(m[:-1], 0.9) for m in misfits]
    assert 0.9 - 0.015 < np.mean(covered) < 0.9 + 1 / 60 + 0.015
    assert conformal_quantile(misfits[0, :5], 0.9) == math.inf
    for wrong in (0.0, 1.0, 90.0, math.nan):
        with pytest.raises(ValueError, match="coverage must be between 0 and 1"):
            conformal_quantile(misfits[0], wrong)


def test_risk_and_coverage_by_definition() -> None:
    confidences, right = answers(60)
    order = np.argsort(-confidences)
    expected = [right[order[:k]].mean() for k in range(1, 61)]
    assert selective_accuracies(confidences, right) == pytest.approx(expected)
    assert aurc(confidences, right) == pytest.approx(1 - np.mean(expected))
    assert selective_accuracy(confidences, right, 0.7) == pytest.approx(expected[41])
    assert selective_accuracy(confidences, right, 1.0) == pytest.approx(right.mean())


@settings(deadline=None, max_examples=30)
@given(st.lists(st.tuples(st.integers(0, 3), st.booleans()), min_size=1, max_size=40))
def test_ties_have_the_mean_of_all_orders(pairs: list[tuple[int, bool]]) -> None:
    confidences = np.array([c / 3 for c, _ in pairs])
    right = np.array([float(r) for _, r in pairs])
    rng, sums = np.random.default_rng(0), np.zeros(len(pairs))
    for _ in range(300):
        shuffled = rng.permutation(len(pairs))
        order = shuffled[np.argsort(-confidences[shuffled], kind="stable")]
        sums += np.cumsum(right[order]) / np.arange(1, len(pairs) + 1)
    assert selective_accuracies(confidences, right) == pytest.approx(sums / 300, abs=0.15)


def test_answers_from_the_threshold_on_are_right_often_enough() -> None:
    confidences, right = answers(digits=2)
    threshold = abstention_threshold(confidences, right, 0.8)
    assert threshold is not None
    assert right[confidences >= threshold].mean() >= 0.8
    lower = np.unique(confidences[confidences < threshold])
    assert all(right[confidences >= value].mean() < 0.8 for value in lower)
    assert abstention_threshold(confidences, np.zeros(len(right))) is None
