"""Intervals and paired tests."""

import numpy as np
import pytest

from instructblip.evaluation.bootstrap import (
    difference,
    interval,
    resample,
)
from instructblip.evaluation.metrics import auroc


def test_interval_of_a_mean_is_the_normal_one() -> None:
    samples = np.random.default_rng(0).random(400)
    result = interval(resample(samples))
    half = 196 * samples.std() / 20
    assert result.low == pytest.approx(100 * samples.mean() - half, abs=0.4)
    assert result.high == pytest.approx(100 * samples.mean() + half, abs=0.4)


def test_resamples_depend_on_the_seed_alone() -> None:
    samples = np.arange(50.0) / 50
    assert np.array_equal(resample(samples, seed=3), resample(samples, seed=3))
    assert not np.array_equal(resample(samples, seed=3), resample(samples, seed=4))


def test_resampled_auroc_is_the_auroc_of_the_resample() -> None:
    rng = np.random.default_rng(0)
    labels, scores = rng.integers(0, 2, 40), rng.integers(0, 6, 40).astype(float)
    values = resample(scores, labels, seed=1, resamples=5)
    draws = np.random.default_rng([1, 40]).integers(0, 40, size=(5, 40))
    expected = [auroc(labels[row].tolist(), scores[row].tolist()) for row in draws]
    assert values == pytest.approx([100 * (area or 0) for area in expected])


def test_auroc_of_one_class_is_nan_and_skipped() -> None:
    values = resample(np.array([0.1, 0.9]), np.array([0, 1]), resamples=200)
    assert np.isnan(values).any()
    assert interval(values).high == 100
    assert np.isnan(interval(np.array([np.nan])).low)


def test_difference_is_paired() -> None:
    rng = np.random.default_rng(0)
    hard = rng.random(300)  # most of the spread is shared by both models
    a, b = resample(hard + 0.05), resample(hard)
    result = difference(5.0, a, b)
    assert result.low == pytest.approx(5)
    assert result.high == pytest.approx(5)
    assert result.p < 0.01
    assert difference(0.0, b, b).p == 1.0


def test_nothing_to_resample_is_an_error() -> None:
    with pytest.raises(ValueError, match="empty"):
        resample(np.array([]))
