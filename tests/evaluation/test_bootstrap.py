"""Intervals and paired tests."""

import numpy as np
import pytest
from scipy import stats

from instructblip.evaluation.bootstrap import (
    auroc_of,
    class_mean_of,
    difference,
    exact_interval,
    interval,
    leave_out,
    mean_of,
    resample,
)
from instructblip.evaluation.metrics import auroc


def test_interval_of_a_mean_is_the_normal_one() -> None:
    samples = np.random.default_rng(0).random(400)
    result = interval(resample(mean_of(samples), 400))
    half = 196 * samples.std() / 20
    assert result.low == pytest.approx(100 * samples.mean() - half, abs=0.4)
    assert result.high == pytest.approx(100 * samples.mean() + half, abs=0.4)


def test_resamples_depend_on_the_seed_alone() -> None:
    samples = np.arange(50.0) / 50
    assert np.array_equal(
        resample(mean_of(samples), 50, seed=3), resample(mean_of(samples), 50, seed=3)
    )
    assert not np.array_equal(
        resample(mean_of(samples), 50, seed=3), resample(mean_of(samples), 50, seed=4)
    )


def test_resampled_auroc_is_the_auroc_of_the_resample() -> None:
    rng = np.random.default_rng(0)
    labels, scores = rng.integers(0, 2, 40), rng.integers(0, 6, 40).astype(float)
    values = resample(auroc_of(scores, labels), 40, seed=1, resamples=5)
    draws = np.random.default_rng([1, 40]).integers(0, 40, size=(5, 40))
    expected = [auroc(labels[row].tolist(), scores[row].tolist()) for row in draws]
    assert values == pytest.approx([100 * (area or 0) for area in expected])


def test_auroc_of_one_class_is_nan_and_skipped() -> None:
    values = resample(auroc_of(np.array([0.1, 0.9]), np.array([0, 1])), 2, resamples=200)
    assert np.isnan(values).any()
    assert interval(values).high == 100
    assert np.isnan(interval(np.array([np.nan])).low)


def test_difference_is_paired() -> None:
    rng = np.random.default_rng(0)
    hard = rng.random(300)  # most of the spread is shared by both models
    a, b = resample(mean_of(hard + 0.05), 300), resample(mean_of(hard), 300)
    result = difference(5.0, a, b)
    assert result.low == pytest.approx(5)
    assert result.high == pytest.approx(5)
    assert result.p < 0.01
    assert difference(0.0, b, b).p == 1.0


def test_nothing_to_resample_is_an_error() -> None:
    with pytest.raises(ValueError, match="empty"):
        resample(mean_of(np.array([])), 0)


def patients(count: int, each: int) -> tuple[list[str], np.ndarray]:
    """The patient of each sample, and scores that differ between patients far more than within."""
    rng = np.random.default_rng(0)
    scores = np.repeat(rng.random(count), each) + rng.normal(0, 0.01, count * each)
    return [f"p{i}" for i in range(count) for _ in range(each)], scores


def test_groups_are_drawn_with_all_their_samples() -> None:
    groups, scores = patients(100, 9)
    by_group = interval(resample(mean_of(scores), groups))
    # equal groups: the mean of samples is that of the patients' means, whose error is classical
    means = scores.reshape(100, 9).mean(axis=1)
    half = 196 * means.std() / 10
    assert by_group.low == pytest.approx(100 * means.mean() - half, abs=0.7)
    assert by_group.high == pytest.approx(100 * means.mean() + half, abs=0.7)
    by_sample = interval(resample(mean_of(scores), len(scores)))
    ratio = (by_group.high - by_group.low) / (by_sample.high - by_sample.low)
    assert ratio == pytest.approx(3, rel=0.1)


