"""A comparison as Markdown, LaTeX, JSON and for the terminal, shaped like table 1 of the paper.

Models are rows and sets are columns, with a table for each role (held-in, held-out, fine-tuned):
first the published scores of the same sets, then ours with their intervals, then the differences to
the baseline with a paired test. What each set was measured with follows the tables.
"""

import csv
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from instructblip.core.terminal import escape
from instructblip.evaluation.bootstrap import LEAST_GROUPS, Difference
from instructblip.evaluation.compare import ROLES, Cell, Comparison, Row
from instructblip.evaluation.result import Spread, describe_how

if TYPE_CHECKING:
    from rich.table import Table

UNSEEN = "†"
NOTE = (
    "Brackets: 95 % bootstrap interval, none where all resamples score alike. Δ: difference to "
    "{baseline} on the same samples, paired "
    f"bootstrap, * p < 0.05, ** p < 0.01. {UNSEEN}: task type never seen in tuning. "
    "(paper): published figures; no mean, since not all have every set. Other wordings: mean, "
    "lowest and highest score under other prompts of the task."
)
CONSTANT = "best constant answer"
"""The line of what one answer to all samples would score."""
_NARROW_NOTE = NOTE.split(". ", 1)[1]


def _read_published() -> dict[str, dict[str, float]]:
    models = {}
    with Path(__file__).with_name("published.csv").open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            model = row.pop("model")
            models[model] = {name: float(score) for name, score in row.items() if score}
    return models


# The InstructBLIP paper (arXiv 2305.06500). Table 1 is zero-shot: CIDEr for NoCaps and Flickr30K,
# AUC for HatefulMemes, MRR for Visual Dialog, accuracy for the rest. Table 3 is fine-tuned on one
# set each; its A-OKVQA scores are those of the validation split.
PUBLISHED: Mapping[str, Mapping[str, float]] = _read_published()
"""Model -> benchmark -> score, 0 to 100 (CIDEr may exceed it)."""


@dataclass(frozen=True, slots=True)
class Line:
    """One line of a table: the scores of a model, or its differences, by column."""

    name: str
    kind: str  # "published", "constant", "model", "wordings" or "difference"
    texts: list[str]


@dataclass(frozen=True, slots=True)
class PaperTable:
    """All sets of one role: ``titles`` and ``metrics`` of its columns, and its lines."""

    role: str
    titles: list[str]
    metrics: list[str]
    lines: list[Line]


def paper_tables(comparison: Comparison, intervals: bool = True) -> list[PaperTable]:
    """Return a table for each role that has sets."""
    tables = []
    for role, title in ROLES.items():
        if rows := comparison.table(role):
            titles = [f"{row.title} {UNSEEN}" if row.unseen_type else row.title for row in rows]
            metrics = [row.metric for row in rows]
            tables.append(PaperTable(title, titles, metrics, _lines(comparison, rows, intervals)))
    return tables


def _lines(comparison: Comparison, rows: Sequence[Row], intervals: bool) -> list[Line]:
    lines = [
        Line(f"{model} (paper)", "published", [_plain(figures, row) for row in rows])
        for model, figures in PUBLISHED.items()
        if any(row.name in figures for row in rows)
    ]
    if any(row.constant for row in rows):
        texts = [f"{row.constant.score:.1f}" if row.constant else "–" for row in rows]
        lines.append(Line(CONSTANT, "constant", texts))
    for model in comparison.models:
        texts = [_figure(row.cells.get(model), intervals) for row in rows]
        lines.append(Line(model, "model", texts))
        if any(model in row.wordings for row in rows):
            texts = [_spread(row.wordings.get(model)) for row in rows]
            lines.append(Line(f"{model}, other wordings", "wordings", texts))
    for model in comparison.models:
        if model != comparison.baseline:
            texts = [_delta(row.differences.get(model), intervals) for row in rows]
            lines.append(Line(f"Δ {model}", "difference", texts))
    return lines


def _plain(figures: Mapping[str, float], row: Row) -> str:
    return f"{figures[row.name]:.1f}" if row.name in figures else "–"


def _figure(cell: Cell | None, intervals: bool) -> str:
    if cell is None or cell.value is None:
        return "–"
    is_shown = intervals and cell.low is not None
    bounds = f" [{cell.low:.1f}, {cell.high:.1f}]" if is_shown else ""
    return f"{cell.value:.1f}{bounds}"


def _spread(spread: Spread | None) -> str:
    return f"{spread.mean:.1f} ({spread.low:.1f} to {spread.high:.1f})" if spread else "–"


def _delta(change: Difference | None, intervals: bool) -> str:
    if change is None:
        return ""
    bounds = f" [{change.low:+.1f}, {change.high:+.1f}]" if intervals else ""
    stars = "**" if change.p < 0.01 else "*" if change.p < 0.05 else ""
    return f"{change.value:+.1f}{bounds}{stars}"


def measured_with(comparison: Comparison) -> list[str]:
    """Return one line per set: what its scores depend on, and which differences it can detect."""
    lines = []
    for row in comparison.rows:
        assert row.how is not None
        n = next(iter(row.cells.values())).n
        always = f"; {CONSTANT} {row.constant.answer[:60]!r}" if row.constant else ""
        power = _power(row, n)
        lines.append(f"{row.title}: {row.name}, n {n}; {describe_how(row.how)}{always}{power}")
    return lines


SMALL_DIFFERENCE = 2.0
"""Points, for which the tables state the samples that detect them."""


