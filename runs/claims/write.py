"""Write docs/claims.md and its plots from the results of ``measure.py``."""

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt
import numpy as np

from runs.claims.judge import Estimate, Seeds, difference, level, read, seeds_of, sets_of
from runs.claims.measure import DONE

Conditions = Mapping[str, Seeds]
"""Condition -> its results by seed."""
COLOURS = {"holds": "#0f6e84", "does not hold": "#b0442c", "undecided": "#8f9aa6"}
plt.rcParams["svg.hashsalt"] = "claims"  # the same figures give the same file


@dataclass(frozen=True)
class Claim:
    """``better`` beats ``worse`` on ``measure``: "held_in", "held_out" or a benchmark."""

    title: str
    better: str
    worse: str
    measure: str


@dataclass(frozen=True)
class Part:
    """What the paper reports in one table or figure, and the claims of it that are checked."""

    title: str
    paper: str
    claims: tuple[Claim, ...]


PARTS = (
    Part(
        "Table 1: tuning helps on held-out sets",
        "In the paper, InstructBLIP beats BLIP-2 by 17.1 % on average over the 13 held-out sets "
        "with FlanT5-XL, relative to BLIP-2's scores. Held-in, figure 4 shows 93.8 compared with "
        "67.8. What limits motion (msvdqa) and words in scenes (textvqa): `limits.md`.",
        (
            Claim("tuning, held-out", "instructblip", "blip2", "held_out"),
            Claim("tuning, held-in", "instructblip", "blip2", "held_in"),
        ),
    ),
    Part(
        "Table 2: the instruction in the Q-Former, and balancing",
        "In the paper (FlanT5-XL), a Q-Former that does not read the instruction loses 4.3 points "
        "held-in and 2.5 to 7.6 held-out; sampling all sets equally often loses 1.5 held-in and "
        "0.1 to 4.4 held-out. Sets whose sizes differ as in the paper: `balancing.md`.",
        tuple(
            Claim(f"{what}, {role.replace('_', '-')}", "instructblip", worse, role)
            for what, worse in (
                ("instruction-aware Q-Former", "no_instruction_in_qformer"),
                ("balancing", "no_balancing"),
            )
            for role in ("held_out", "held_in")
        ),
    ),
    Part(
        "Why the Q-Former's instruction may not matter here",
        "These conditions were added after the figures above were known; they test two possible "
        "reasons. First, the Q-Former may have nothing to select: the starter has 16 query tokens "
        "for images of one to four objects and learned to put one object into one token, so all "
        "that a question can ask for reaches the language model. In this case the instruction "
        "should matter when only two query tokens are kept before tuning. Second, the tuned "
        "Q-Former may hardly use its instruction. In this case withholding it after tuning costs "
        "nothing. The last rows tune three times as long. In the dense world, whose images hold "
        "more than the queries can carry, the instruction does matter: `dense.md`.",
        tuple(
            Claim(f"{what}, {role.replace('_', '-')}", better, worse, role)
            for what, better, worse in (
                ("instruction-aware, two queries", "few_queries", "few_queries_no_instruction"),
                ("instruction read after tuning", "instructblip", "instructblip_unread"),
                ("the same, two queries", "few_queries", "few_queries_unread"),
                ("instruction-aware, two queries, long", "few_queries_long",
                 "few_queries_no_instruction_long"),
                ("read after tuning, two queries, long", "few_queries_long",
                 "few_queries_long_unread"),
            )
            for role in ("held_out", "held_in")
        ),
    ),
    Part(
        "Figure 4: instructions compared with multitask training",
        "In the paper, multitask training does as well held-in (92.5 to 93.7 compared with 93.8) "
        "but stays at BLIP-2's level held-out (45.5 to 46.8 compared with 52.9). The held-in means "
        "are in the table of all conditions.",
        tuple(
            Claim(f"instructions over {what}, held-out", "instructblip", worse, "held_out")
            for what, worse in (
                ("plain inputs", "multitask_plain"),
                ("data set names", "multitask_names"),
                ("data set names, asked by name", "multitask_names_in_both"),
            )
        ),
    ),
    Part(
        "Table 3: the better start for fine-tuning on one set",
        "In the paper, all scores of a fine-tuned InstructBLIP but one are above those of a "
        "fine-tuned BLIP-2: with Vicuna-7B 79.5 compared with 77.3 on ScienceQA and 62.1 compared "
        "with 59.3 on OK-VQA.",
        (
            Claim("start for scienceqa, held out from tuning", "instructblip_finetuned_scienceqa",
                  "blip2_finetuned_scienceqa", "scenes_scienceqa"),
            Claim("start for okvqa, tuned on", "instructblip_finetuned_okvqa",
                  "blip2_finetuned_okvqa", "scenes_okvqa"),
        ),
    ),
)  # fmt: skip