def test_every_score_is_that_of_the_drawn_groups() -> None:
    """Groups of different sizes, in any order, drawn one by one."""
    rng = np.random.default_rng(0)
    groups = [f"p{i}" for i in (2, 0, 2, 1, 3, 3, 3, 0, 4, 2)]
    names = list(dict.fromkeys(groups))
    scores, labels = rng.integers(0, 4, 10).astype(float), np.array([0, 1] * 5)
    hits, classes = rng.integers(0, 2, 10).astype(float), rng.integers(0, 3, (10, 1))

    def drawn(row: np.ndarray) -> list[int]:
        return [i for g in row for i, group in enumerate(groups) if group == names[g]]

    def recall(rows: list[int]) -> float:
        of_class = [[hits[i] for i in rows if classes[i] == c] for c in range(3)]
        return float(np.mean([np.mean(each) for each in of_class if each]))

    draws = np.random.default_rng([1, 5]).integers(0, 5, size=(50, 5))
    for statistic, expected in (
        (mean_of(scores), lambda rows: scores[rows].mean()),
        (
            auroc_of(scores, labels),
            lambda rows: auroc(labels[rows].tolist(), scores[rows].tolist()),
        ),
        (class_mean_of(hits, classes), recall),
    ):
        values = resample(statistic, groups, seed=1, resamples=50)
        of_rows = [expected(drawn(row)) for row in draws]
        wanted = [np.nan if value is None else 100 * value for value in of_rows]
        assert values == pytest.approx(wanted, nan_ok=True)


def test_few_groups_get_the_bca_interval_of_scipy() -> None:
    samples = np.random.default_rng(2).exponential(size=40) / 5  # a skewed score
    values = resample(mean_of(samples), 40, seed=1, resamples=20_000)
    left_out = leave_out(mean_of(samples), 40)
    result = interval(values, 100 * samples.mean(), left_out)
    oracle = stats.bootstrap(
        (100 * samples,), np.mean, n_resamples=20_000, method="BCa", random_state=1
    ).confidence_interval
    plain = interval(values)
    assert result == pytest.approx((oracle.low, oracle.high), abs=0.15)
    assert result.low > plain.low + 0.3  # what the percentiles miss is more than the tolerance
    assert result.high > plain.high + 0.3


def test_an_interval_of_few_samples_covers_the_truth_more_often() -> None:
    """A share of 95 % in 20 samples, 400 times: 95 % of the intervals have to contain it."""
    rng = np.random.default_rng(0)
    covered = {"plain": 0, "ours": 0}
    for _ in range(400):
        samples = (rng.random(20) < 0.95).astype(float)
        values = resample(mean_of(samples), 20, resamples=400)
        value = 100 * samples.mean()
        if value == 100:
            ours = exact_interval(value, 20)
        else:
            ours = interval(values, value, leave_out(mean_of(samples), 20))
        plain = interval(values)
        covered["plain"] += plain.low <= 95 <= plain.high
        covered["ours"] += ours.low <= 95 <= ours.high
    assert covered["plain"] < 0.7 * 400
    assert covered["ours"] > 0.92 * 400


def test_exact_interval_is_that_of_the_binomial_distribution() -> None:
    for value, count in ((0.0, 12), (100.0, 12)):
        hits = int(count * value / 100)
        oracle = stats.binomtest(hits, count).proportion_ci(0.95, method="exact")
        expected = (100 * oracle.low, 100 * oracle.high)
        assert exact_interval(value, count) == pytest.approx(expected)


def test_many_groups_keep_the_percentiles() -> None:
    assert leave_out(mean_of(np.arange(300.0)), 300) is None
    assert leave_out(mean_of(np.arange(2.0)), 2) is None


def test_detectable_difference_is_detected_in_four_of_five_evaluations() -> None:
    rng = np.random.default_rng(0)
    noise = rng.normal(0, 0.3, 400)
    first = difference(0.0, resample(mean_of(noise), 400), resample(mean_of(0 * noise), 400))
    detected = 0
    for _ in range(400):
        a = rng.normal(first.detectable / 100, 0.3, 400)
        values = resample(mean_of(a), 400, resamples=200)
        detected += difference(0.0, values, np.zeros(200)).low > 0
    assert detected / 400 == pytest.approx(0.8, abs=0.06)
    assert first.samples(first.detectable, 400) == 400
    assert first.samples(first.detectable / 2, 400) == 1600
