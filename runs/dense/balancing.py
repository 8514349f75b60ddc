"""Does it help to draw sets by the square root of their size, where sizes differ as in the paper?

    python -m runs.dense.balancing WORK DOCS [--start MODEL] [--seeds 5]

In the paper the largest set has 1,500 times as many samples as the smallest. The dense world is
written again with such sizes (`SIZES`), and MODEL is tuned with sets drawn by the square root of
their size, equally often, and in proportion to their size, each with several seeds; no set has a
weight by hand. Finished jobs are skipped, interrupted ones resume. Writes DOCS/balancing.md.
"""

from dataclasses import dataclass
from pathlib import Path

from instructblip.data.order import Mixture
from instructblip.experiment.datasets import prepare_training
from instructblip.experiment.train import cache
from instructblip.recipe.load import load_recipe
from instructblip.scenes.dense import DENSE_SETS, FORMAT_VERSION
from instructblip.scenes.formats import SetFolder
from instructblip.scenes.official import WrittenSet, write_sets
from runs.claims.conditions import Job, schedule
from runs.claims.judge import difference, level, read, sets_of
from runs.claims.measure import run_plan
from runs.claims.write import plus_minus, signed
from runs.dense.claim import OnDense

MODULE = "runs.dense.balancing"
SIZES = {"coco_caption": 6000, "vqav2": 20_000, "okvqa": 60, "aokvqa": 12}
"""Images of coco_caption, and questions of the other sets."""
TEMPERATURES = {"square_root": 0.5, "equal": 0.0, "proportional": 1.0}
"""Condition -> the exponent of the size of a set in its probability."""
TITLES = {
    "square_root": "square root of the size",
    "equal": "equally often",
    "proportional": "in proportion to the size",
}
ROLES = {"held_in": "held-in", "held_out": "held-out"}


@dataclass(frozen=True)
class BalancingPlan(OnDense):
    """One recipe with three exponents."""

    docs: Path = Path("docs")

    @property
    def common(self) -> list[str]:
        weights = [f"data.sets.{name}.weight=1" for name in SIZES]
        return [*super().common, f"model.start={self.start}", *weights]

    def _of_seed(self, seed: int) -> list[Job]:
        shared = [f"training.seed={seed}", f"data.seed={seed}", *schedule(self.steps)]
        return [
            self.job(f"{name}/seed{seed}", *shared, f"data.temperature={temperature}")
            for name, temperature in TEMPERATURES.items()
        ]


def write_unequal(root: Path, scale: float) -> None:
    """The dense world with training sets of ``SIZES``; its evaluation sets are as always."""
    sets = {
        name: WrittenSet(write, splits | ({"train": SIZES[name]} if name in SIZES else {}))
        for name, (write, splits) in DENSE_SETS.items()
    }
    settings = {"format": FORMAT_VERSION, "world": "dense", "seed": 0, "scale": scale}
    write_sets(root, sets, settings | {"sizes": SIZES}, SetFolder, MODULE)


TEXT = """# Balancing, where sizes differ as in the paper

`python -m runs.dense.balancing` writes this page: {seeds} seeds, {steps} steps of tuning, up to
{limit} samples of each benchmark. Scores are 0 to 100; the interval of a difference accounts for
seeds and samples, ± is half the interval over the seeds.

The paper draws sets by the square root of their size; drawing all equally often loses 1.5 points
held-in and 0.1 to 4.4 held-out there (table 2). Its largest set has about 1,500 times as many
samples as its smallest. On Scenes the largest has nine times as many, and the difference is
undecided (`claims.md`). Here the dense world has sets of these sizes:

{mixture}

{differences}

The square root is between the two on the small sets (okvqa, by look, and vizwiz, the same about
pairs that no training shows), where drawing equally often is best: the pre-training has read
phrases by look, so that 60 questions, each seen 80 times, teach the form of an answer and do
not make the Q-Former worse on new images. What the paper's balancing prevents, learning a small set
by heart, does not happen in {steps} steps. Drawing in proportion to the size hardly shows the small
sets, and they suffer.

## Set by set

{sets}
"""


def write_page(plan: BalancingPlan) -> None:
    conditions = read(plan.work)
    prepared = prepare_training(load_recipe(plan.base, plan.common))
    sizes = {name: len(rows) for name, rows in prepared.items()}
    mixtures = {name: Mixture(sizes, {}, power) for name, power in TEMPERATURES.items()}
    draws = plan.steps * load_recipe(plan.base).training.batch_size
    titles = " | ".join(TITLES.values())
    mixture = [f"| set | samples | {titles} |", "|---|---:|---:|---:|---:|"]
    for i, (name, size) in enumerate(sizes.items()):
        rows = [each.table(draws)[i] for each in mixtures.values()]
        cells = [f"{100 * row.probability:.2f} %, {row.epochs:.3g} epochs" for row in rows]
        mixture.append(f"| {name} | {size:,} | " + " | ".join(cells) + " |")
    best, *others = conditions["square_root"], conditions["equal"], conditions["proportional"]
    lines = ["| the square root compared with | | with | without | difference | |"]
    lines.append("|---|---|---:|---:|---:|---|")
    for title, other in zip([*TITLES.values()][1:], others, strict=True):
        for role, role_title in ROLES.items():
            names = sets_of(role, best, other)
            gain = difference(best, other, names)
            lines.append(
                f"| {title} | {role_title} | {plus_minus(level(best, names))} | "
                f"{plus_minus(level(other, names))} | {signed(gain)} | **{gain.verdict}** |"
            )
    table = [f"| | {titles} |", "|---|---:|---:|---:|"]
    for role in ROLES:
        for name in sets_of(role, best, *others):
            cells = [plus_minus(level(each, [name])) for each in (best, *others)]
            table.append(f"| {name.removeprefix('scenes_')} | " + " | ".join(cells) + " |")
    text = TEXT.format(
        seeds=plan.seeds, steps=plan.steps, limit=plan.limit, mixture="\n".join(mixture),
        differences="\n".join(lines), sets="\n".join(table),
    )  # fmt: skip
    (plan.docs / "balancing.md").write_text(text, encoding="utf-8")
    print(plan.docs / "balancing.md")


def prepare(plan: BalancingPlan, scale: float) -> None:
    """Write the data and store the image features."""
    write_unequal(plan.work / "dense", scale)
    cache(load_recipe(plan.base, [*plan.common, "data.check=run"]))


if __name__ == "__main__":
    if finished := run_plan(
        __doc__, MODULE, BalancingPlan, prepare, lambda p: p.add_argument("docs", type=Path)
    ):
        write_page(finished)
