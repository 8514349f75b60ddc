"""Write docs/claims.md and its plots from what ``measure.py`` left; all words follow figures."""

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

Found = Mapping[str, Seeds]
COLOURS = {"holds": "#0f6e84", "does not hold": "#b0442c", "undecided": "#8f9aa6"}
plt.rcParams["svg.hashsalt"] = "claims"  # the same figures give the same file


@dataclass(frozen=True)
class Claim:
    """``better`` shall beat ``worse`` in ``measure``: "held_in", "held_out" or a benchmark."""

    title: str
    better: str
    worse: str
    measure: str


@dataclass(frozen=True)
class Part:
    """What the paper says in one table or figure, and the claims that are checked of it."""

    title: str
    paper: str
    claims: tuple[Claim, ...]


PARTS = (
    Part(
        "Table 1: tuning helps on sets that it never saw",
        "In the paper InstructBLIP beats BLIP-2 by 17.1 % on average over the 13 held-out sets "
        "with FlanT5-XL, relative to BLIP-2's own figures; held-in, figure 4 has 67.8 to 93.8.",
        (
            Claim("tuning, held-out", "instructblip", "blip2", "held_out"),
            Claim("tuning, held-in", "instructblip", "blip2", "held_in"),
        ),
    ),
    Part(
        "Table 2: the instruction in the Q-Former, and balancing",
        "In the paper (FlanT5-XL) a Q-Former that does not read the instruction costs 4.3 points "
        "held-in and 2.5 to 7.6 held-out, sampling all sets equally often 1.5 and 0.1 to 4.4.",
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
        "Asked after the figures above were known, of two possible reasons. First, nothing has to "
        "be chosen: the starter has 16 query tokens for pictures of one to four things and learned "
        "to put one thing into one of them, so that all a question could ask for reaches the "
        "language model. Then it should matter where all but two query tokens are taken away "
        "before tuning. Second, the tuned Q-Former hardly reads: then its instruction can be "
        "withheld after tuning without loss. The last rows tune three times as long.",
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
        "Figure 4: instructions against multitask training",
        "In the paper multitask training does as well held-in (92.5 to 93.7 against 93.8), but "
        "stays at BLIP-2's level held-out (45.5 to 46.8 against 52.9). The held-in means stand in "
        "the table of all conditions.",
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
        "Table 3: the better start for one set",
        "In the paper every figure of a fine-tuned InstructBLIP but one is above that of BLIP-2: "
        "with Vicuna-7B 77.3 to 79.5 on ScienceQA, 59.3 to 62.1 on OKVQA.",
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
    """A claim with its figures; ``by_set`` are the differences of the single sets."""

    claim: Claim
    better: Estimate
    worse: Estimate
    difference: Estimate
    by_set: tuple[tuple[str, Estimate], ...]
    seeds: int


def find(claim: Claim, found: Found) -> Finding | None:
    """None where a condition has no finished run yet."""
    if claim.better not in found or claim.worse not in found:
        return None
    a, b = found[claim.better], found[claim.worse]
    names, seeds = sets_of(claim.measure, a, b), seeds_of(a, b)
    if not names or not seeds:
        return None
    a, b = ({s: own[s] for s in seeds if s in own} or own for own in (a, b))
    by_set = tuple((name, difference(a, b, [name])) for name in names)
    whole = difference(a, b, names)
    return Finding(claim, level(a, names), level(b, names), whole, by_set, len(seeds))


def plus_minus(estimate: Estimate) -> str:
    """A figure with half its interval; without one where there is a single seed."""
    half = "" if np.isnan(estimate.half) else f" ± {estimate.half:.1f}"
    return f"{estimate.mean:.1f}{half}"


def signed(estimate: Estimate) -> str:
    if np.isnan(estimate.half):
        return f"{estimate.mean:+.1f} (one seed)"
    return f"{estimate.mean:+.1f} [{estimate.low:+.1f}, {estimate.high:+.1f}]"


def part_text(part: Part, findings: Sequence[Finding]) -> str:
    """The paper's words, the table, and the sets behind each difference."""
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
        f"*{finding.claim.title}*: higher {', '.join(up) or 'on no set'}; "
        f"lower {', '.join(down) or 'on none'}; {len(ordered) - len(up) - len(down)} of "
        f"{len(ordered)} sets within their own intervals."
    )


def _short(name: str) -> str:
    return name.removeprefix("scenes_")


def summary(findings: Sequence[Finding]) -> str:
    """The verdicts, counted and named."""
    parts = []
    for verdict in COLOURS:
        own = [f.claim.title for f in findings if f.difference.verdict == verdict]
        parts.append(f"- **{verdict}** ({len(own)}): {'; '.join(own) or 'none'}")
    return "\n".join(parts)


def sets_table(found: Found) -> str:
    """Every benchmark under every condition that answered them all."""
    whole = {name: seeds for name, seeds in found.items() if len(sets_of("held_out", seeds)) > 1}
    names = [n for role in ("held_in", "held_out") for n in sets_of(role, *whole.values())]
    lines = ["| | " + " | ".join(c.replace("_", " ") for c in whole) + " |"]
    lines.append("|---|" + "---:|" * len(whole))
    for title, own in (
        ("**held-in**", sets_of("held_in", *whole.values())),
        ("**held-out**", sets_of("held_out", *whole.values())),
        *((_short(name), [name]) for name in names),
    ):
        cells = [plus_minus(level(seeds, own)) for seeds in whole.values()]
        lines.append(f"| {title} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def plot_differences(findings: Sequence[Finding], path: Path) -> None:
    """Every claim's difference with its interval, coloured by what it says."""
    figure, axis = plt.subplots(figsize=(8, 0.36 * len(findings) + 1.0))
    for row, finding in enumerate(reversed(findings)):
        own = finding.difference
        colour = COLOURS[own.verdict]
        half = 0.0 if np.isnan(own.half) else own.half
        axis.errorbar(own.mean, row, xerr=half, fmt="o", color=colour, capsize=3, markersize=5)
    axis.axvline(0, color="#3a424b", linewidth=0.8)
    axis.set_yticks(range(len(findings)), [f.claim.title for f in reversed(findings)])
    axis.set_xlabel("difference in points, 95 % interval")
    axis.spines[["top", "right", "left"]].set_visible(False)
    axis.grid(axis="x", alpha=0.3)
    for verdict, colour in COLOURS.items():
        axis.plot([], [], "o", color=colour, label=verdict)
    axis.legend(frameon=False, fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1), ncols=3)
    _save(figure, path)


def plot_levels(found: Found, path: Path) -> None:
    """Held-in and held-out means of every condition; dots are the seeds."""
    whole = {name: seeds for name, seeds in found.items() if len(sets_of("held_out", seeds)) > 1}
    figure, axes = plt.subplots(1, 2, figsize=(9, 0.45 * len(whole) + 1.0), sharey=True)
    for axis, role in zip(axes, ("held_in", "held_out"), strict=True):
        names = sets_of(role, *whole.values())
        for row, (condition, seeds) in enumerate(reversed(whole.items())):
            colour = "#0f6e84" if condition == "instructblip" else "#8f9aa6"
            own = level(seeds, names)
            half = 0.0 if np.isnan(own.half) else own.half
            axis.barh(row, own.mean, xerr=half, color=colour, height=0.7, capsize=3)
            dots = [level({seed: results}, names).mean for seed, results in seeds.items()]
            axis.plot(dots, [row] * len(dots), "k.", markersize=3, alpha=0.6)
            axis.text(1, row, f"{own.mean:.1f}", va="center", color="white", fontsize=8)
        axis.set_yticks(range(len(whole)), [c.replace("_", " ") for c in reversed(whole)])
        axis.set_title(role.replace("_", "-"), fontsize=10)
        axis.set_xlim(0, 100)
        axis.spines[["top", "right"]].set_visible(False)
    _save(figure, path)


def _save(figure: plt.Figure, path: Path) -> None:
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


TEXT = """# The paper's claims on Scenes

Written by `runs/claims.sh{arguments}`: {runs} runs, {seeds}, {steps} steps of
tuning and {finetune_steps} of fine-tuning, up to {limit} samples of each benchmark;
{minutes:.0f} minutes of runs, {processes} at a time. Scores are 0 to 100.

A claim **holds** when the 95 % interval of its difference lies above 0, **does not hold** when it
lies below, and is **undecided** otherwise. The intervals of differences know both reasons for
doubt, other seeds and other samples (`runs/claims/judge.py`); ± in the columns beside them is half
the interval over the seeds alone. BLIP-2 is the starter as it is and has no seeds. The settings
are the quickstart's but for the number of steps, the same for every condition; none was chosen by
these figures.

{summary}

![Differences of all claims with their intervals](claims.svg)

{parts}

## All conditions

Each is a list of overrides of the recipe `quickstart`, in `runs/claims/conditions.py`.
"No balancing" draws all sets equally often, without weights by hand. "Multitask plain" trains on
inputs without an instruction, "multitask names" puts the name of the data set in its place; both
are asked with instructions, "multitask names in both" is asked by name as well. "Few queries" keeps
two of the sixteen query tokens, "long" is three times as many steps; "unread" withholds the
instruction from the Q-Former of the tuned model.

![Held-in and held-out means of every condition](claims_conditions.svg)

{sets}
"""


def main() -> None:
    work, docs = Path(sys.argv[1]), Path(sys.argv[2])
    found = read(work)
    if "blip2" not in found:
        raise SystemExit(f"{work} holds no results; run runs/claims.sh first")
    order = ["blip2", "instructblip"]
    order += [name for name in found if name not in order]
    found = {name: found[name] for name in order if name in found}
    settings = json.loads((work / "settings.json").read_text())
    spent = [json.loads(p.read_text())["seconds"] for p in work.glob(f"*/seed*/{DONE}")]
    parts = [(part, [f for c in part.claims if (f := find(c, found))]) for part in PARTS]
    findings = [finding for _, own in parts for finding in own]
    docs.mkdir(parents=True, exist_ok=True)
    plot_differences(findings, docs / "claims.svg")
    plot_levels(found, docs / "claims_conditions.svg")
    words = {
        "arguments": "".join(f" {override}" for override in settings["overrides"]),
        "runs": len(spent),
        "seeds": " to ".join(map(str, sorted({f.seeds for f in findings}))) + " seeds",
        "minutes": sum(spent) / 60,
        "summary": summary(findings),
        "parts": "\n\n".join(part_text(part, own) for part, own in parts if own),
        "sets": sets_table(found),
    }
    text = TEXT.format(**{**settings, **words})
    (docs / "claims.md").write_text(text, encoding="utf-8")
    print(docs / "claims.md")


if __name__ == "__main__":
    main()