def _power(row: Row, n: int) -> str:
    """Which true difference to the baseline four of five such evaluations would detect."""
    if row.too_few:
        return f"; fewer than {LEAST_GROUPS} groups or samples, so no difference is tested"
    if not row.differences:
        return ""
    widest = max(row.differences.values(), key=lambda each: each.error)
    if not widest.detectable > 0:
        return ""
    needed = widest.samples(SMALL_DIFFERENCE, n)
    return (
        f"; detects a difference of {widest.detectable:.1f} points in 4 of 5 cases, "
        f"{SMALL_DIFFERENCE:.0f} points with n {needed:,}"
    )


def to_json(comparison: Comparison) -> dict[str, Any]:
    """Return everything as plain values; ``datasets`` by benchmark, ``means`` by role."""

    def plain(row: Row) -> dict[str, Any]:
        names = ("title", "role", "metric", "unseen_type", "how")
        spreads = {model: spread._asdict() for model, spread in row.wordings.items()}
        return {name: getattr(row, name) for name in names} | {
            "models": {
                model: {"value": c.value, "interval_95": [c.low, c.high], "n": c.n}
                for model, c in row.cells.items()
            },
            "differences": {
                model: {
                    "value": d.value,
                    "interval_95": [d.low, d.high],
                    "p": d.p,
                    "detectable": d.detectable,
                }
                for model, d in row.differences.items()
            },
            **({"constant": row.constant._asdict()} if row.constant else {}),
            **({"wordings": spreads} if spreads else {}),
            "published": {m: f[row.name] for m, f in PUBLISHED.items() if row.name in f},
        }

    return {
        "models": list(comparison.models),
        "baseline": comparison.baseline,
        "datasets": {row.name: plain(row) for row in comparison.rows},
        "means": {row.role: plain(row) for row in comparison.means},
    }


def to_markdown(comparison: Comparison) -> str:
    """Return tables for a README."""
    parts = []
    for table in paper_tables(comparison):
        lines = [_markdown_line([table.role, *table.titles])]
        lines.append("|---|" + "---:|" * len(table.titles))
        lines.append(_markdown_line(["metric", *table.metrics], "*"))
        for line in table.lines:
            mark = "**" if line.kind == "model" else ""
            lines.append(_markdown_line([line.name], mark) + _markdown_line(line.texts)[1:])
        parts.append("\n".join(lines))
    note = escape_markdown(NOTE.format(baseline=comparison.baseline))
    listed = "\n".join(f"- {escape_markdown(line)}" for line in measured_with(comparison))
    return "\n\n".join([*parts, note, listed]) + "\n"


def _markdown_line(texts: Sequence[str], mark: str = "") -> str:
    """The cells of a line, each between two ``mark``."""
    return "| " + " | ".join(f"{mark}{escape_markdown(text)}{mark}" for text in texts) + " |"


def escape_markdown(text: str) -> str:
    """The text in one line in which Markdown sees no table, HTML, code, emphasis or link."""
    text = re.sub(r"[\\|*_<`~]", r"\\\g<0>", " ".join(text.splitlines()))
    return text.replace("](", "]\\(")


_LATEX = {character: f"\\{character}" for character in "&%$#_{}"} | {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "†": r"$^\dagger$",
    "Δ": r"$\Delta$",
    "–": "--",
}


def _latex_line(cells: Sequence[str]) -> str:
    return (
        " & ".join(" ".join(c.splitlines()).translate(str.maketrans(_LATEX)) for c in cells)
        + r" \\"
    )


def to_latex(comparison: Comparison) -> str:
    """Return a ``tabular`` for each role; it needs the package booktabs."""
    parts = []
    for table in paper_tables(comparison):
        lines = [rf"\begin{{tabular}}{{l{'r' * len(table.titles)}}}", r"\toprule"]
        lines += [_latex_line([table.role, *table.titles]), _latex_line(["", *table.metrics])]
        for _, group in groupby(table.lines, key=attrgetter("kind")):
            lines += [r"\midrule", *(_latex_line([line.name, *line.texts]) for line in group)]
        parts.append("\n".join([*lines, r"\bottomrule", r"\end{tabular}"]))
    notes = [NOTE.format(baseline=comparison.baseline), *measured_with(comparison)]
    return "\n\n".join(
        [*parts, "\n".join(f"% {' '.join(note.splitlines())}" for note in notes), ""]
    )


def to_rich(comparison: Comparison, intervals: bool = False) -> "list[Table]":
    """Return tables for the terminal, narrow: no metrics, and intervals only on request."""
    from rich.table import Table
    from rich.text import Text

    shown_tables = []
    for table in paper_tables(comparison, intervals):
        shown = Table(title=table.role, title_justify="left")
        shown.add_column(Text("model"), no_wrap=True)
        for title in table.titles:
            shown.add_column(Text(escape(title)), justify="right")
        for kind, group in groupby(table.lines, key=attrgetter("kind")):
            style = {"model": "bold", "difference": ""}.get(kind, "dim")
            for line in group:
                shown.add_row(
                    *(Text(escape(text), style=style) for text in [line.name, *line.texts])
                )
            shown.add_section()
        shown_tables.append(shown)
    note = NOTE if intervals else _NARROW_NOTE
    shown_tables[-1].caption = Text(escape(note.format(baseline=comparison.baseline)), "dim")
    shown_tables[-1].caption_justify = "left"
    return shown_tables
