"""Differences between conditions over all seeds, their intervals and the verdict on a claim.

A difference varies with the seed of training and with the samples of the evaluation. Its variance
is the sum of two: that of the mean over the seeds, and that of a paired bootstrap over the samples
for the difference averaged over the seeds. The interval is Student's, 95 %, with Welch and
Satterthwaite's degrees of freedom.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

import numpy as np
from scipy import stats

from instructblip.evaluation.bootstrap import RESAMPLES, Floats
from instructblip.evaluation.result import RESULT, Result
from runs.claims.measure import DONE

Seeds = Mapping[int, Mapping[str, Result]]
"""Seed -> benchmark -> its result."""


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds and half the width of its interval, which is nan for a single seed."""

    mean: float
    half: float

    @property
    def low(self) -> float:
        return self.mean - self.half

    @property
    def high(self) -> float:
        return self.mean + self.half

    @property
    def verdict(self) -> str:
        """What the interval decides about a claimed gain."""
        if self.low > 0:
            return "holds"
        return "does not hold" if self.high < 0 else "undecided"


def estimate(values: Sequence[float], resampled: Floats | None = None) -> Estimate:
    """``values``: one per seed; ``resampled`` [resamples]: bootstrap values of their mean."""
    n = len(values)
    seed_variance = float(np.var(values, ddof=1)) / n if n > 1 else float("nan")
    sample_variance = 0.0 if resampled is None else float(np.var(resampled, ddof=1))
    variance = seed_variance + sample_variance
    if not variance:  # equal values for all seeds
        return Estimate(fmean(values), 0.0)
    freedom = variance**2 / (
        seed_variance**2 / max(1, n - 1) + sample_variance**2 / (RESAMPLES - 1)
    )
    return Estimate(fmean(values), float(stats.t.ppf(0.975, freedom)) * variance**0.5)


def read(work: Path) -> dict[str, dict[int, dict[str, Result]]]:
    """Condition -> seed -> benchmark -> result, of the finished runs."""
    conditions: dict[str, dict[int, dict[str, Result]]] = {}
    for done in sorted(work.glob(f"*/seed*/{DONE}")):
        folder = done.parent
        paths = sorted(folder.glob(f"results/*/{RESULT}"))
        results = {path.parent.name: Result.load(path.parent) for path in paths}
        seed = int(folder.name.removeprefix("seed"))
        conditions.setdefault(folder.parent.name, {})[seed] = results
    return conditions


def sets_of(measure: str, *conditions: Seeds) -> list[str]:
    """The benchmarks of a role, or the one of that name, for which every result has a score."""
    every = [results for seeds in conditions for results in seeds.values()]
    return [
        name
        for name, result in every[0].items()
        if measure in (name, result.role)
        and all(name in results and results[name].value is not None for results in every)
    ]


def figure(results: Mapping[str, Result], names: Sequence[str]) -> float:
    """The mean over some sets, 0 to 100, with equal weights."""
    return fmean(results[name].value or 0.0 for name in names)


def seeds_of(*conditions: Seeds) -> list[int]:
    """The seeds that all conditions have; the only seed of BLIP-2 is compared with every seed."""
    several = [set(seeds) for seeds in conditions if len(seeds) > 1] or [set(conditions[0])]
    return sorted(set.intersection(*several))


def level(seeds: Seeds, names: Sequence[str]) -> Estimate:
    """The mean of a condition over some sets."""
    values = [figure(results, names) for results in seeds.values()]
    return estimate(values)


def difference(better: Seeds, worse: Seeds, names: Sequence[str]) -> Estimate:
    """``better`` minus ``worse`` on the mean of some sets, seed by seed and sample by sample."""
    pairs = [
        (better[seed], worse[seed] if seed in worse else worse[min(worse)])
        for seed in seeds_of(better, worse)
    ]
    values = [figure(a, names) - figure(b, names) for a, b in pairs]
    draws = [a[n].resampled - b[n].resampled for a, b in pairs for n in names]
    return estimate(values, np.nanmean(np.stack(draws), axis=0))
