"""Write docs/dense.md and its figures from the results of `claim.py` and `attention.py`.

python -m runs.dense.write WORK DOCS
"""

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from statistics import fmean

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt
import numpy as np

from instructblip.scenes.dense import limit
from runs.claims.judge import Seeds, difference, level, read, seeds_of, sets_of
from runs.claims.write import plus_minus, signed

Conditions = Mapping[str, Seeds]
GUESSED = {
    "scenes_vqav2": fmean((1 / 6, 1 / 6, 1 / 10, 1 / 2)),
    "scenes_okvqa": fmean((1 / 10, 1 / 2, 1 / 5, 1 / 5)),
    "scenes_aokvqa": fmean((1 / 4, 1 / 4, 1 / 4, 1 / 2)),
}
"""Share of right answers without the thing, of the sets whose limit is arithmetic."""
LINES = {
    "reads": ("reads the instruction", "#0f6e84", "o-"),
    "withheld": ("the same, instruction withheld", "#7fb2bf", "s--"),
    "of_another": ("the same, instruction of another sample", "#c9a227", "^--"),
    "does_not_read": ("does not read", "#b0442c", "o-"),
    "untuned": ("BLIP-2, not tuned", "#8f9aa6", "d:"),
}
ROLES = {"held_in": "held-in", "held_out": "held-out"}
plt.rcParams["svg.hashsalt"] = "dense"


def queries_of(conditions: Conditions) -> list[int]:
    """The numbers of queries for which both conditions are there."""
    return [
        queries
        for queries in sorted({int(name.rsplit("_", 1)[1]) for name in conditions})
        if {f"reads_{queries}", f"does_not_read_{queries}"} <= conditions.keys()
    ]


def unread_limit(queries: int, names: list[str]) -> float:
    """What a Q-Former that does not read reaches at most on some sets, 0 to 100."""
    return 100 * fmean(limit(queries, GUESSED[name]) for name in names)


def differences_table(conditions: Conditions, queries: list[int]) -> str:
    lines = ["| queries | | reads | does not read | difference | | limit without reading |"]
    lines.append("|---|---|---:|---:|---:|---|---:|")
    for number in queries:
        a, b = conditions[f"reads_{number}"], conditions[f"does_not_read_{number}"]
        for role, title in ROLES.items():
            names = sets_of(role, a, b)
            gain = difference(a, b, names)
            shown = f"{unread_limit(number, names):.0f}" if role == "held_in" else ""
            lines.append(
                f"| {number} | {title} | {plus_minus(level(a, names))} | "
                f"{plus_minus(level(b, names))} | {signed(gain)} | **{gain.verdict}** | {shown} |"
            )
    return "\n".join(lines)


def withheld_table(conditions: Conditions, queries: list[int]) -> str:
    """What the tuned model loses without its instruction, and with another sample's."""
    lines = ["| queries | | instruction withheld | instruction of another sample |"]
    lines.append("|---|---|---:|---:|")
    for number in queries:
        own = conditions[f"reads_{number}"]
        for role, title in ROLES.items():
            cells = []
            for name in ("withheld", "of_another"):
                other = conditions.get(f"{name}_{number}")
                if other is None:
                    cells.append("")
                    continue
                lost = difference(other, own, sets_of(role, own, other))
                cells.append(signed(lost))
            lines.append(f"| {number} | {title} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def sets_table(conditions: Conditions, queries: list[int]) -> str:
    """Each set with a reading and a not reading Q-Former."""
    columns = [(name, n) for n in queries for name in ("reads", "does_not_read")]
    titles = (f"{LINES[name][0]}, {n}" for name, n in columns)
    lines = ["| | " + " | ".join(titles) + " |", "|---|" + "---:|" * len(columns)]
    every = [conditions[f"{name}_{n}"] for name, n in columns]
    for role in ROLES:
        for one in sets_of(role, *every):
            cells = [plus_minus(level(seeds, [one])) for seeds in every]
            lines.append(f"| {one.removeprefix('scenes_')} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def plot_curve(conditions: Conditions, queries: list[int], path: Path) -> None:
    """Both means by the number of queries."""
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.8), sharey=True)
    for axis, (role, title) in zip(axes, ROLES.items(), strict=True):
        for name, (label, colour, style) in LINES.items():
            there = [n for n in queries if f"{name}_{n}" in conditions]
            levels = [
                level(conditions[f"{name}_{n}"], sets_of(role, conditions[f"{name}_{n}"]))
                for n in there
            ]
            halves = [0.0 if np.isnan(one.half) else one.half for one in levels]
            means = [one.mean for one in levels]
            axis.errorbar(there, means, halves, fmt=style, color=colour, capsize=3, label=label)
        if role == "held_in":
            most = [unread_limit(n, sets_of(role, conditions[f"reads_{n}"])) for n in queries]
            axis.plot(queries, most, color="#3a424b", linewidth=0.9, label="limit without reading")
        axis.set_xscale("log", base=2)
        axis.set_xticks(queries, [str(n) for n in queries])
        axis.set_xlabel("queries")
        axis.set_title(title, fontsize=10)
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylim(0, 100)
    axes[0].set_ylabel("accuracy, %")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, frameon=False, fontsize=8, loc="outside lower center", ncols=3)
    figure.tight_layout(rect=(0, 0.12, 1, 1))
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def attention_table(found: dict) -> str:
    kinds = [*next(iter(next(iter(found.values())).values()))]
    lines = ["| | | " + " | ".join(f"by {kind}" for kind in kinds) + " |"]
    lines.append("|---|---|" + "---:|" * len(kinds))
    for model, both in found.items():
        for reading, shares in both.items():
            cells = [
                f"{one['mean']:.1f} [{one['interval'][0]:.1f}, {one['interval'][1]:.1f}]"
                for one in shares.values()
            ]
            lines.append(f"| {model} | {reading} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def plot_attention(found: dict, path: Path) -> None:
    """The share of attention on the asked-for cell, before and after tuning."""
    kinds = [*next(iter(next(iter(found.values())).values()))]
    bars = [(model, reading) for model, both in found.items() for reading in both]
    colours = ["#7fb2bf", "#d8dee3", "#0f6e84", "#8f9aa6"] * len(found)
    figure, axis = plt.subplots(figsize=(8, 3.4))
    width = 0.8 / len(bars)
    for i, (model, reading) in enumerate(bars):
        shares = [found[model][reading][kind] for kind in kinds]
        means = [one["mean"] for one in shares]
        errors = np.abs(np.array([one["interval"] for one in shares]).T - means)
        places = np.arange(len(kinds)) + (i - (len(bars) - 1) / 2) * width
        axis.bar(places, means, width, yerr=errors, color=colours[i], capsize=2,
                 label=f"{model}, {reading}")  # fmt: skip
    axis.axhline(4, color="#3a424b", linewidth=0.9, linestyle="--", label="chance")
    axis.set_xticks(range(len(kinds)), [f"by {kind}" for kind in kinds])
    axis.set_ylabel("attention on the asked-for cell, %")
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, fontsize=8)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


