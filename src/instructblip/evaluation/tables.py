"""A comparison written in four ways, shaped like table 1 of the paper: models down, sets across.

One table for each role (held-in, held-out, fine-tuned). First the published figures of the same
sets, then ours with their intervals, then the differences to the baseline with a paired test. What
each set was measured with follows the tables.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from instructblip.evaluation.bootstrap import Difference
from instructblip.evaluation.compare import (
    ROLES,
    Cell,
    Comparison,
    Row,
)
from instructblip.evaluation.published import PUBLISHED
from instructblip.evaluation.result import describe_how

if TYPE_CHECKING:
    from rich.table import Table

UNSEEN = "†"
NOTE = (
    "Brackets: 95 % bootstrap interval. Δ: difference to {baseline} on the same samples, paired "
    f"bootstrap, * p < 0.05, ** p < 0.01. {UNSEEN}: task type never seen in tuning. "
    "(paper): published figures; no mean, since not all have every set."
)
_NARROW_NOTE = NOTE.split(". ", 1)[1]


@dataclass(frozen=True, slots=True)
class Line:
    """One line of a table: a model's figures, or its differences, by column."""

    name: str
    kind: str  # "published", "model" or "difference"
    texts: list[str]


@dataclass(frozen=True, slots=True)
class PaperTable:
    """All sets of one role: ``titles`` and ``metrics`` of its columns, and its lines."""

    role: str
    titles: list[str]
    metrics: list[str]
    lines: list[Line]


def paper_tables(comparison: Comparison, intervals: bool = True) -> list[PaperTable]:
    """The tables of the roles that have sets."""
    tables = []
    for role, title in ROLES.items():
        rows = [row for row in comparison.rows if row.role == role]
        if not rows:
            continue
        columns = rows + [mean for mean in comparison.means if mean.role == role]
        titles = [f"{row.title} {UNSEEN}" if row.unseen_type else row.title for row in columns]
        metrics = [row.metric for row in columns]
        tables.append(PaperTable(title, titles, metrics, _lines(comparison, columns, intervals)))
    return tables


def _lines(comparison: Comparison, columns: Sequence[Row], intervals: bool) -> list[Line]:
    lines = [
        Line(f"{model} (paper)", "published", [_plain(figures, row) for row in columns])
        for model, figures in PUBLISHED.items()
        if any(row.name in figures for row in columns)
    ]
    for model in comparison.models:
        texts = [_figure(row.cells.get(model), intervals) for row in columns]
        lines.append(Line(model, "model", texts))
    for model in comparison.models:
        if model != comparison.baseline:
            texts = [_delta(row.differences.get(model), intervals) for row in columns]
            lines.append(Line(f"Δ {model}", "difference", texts))
    return lines


def _plain(figures: Mapping[str, float], row: Row) -> str:
    return f"{figures[row.name]:.1f}" if row.name in figures else "–"


def _figure(cell: Cell | None, intervals: bool) -> str:
    if cell is None or cell.value is None:
        return "–"
    bounds = f" [{cell.low:.1f}, {cell.high:.1f}]" if intervals else ""
    return f"{cell.value:.1f}{bounds}"


def _delta(found: Difference | None, intervals: bool) -> str:
    if found is None:
        return ""
    bounds = f" [{found.low:+.1f}, {found.high:+.1f}]" if intervals else ""
    stars = "**" if found.p < 0.01 else "*" if found.p < 0.05 else ""
    return f"{found.value:+.1f}{bounds}{stars}"


def measured_with(comparison: Comparison) -> list[str]:
    """One line a set: what its figures depend on."""
    lines = []
    for row in comparison.rows:
        assert row.how is not None
        n = next(iter(row.cells.values())).n
        lines.append(f"{row.title}: {row.name}, n {n}; {describe_how(row.how)}")
    return lines