@dataclass(frozen=True)
class Finding:
    """A claim with its figures; ``by_set`` has the difference on each set."""

    claim: Claim
    better: Estimate
    worse: Estimate
    difference: Estimate
    by_set: tuple[tuple[str, Estimate], ...]
    seeds: int


def check(claim: Claim, conditions: Conditions) -> Finding | None:
    """None where a condition has no finished run yet."""
    if claim.better not in conditions or claim.worse not in conditions:
        return None
    a, b = conditions[claim.better], conditions[claim.worse]
    names, seeds = sets_of(claim.measure, a, b), seeds_of(a, b)
    if not names or not seeds:
        return None
    a, b = ({s: all_of[s] for s in seeds if s in all_of} or all_of for all_of in (a, b))
    by_set = tuple((name, difference(a, b, [name])) for name in names)
    mean = difference(a, b, names)
    return Finding(claim, level(a, names), level(b, names), mean, by_set, len(seeds))


def plus_minus(estimate: Estimate) -> str:
    """A score with half its interval, which a single seed does not have."""
    half = "" if np.isnan(estimate.half) else f" ± {estimate.half:.1f}"
    return f"{estimate.mean:.1f}{half}"


def signed(estimate: Estimate) -> str:
    if np.isnan(estimate.half):
        return f"{estimate.mean:+.1f} (one seed)"
    return f"{estimate.mean:+.1f} [{estimate.low:+.1f}, {estimate.high:+.1f}]"


def part_text(part: Part, findings: Sequence[Finding]) -> str:
    """The paper's figures, the table of the claims, and the sets behind each difference."""
    lines = [f"## {part.title}", "", part.paper, ""]
    lines += ["| claim | with | without | difference | |", "|---|---:|---:|---:|---|"]
    lines += [
        f"| {f.claim.title} | {plus_minus(f.better)} | {plus_minus(f.worse)} | "
        f"{signed(f.difference)} | **{f.difference.verdict}** |"
        for f in findings
    ]
    several = [f for f in findings if len(f.by_set) > 1]
    return "\n".join([*lines, "", *(f"- {sentence(f)}" for f in several)]).rstrip()


def sentence(finding: Finding) -> str:
    """Which sets a difference comes from."""
    ordered = sorted(finding.by_set, key=lambda item: item[1].mean)
    up = [f"{_short(n)} {e.mean:+.1f}" for n, e in reversed(ordered) if e.verdict == "holds"]
    down = [f"{_short(n)} {e.mean:+.1f}" for n, e in ordered if e.verdict == "does not hold"]
    return (
        f"*{finding.claim.title}*: higher on {', '.join(up) or 'none'}; "
        f"lower on {', '.join(down) or 'none'}; "
        f"undecided on {len(ordered) - len(up) - len(down)} of {len(ordered)} sets."
    )


def _short(name: str) -> str:
    return name.removeprefix("scenes_")


def summary(findings: Sequence[Finding]) -> str:
    """The verdicts, counted and named."""
    parts = []
    for verdict in COLOURS:
        titles = [f.claim.title for f in findings if f.difference.verdict == verdict]
        parts.append(f"- **{verdict}** ({len(titles)}): {'; '.join(titles) or 'none'}")
    return "\n".join(parts)


def complete(conditions: Conditions) -> Conditions:
    """The conditions that were evaluated on more than one held-out set."""
    return {name: s for name, s in conditions.items() if len(sets_of("held_out", s)) > 1}


def sets_table(conditions: Conditions) -> str:
    """Every benchmark under every condition that was evaluated on all of them."""
    shown = complete(conditions)
    held_in, held_out = (sets_of(role, *shown.values()) for role in ("held_in", "held_out"))
    lines = ["| | " + " | ".join(name.replace("_", " ") for name in shown) + " |"]
    lines.append("|---|" + "---:|" * len(shown))
    for title, names in (
        ("**held-in**", held_in),
        ("**held-out**", held_out),
        *((_short(name), [name]) for name in (*held_in, *held_out)),
    ):
        cells = [plus_minus(level(seeds, names)) for seeds in shown.values()]
        lines.append(f"| {title} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def plot_differences(findings: Sequence[Finding], path: Path) -> None:
    """The difference of every claim with its interval, coloured by the verdict."""
    figure, axis = plt.subplots(figsize=(8, 0.36 * len(findings) + 1.0))
    for row, finding in enumerate(reversed(findings)):
        gain = finding.difference
        colour = COLOURS[gain.verdict]
        half = 0.0 if np.isnan(gain.half) else gain.half
        axis.errorbar(gain.mean, row, xerr=half, fmt="o", color=colour, capsize=3, markersize=5)
    axis.axvline(0, color="#3a424b", linewidth=0.8)
    axis.set_yticks(range(len(findings)), [f.claim.title for f in reversed(findings)])
    axis.set_xlabel("difference in points, 95 % interval")
    axis.spines[["top", "right", "left"]].set_visible(False)
    axis.grid(axis="x", alpha=0.3)
    for verdict, colour in COLOURS.items():
        axis.plot([], [], "o", color=colour, label=verdict)
    axis.legend(frameon=False, fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1), ncols=3)
    _save(figure, path)


