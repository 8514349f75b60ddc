"""Write docs/claims.md and its plots from what ``measure.py`` left: means over seeds, intervals.

An interval is Student's, 95 %, over the seeds; differences are taken seed by seed. A claim holds
when the interval of its difference lies above 0, fails when it lies below, and is open otherwise.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt
import numpy as np
from scipy import stats

from instructblip.evaluation.result import RESULT

Values = list[float]


@dataclass(frozen=True)
class Estimate:
    """Mean over seeds and the half width of its interval; nan for a single seed."""

    mean: float
    half: float

    @classmethod
    def of(cls, values: Values) -> "Estimate":
        n = len(values)
        if n < 2:
            return cls(fmean(values), float("nan"))
        spread = float(np.std(values, ddof=1)) / n**0.5
        return cls(fmean(values), float(stats.t.ppf(0.975, n - 1)) * spread)

    def __str__(self) -> str:
        return f"{self.mean:.1f} ± {self.half:.1f}"


@dataclass(frozen=True)
class Claim:
    """``better`` shall beat ``worse`` in ``measure``: "held_in", "held_out" or a benchmark."""

    title: str
    better: str
    worse: str
    measure: str


CLAIMS = [
    Claim("Table 1: tuning helps on sets never tuned on", "instructblip", "blip2", "held_out"),
    Claim("Table 1: and on those tuned on", "instructblip", "blip2", "held_in"),
    *(
        Claim(f"Table 2: {what} helps, {role.replace('_', '-')}", "instructblip", worse, role)
        for what, worse in (
            ("an instruction-aware Q-Former", "no_instruction_in_qformer"),
            ("balancing the data sets", "no_balancing"),
        )
        for role in ("held_in", "held_out")
    ),
    *(
        Claim(f"Figure 4: instructions beat {what}, held-out", "instructblip", worse, "held_out")
        for what, worse in (
            ("plain inputs", "multitask_plain"),
            ("data set names", "multitask_names"),
            ("data set names in both", "multitask_names_asked_by_name"),
        )
    ),
    Claim("Table 3: the better start for a set that was held out (scienceqa)",
          "instructblip_finetuned_scienceqa", "blip2_finetuned_scienceqa", "scenes_scienceqa"),
    Claim("Table 3: the better start for a set that was not (okvqa)",
          "instructblip_finetuned_okvqa", "blip2_finetuned_okvqa", "scenes_okvqa"),
]  # fmt: skip


def read(work: Path) -> dict[str, list[dict[str, float]]]:
    """Condition -> for each seed the figures of its benchmarks and their means by role."""
    found: dict[str, list[dict[str, float]]] = {}
    for folder in sorted(work.glob("*/seed*")):
        results = [json.loads(p.read_text()) for p in sorted(folder.glob(f"results/*/{RESULT}"))]
        figures = {r["benchmark"]: r["value"] for r in results if r["value"] is not None}
        for role in ("held_in", "held_out"):
            own = [figures[r["benchmark"]] for r in results
                   if r["role"] == role and r["benchmark"] in figures]  # fmt: skip
            if own:
                figures[role] = fmean(own)
        if figures:
            found.setdefault(folder.parent.name, []).append(figures)
    return found


def values(seeds: list[dict[str, float]], measure: str, number: int) -> Values:
    """One value a seed; a condition without seeds of its own (BLIP-2) stands for all."""
    own = [figures[measure] for figures in seeds]
    return own * number if len(own) == 1 else own[:number]


def judge(difference: Estimate) -> str:
    if np.isnan(difference.half):
        return "one seed: open"
    if difference.mean - difference.half > 0:
        return "holds"
    return "does not hold" if difference.mean + difference.half < 0 else "open"


def claims_table(found: dict[str, list[dict[str, float]]]) -> list[str]:
    lines = ["| claim | better | worse | difference | |", "|---|---:|---:|---:|---|"]
    for claim in CLAIMS:
        if claim.better not in found or claim.worse not in found:
            continue
        number = max(len(found[claim.better]), len(found[claim.worse]))
        a, b = (values(found[c], claim.measure, number) for c in (claim.better, claim.worse))
        difference = Estimate.of([x - y for x, y in zip(a, b, strict=True)])
        lines.append(
            f"| {claim.title} | {Estimate.of(a)} | {Estimate.of(b)} | {difference} | "
            f"**{judge(difference)}** |"
        )
    return lines


def sets_table(found: dict[str, list[dict[str, float]]]) -> list[str]:
    """Every benchmark under every condition of the full evaluation."""
    conditions = [c for c, seeds in found.items() if "held_out" in seeds[0] and len(seeds[0]) > 4]
    names = [
        "held_in",
        "held_out",
        *(n for n in found[conditions[0]][0] if n.startswith("scenes_")),
    ]
    lines = ["| | " + " | ".join(conditions) + " |", "|---|" + "---:|" * len(conditions)]
    for name in names:
        cells = [str(Estimate.of([s[name] for s in found[c] if name in s])) for c in conditions]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return lines


def plot(found: dict[str, list[dict[str, float]]], path: Path) -> None:
    """Held-in and held-out means of every condition."""
    conditions = [c for c, seeds in found.items() if {"held_in", "held_out"} <= set(seeds[0])]
    figure, axes = plt.subplots(1, 2, figsize=(9, 0.5 * len(conditions) + 1.2), sharey=True)
    for axis, role in zip(axes, ("held_in", "held_out"), strict=True):
        estimates = [Estimate.of([s[role] for s in found[c]]) for c in conditions]
        halves = [0.0 if np.isnan(e.half) else e.half for e in estimates]
        colours = ["#0f6e84" if c == "instructblip" else "#8f9aa6" for c in conditions]
        labels = [c.replace("_", " ") for c in conditions]
        axis.barh(labels, [e.mean for e in estimates], xerr=halves, color=colours)
        axis.set_title(role.replace("_", "-"))
        axis.set_xlim(0, 100)
        axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


TEXT = """# The paper's claims on Scenes

Written by `runs/claims.sh`: {seeds} seeds, {steps} steps of tuning, {finetune} of fine-tuning, at
most {limit} samples of each benchmark, {minutes} minutes. Scores are 0 to 100; ± is half the 95 %
interval over the seeds (Student), differences are taken seed by seed. A claim **holds** when the
interval of its difference lies above 0.

Each condition is a list of overrides of the recipe `scenes`, in `runs/claims/measure.py`. "Without
balancing" draws all sets equally often and drops the weights by hand. BLIP-2 is the starter as it
is: it has no seeds of its own.

{claims}

![Held-in and held-out means of every condition](claims.svg)

## Every set

{sets}
"""


def main() -> None:
    work, docs = Path(sys.argv[1]), Path(sys.argv[2])
    found = read(work)
    if not found:
        raise SystemExit(f"{work} holds no results; run runs/claims/measure.py first")
    settings = json.loads((work / "settings.json").read_text())
    docs.mkdir(parents=True, exist_ok=True)
    plot(found, docs / "claims.svg")
    text = TEXT.format(
        seeds=settings["seeds"],
        steps=settings["steps"],
        finetune=settings["finetune_steps"],
        limit=settings["limit"],
        minutes=settings["minutes"],
        claims="\n".join(claims_table(found)),
        sets="\n".join(sets_table(found)),
    )
    (docs / "claims.md").write_text(text, encoding="utf-8")
    print(docs / "claims.md")


if __name__ == "__main__":
    main()