def to_json(comparison: Comparison) -> dict[str, Any]:
    """Everything, as plain values; ``datasets`` by benchmark, ``means`` by role."""

    def plain(row: Row) -> dict[str, Any]:
        published = {m: f[row.name] for m, f in PUBLISHED.items() if row.name in f}
        return {
            "title": row.title,
            "role": row.role,
            "metric": row.metric,
            "unseen_type": row.unseen_type,
            "how": row.how,
            "models": {
                model: {"value": c.value, "interval_95": [c.low, c.high], "n": c.n}
                for model, c in row.cells.items()
            },
            "differences": {
                model: {"value": d.value, "interval_95": [d.low, d.high], "p": d.p}
                for model, d in row.differences.items()
            },
            "published": published,
        }

    return {
        "models": list(comparison.models),
        "baseline": comparison.baseline,
        "datasets": {row.name: plain(row) for row in comparison.rows},
        "means": {row.role: plain(row) for row in comparison.means},
    }


def to_markdown(comparison: Comparison) -> str:
    """Tables for a README."""
    parts = []
    for table in paper_tables(comparison):
        lines = [_markdown_line(_escaped([table.role, *table.titles]))]
        lines.append("|---|" + "---:|" * len(table.titles))
        lines.append(_markdown_line(["*metric*", *(f"*{m}*" for m in _escaped(table.metrics))]))
        for line in table.lines:
            name, *texts = _escaped([line.name, *line.texts])
            lines.append(_markdown_line([f"**{name}**" if line.kind == "model" else name, *texts]))
        parts.append("\n".join(lines))
    note = _escape_markdown(NOTE.format(baseline=comparison.baseline))
    listed = "\n".join(f"- {_escape_markdown(line)}" for line in measured_with(comparison))
    return "\n\n".join([*parts, note, listed]) + "\n"


def _markdown_line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _escaped(texts: Sequence[str]) -> list[str]:
    return [_escape_markdown(text) for text in texts]


def _escape_markdown(text: str) -> str:
    for character in ("\\", "|", "*", "_", "<", "`"):
        text = text.replace(character, "\\" + character)
    return text.replace("\n", " ")


_LATEX = {
    "\\": r"\textbackslash{}",
    "&": r"\&",
    "%": r"\%",
    "$": r"\$",
    "#": r"\#",
    "_": r"\_",
    "{": r"\{",
    "}": r"\}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "†": r"$^\dagger$",
    "Δ": r"$\Delta$",
    "–": "--",
}


def _escape_latex(text: str) -> str:
    return "".join(_LATEX.get(character, character) for character in text)


def _latex_line(cells: Sequence[str]) -> str:
    return " & ".join(map(_escape_latex, cells)) + r" \\"


def to_latex(comparison: Comparison) -> str:
    """A ``tabular`` for each role, for the package booktabs."""
    parts = []
    for table in paper_tables(comparison):
        lines = [rf"\begin{{tabular}}{{l{'r' * len(table.titles)}}}", r"\toprule"]
        lines += [_latex_line([table.role, *table.titles]), _latex_line(["", *table.metrics])]
        kind = ""
        for line in table.lines:
            if line.kind != kind:
                lines.append(r"\midrule")
            kind = line.kind
            lines.append(_latex_line([line.name, *line.texts]))
        parts.append("\n".join([*lines, r"\bottomrule", r"\end{tabular}"]))
    notes = [NOTE.format(baseline=comparison.baseline), *measured_with(comparison)]
    return "\n\n".join([*parts, "\n".join(f"% {note}" for note in notes), ""])


def to_rich(comparison: Comparison, intervals: bool = False) -> "list[Table]":
    """Tables for the terminal; narrow without intervals, and without the metrics' long names."""
    from rich.table import Table
    from rich.text import Text

    found = []
    for table in paper_tables(comparison, intervals):
        shown = Table(title=table.role, title_justify="left")
        shown.add_column(Text("model"), no_wrap=True)
        for title in table.titles:
            shown.add_column(Text(title), justify="right")
        for line, following in zip(table.lines, [*table.lines[1:], None], strict=True):
            style = {"model": "bold", "published": "dim"}.get(line.kind, "")
            cells = [Text(text, style=style) for text in [line.name, *line.texts]]
            ends = following is not None and following.kind != line.kind
            shown.add_row(*cells, end_section=ends)
        found.append(shown)
    note = NOTE if intervals else _NARROW_NOTE
    found[-1].caption = note.format(baseline=comparison.baseline)
    found[-1].caption_justify = "left"
    return found
