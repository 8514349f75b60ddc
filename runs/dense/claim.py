"""Does it help that the Q-Former reads the instruction? On the dense world, by number of queries.

    python -m runs.dense.claim WORK [--start MODEL] [--seeds 5] [--queries 2 4 8 16]

For each number of queries the first of MODEL's queries are kept; the model is tuned once with a
Q-Former that reads the instruction and once without, each with several seeds, by one recipe
(`dense`). The tuned models that read are evaluated again with the instruction withheld from
the Q-Former, and with that of another sample. Finished jobs are skipped, interrupted ones resume.
"""

import argparse
from dataclasses import dataclass
from pathlib import Path

from instructblip.experiment.train import cache
from instructblip.recipe.load import load_recipe
from instructblip.scenes.dense import write_dense
from runs.claims.conditions import Job, Plan, schedule
from runs.claims.measure import keep_queries, run_plan

CONDITIONS = {"reads": [], "does_not_read": ["model.instruction_aware=false"]}
WITHHELD = {"withheld": "none", "of_another": "other"}
"""What a tuned Q-Former that reads is given in a further evaluation."""


@dataclass(frozen=True)
class OnDense(Plan):
    """Conditions of the recipe ``dense``, with data in ``work/dense``."""

    start: str = "dense"
    steps: int = 300
    limit: int = 200
    base: str = "dense"

    @property
    def common(self) -> list[str]:
        return [
            f"data.root={self.work / 'dense'}",
            "data.check=skip",
            "features.cache=on",
            f"evaluation.limit={self.limit}",
            "training.keep_last=1",
        ]


@dataclass(frozen=True)
class DensePlan(OnDense):
    """Conditions for several numbers of queries; the folders are ``<condition>_<queries>``."""

    queries: tuple[int, ...] = (2, 4, 8, 16)

    def start_with(self, queries: int) -> Path:
        return self.work / f"start_{queries}_queries"

    def untuned(self) -> list[Job]:
        """BLIP-2 with each number of queries."""
        return [
            self.job(
                f"untuned_{queries}/seed0",
                f"model.start={self.start_with(queries)}",
                model=str(self.start_with(queries)),
                reads="none",
            )
            for queries in self.queries
        ]

    def _of_seed(self, seed: int) -> list[Job]:
        jobs = []
        for queries in self.queries:
            shared = [f"model.start={self.start_with(queries)}", *schedule(self.steps)]
            shared += [f"training.seed={seed}", f"data.seed={seed}"]
            for name, changes in CONDITIONS.items():
                jobs.append(self.job(f"{name}_{queries}/seed{seed}", *shared, *changes))
            reader = f"reads_{queries}/seed{seed}"
            jobs += [
                self.job(
                    f"{name}_{queries}/seed{seed}", *shared,
                    model=f"{self.work}/{reader}/last", needs=reader, reads=reads,
                )
                for name, reads in WITHHELD.items()
            ]  # fmt: skip
        return jobs

    def jobs(self) -> list[Job]:
        return [*self.untuned(), *super().jobs()]


def prepare(plan: DensePlan, scale: float) -> None:
    """Write the starts with few queries and the data, and store the image features."""
    for queries in plan.queries:
        keep_queries(plan.start, queries, plan.start_with(queries))
    write_dense(plan.work / "dense", scale=scale)
    first = f"model.start={plan.start_with(plan.queries[0])}"
    cache(load_recipe(plan.base, [*plan.common, first, "data.check=run"]))


def _more(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--queries", type=int, nargs="+", default=DensePlan.queries)


if __name__ == "__main__":
    run_plan(__doc__, "runs.dense.claim", DensePlan, prepare, _more)
