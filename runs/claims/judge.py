"""From the results of all seeds to differences with intervals, and what they say about a claim.

A difference is uncertain for two reasons: another seed would have tuned another model, and other
samples would have been asked. Its variance is the sum of both: that of the mean over the seeds,
and that of a paired bootstrap over the samples of the difference averaged over the seeds. The
interval is Student's, 95 %, with Welch and Satterthwaite's degrees of freedom.
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
    """A mean over seeds and the half width of its interval; nan where one seed is all there is."""

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
        """Whether a claimed gain is one, as far as the interval can tell."""
        if self.low > 0:
            return "holds"
        return "does not hold" if self.high < 0 else "undecided"


def estimate(values: Sequence[float], resampled: Floats | None = None) -> Estimate:
    """``values`` of the seeds; ``resampled`` [resamples] of their mean over other samples."""
    n = len(values)
    of_seeds = float(np.var(values, ddof=1)) / n if n > 1 else float("nan")
    of_samples = 0.0 if resampled is None else float(np.var(resampled, ddof=1))
    variance = of_seeds + of_samples
    if not variance:  # all seeds alike, to the digit
        return Estimate(fmean(values), 0.0)
    freedom = variance**2 / (of_seeds**2 / max(1, n - 1) + of_samples**2 / (RESAMPLES - 1))
    return Estimate(fmean(values), float(stats.t.ppf(0.975, freedom)) * variance**0.5)


def read(work: Path) -> dict[str, dict[int, dict[str, Result]]]:
    """Condition -> seed -> benchmark -> result, of the runs that are finished."""
    found: dict[str, dict[int, dict[str, Result]]] = {}
    for done in sorted(work.glob(f"*/seed*/{DONE}")):
        folder = done.parent
        paths = sorted(folder.glob(f"results/*/{RESULT}"))
        results = {path.parent.name: Result.load(path.parent) for path in paths}
        found.setdefault(folder.parent.name, {})[int(folder.name.removeprefix("seed"))] = results
    return found


def sets_of(measure: str, *conditions: Seeds) -> list[str]:
    """The benchmarks of a role, or the one called so, that have a figure in every result."""
    every = [own for seeds in conditions for own in seeds.values()]
    return [
        name
        for name, result in every[0].items()
        if measure in (name, result.role)
        and all(name in own and own[name].value is not None for own in every)
    ]


def figure(results: Mapping[str, Result], names: Sequence[str]) -> float:
    """The mean of some sets, 0 to 100, each counting once."""
    return fmean(results[name].value or 0.0 for name in names)


def seeds_of(*conditions: Seeds) -> list[int]:
    """The seeds that all have; BLIP-2 has one, which stands beside all."""
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
    draws = [a[n].resampled() - b[n].resampled() for a, b in pairs for n in names]
    return estimate(values, np.nanmean(np.stack(draws), axis=0))