def plot_levels(conditions: Conditions, path: Path) -> None:
    """Held-in and held-out means of every condition; dots are the seeds."""
    shown = complete(conditions)
    figure, axes = plt.subplots(1, 2, figsize=(9, 0.45 * len(shown) + 1.0), sharey=True)
    for axis, role in zip(axes, ("held_in", "held_out"), strict=True):
        names = sets_of(role, *shown.values())
        for row, (condition, seeds) in enumerate(reversed(shown.items())):
            colour = "#0f6e84" if condition == "instructblip" else "#8f9aa6"
            mean = level(seeds, names)
            half = 0.0 if np.isnan(mean.half) else mean.half
            axis.barh(row, mean.mean, xerr=half, color=colour, height=0.7, capsize=3)
            dots = [level({seed: results}, names).mean for seed, results in seeds.items()]
            axis.plot(dots, [row] * len(dots), "k.", markersize=3, alpha=0.6)
            axis.text(1, row, f"{mean.mean:.1f}", va="center", color="white", fontsize=8)
        axis.set_yticks(range(len(shown)), [c.replace("_", " ") for c in reversed(shown)])
        axis.set_title(role.replace("_", "-"), fontsize=10)
        axis.set_xlim(0, 100)
        axis.spines[["top", "right"]].set_visible(False)
    _save(figure, path)


def _save(figure: plt.Figure, path: Path) -> None:
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


TEXT = """# The paper's claims on Scenes

`runs/claims.sh{arguments}` writes this page from {runs} runs, {seeds}, {steps} steps of
tuning and {finetune_steps} of fine-tuning, up to {limit} samples of each benchmark;
{minutes:.0f} minutes of runs, {processes} at a time. Scores are 0 to 100.

A claim **holds** when the 95 % interval of its difference lies above 0, **does not hold** when it
lies below, and is **undecided** otherwise. The interval of a difference accounts for the variation
over seeds and over samples (`runs/claims/judge.py`); ± in the other columns is half the interval
over the seeds alone. BLIP-2 is the starter without tuning and has no seeds. All conditions have the
settings of the quickstart except for the number of steps, which they share; no setting was chosen
by these figures.

{summary}

![Differences of all claims with their intervals](claims.svg)

{parts}

## All conditions

Each condition is a list of overrides of the recipe `quickstart` (`runs/claims/conditions.py`).
"No balancing" samples all sets equally often, without weights by hand. "Multitask plain" trains on
inputs without an instruction, "multitask names" on inputs with the name of the data set in its
place; both are evaluated with instructions. "Multitask names in both" is evaluated with the names
as well. "Few queries" keeps two of the sixteen query tokens, "long" trains for three times as many
steps, and "unread" withholds the instruction from the Q-Former of the tuned model.

![Held-in and held-out means of every condition](claims_conditions.svg)

{sets}
"""


def main() -> None:
    work, docs = Path(sys.argv[1]), Path(sys.argv[2])
    conditions = read(work)
    if "blip2" not in conditions:
        raise SystemExit(f"{work} holds no results; run runs/claims.sh first")
    order = ["blip2", "instructblip"]
    order += [name for name in conditions if name not in order]
    conditions = {name: conditions[name] for name in order if name in conditions}
    settings = json.loads((work / "settings.json").read_text())
    spent = [json.loads(p.read_text())["seconds"] for p in work.glob(f"*/seed*/{DONE}")]
    parts = [(part, [f for c in part.claims if (f := check(c, conditions))]) for part in PARTS]
    findings = [finding for _, several in parts for finding in several]
    docs.mkdir(parents=True, exist_ok=True)
    plot_differences(findings, docs / "claims.svg")
    plot_levels(conditions, docs / "claims_conditions.svg")
    words = {
        "arguments": "".join(f" {override}" for override in settings["overrides"]),
        "runs": len(spent),
        "seeds": " to ".join(map(str, sorted({f.seeds for f in findings}))) + " seeds",
        "minutes": sum(spent) / 60,
        "summary": summary(findings),
        "parts": "\n\n".join(part_text(part, several) for part, several in parts if several),
        "sets": sets_table(conditions),
    }
    text = TEXT.format(**{**settings, **words})
    (docs / "claims.md").write_text(text, encoding="utf-8")
    print(docs / "claims.md")


if __name__ == "__main__":
    main()