TEXT = """# A Q-Former that reads because it has to

`runs/dense.sh` writes this page: {seeds}, {steps} steps of tuning, up to {limit} samples of each
benchmark. Scores are 0 to 100.

On Scenes it makes no difference whether the Q-Former reads the instruction (`claims.md`): its
images hold no more than the queries can carry. In the dense world (`instructblip scenes --dense`)
they do: 20 to 25 things, each with a colour, a shape, a size and a digit. A Q-Former that does not
read, and whose Q queries carry one thing each, answers at most Q/N of the questions and guesses the
rest; that limit was written down before any training (`decisions/0019-dense-world.md`).

All models start from the same BLIP-2, pre-trained by `runs/dense.sh`, with its first 2, 4, 8 or 16
queries, and are tuned by one recipe (`dense`), which was not changed by any figure. Their
pre-training was: two pilots with four queries and one seed, scored on these sets, held-out ones
included, led to its second stage and to the wording of places (`log.md`).
Held in are questions by place, by look, and with choices; held out are pairs of colour and shape
that no training shows (vizwiz), things beside another (gqa), statements (vsr) and numbers (iconqa).
The interval of a difference accounts for seeds and samples; ± is half the interval over the seeds.

![Accuracy by the number of queries](dense.svg)

## Reading against not reading

{differences}

The limit is that of the three held-in sets. A Q-Former that does not read stays far below it with
many queries: they may carry the things, but the frozen language model, which learned Scenes, does
not pick one of them by a place or a look. So the difference is what reading is worth to a language
model that cannot select, and part of it would go with one that can. The table of all sets is at the
end.

## What the tuned model loses when the Q-Former gets no instruction, or a wrong one

The language model reads the right instruction in all cases.

{withheld}

## Where the queries look

With {attention_queries} queries: share of the attention of the last layer that reads the image,
in percent, on the cell that is asked for. It is the mean over queries, heads, seeds and new images,
with the 95 % interval over images. By chance it is 4.

![Attention on the asked-for cell](dense_attention.svg)

{attention}

## Set by set

{sets}
"""


def main() -> None:
    work, docs = Path(sys.argv[1]), Path(sys.argv[2])
    conditions = read(work)
    queries = queries_of(conditions)
    if not queries:
        raise SystemExit(f"{work} holds no results; run runs/dense.sh first")
    attention = json.loads((work / "attention.json").read_text())
    settings = json.loads((work / "settings.json").read_text())
    plot_curve(conditions, queries, docs / "dense.svg")
    plot_attention(attention["shares"], docs / "dense_attention.svg")
    seeds = {
        len(seeds_of(conditions[f"reads_{n}"], conditions[f"does_not_read_{n}"])) for n in queries
    }
    text = TEXT.format(
        seeds=" to ".join(map(str, sorted(seeds))) + " seeds",
        steps=settings["steps"],
        limit=settings["limit"],
        differences=differences_table(conditions, queries),
        withheld=withheld_table(conditions, queries),
        attention=attention_table(attention["shares"]),
        attention_queries=attention["queries"],
        sets=sets_table(conditions, queries),
    )
    (docs / "dense.md").write_text(text, encoding="utf-8")
    print(docs / "dense.md")


if __name__ == "__main__":
    main()
