"""A comparison as Markdown, LaTeX, JSON and for the terminal, shaped like table 1 of the paper.

Models are rows and sets are columns, with a table for each role (held-in, held-out, fine-tuned):
first the published scores of the same sets, then ours with their intervals, then the differences to
the baseline with a paired test. What each set was measured with follows the tables.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from instructblip.evaluation.bootstrap import Difference
from instructblip.evaluation.compare import ROLES, Cell, Comparison, Row
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


# The InstructBLIP paper (arXiv 2305.06500). Table 1 is zero-shot: CIDEr for NoCaps and Flickr30K,
# AUC for HatefulMemes, MRR for Visual Dialog, accuracy for the rest. Table 3 is fine-tuned on one
# set each; its A-OKVQA scores are those of the validation split.
_TABLE_1_SETS = ["nocaps", "flickr30k", "gqa", "vsr", "iconqa", "textvqa", "visual_dialog"]
_TABLE_1_SETS += ["hatefulmemes", "vizwiz", "scienceqa", "msvdqa", "msrvttqa", "ivqa"]
_TABLE_1 = """
Flamingo-3B             -     60.6  -    -    -    30.1 -    53.7 28.9 -    27.5 11.0 32.7
Flamingo-9B             -     61.5  -    -    -    31.8 -    57.0 28.8 -    30.2 13.7 35.2
Flamingo-80B            -     67.2  -    -    -    35.0 -    46.4 31.6 -    35.6 17.4 40.7
BLIP-2 FlanT5-XL        104.5 76.1  44.0 60.5 45.5 43.1 45.7 53.0 29.8 54.9 33.7 16.2 40.4
BLIP-2 FlanT5-XXL       98.4  73.7  44.6 68.2 45.4 44.1 46.9 52.0 29.4 64.5 34.4 17.4 45.8
BLIP-2 Vicuna-7B        107.5 74.9  38.6 50.0 39.7 40.1 44.9 50.6 25.3 53.8 18.3 9.2  27.5
BLIP-2 Vicuna-13B       103.9 71.6  41.0 50.9 40.6 42.5 45.1 53.7 19.6 61.0 20.3 10.3 23.5
InstructBLIP FlanT5-XL  119.9 84.5  48.4 64.8 50.0 46.6 46.6 56.6 32.7 70.4 43.4 25.0 53.1
InstructBLIP FlanT5-XXL 120.0 83.5  47.9 65.6 51.2 46.6 48.5 54.1 30.9 70.6 44.3 25.6 53.8
InstructBLIP Vicuna-7B  123.1 82.4  49.2 54.3 43.1 50.1 45.2 59.6 34.5 60.5 41.8 22.1 52.2
InstructBLIP Vicuna-13B 121.9 82.8  49.5 52.1 44.8 50.7 45.4 57.5 33.4 63.1 41.2 24.8 51.0
"""
_TABLE_3_SETS = ["finetuned_scienceqa", "finetuned_ocrvqa", "finetuned_okvqa"]
_TABLE_3_SETS += ["finetuned_aokvqa_direct", "finetuned_aokvqa"]
_TABLE_3 = """
BLIP-2 FlanT5-XXL       89.5 72.7 54.7 57.6 80.2
InstructBLIP FlanT5-XXL 90.7 73.3 55.5 57.1 81.0
BLIP-2 Vicuna-7B        77.3 69.1 59.3 60.0 72.1
InstructBLIP Vicuna-7B  79.5 72.8 62.1 64.0 75.7
"""


def _read(table: str, sets: list[str]) -> dict[str, dict[str, float]]:
    models = {}
    for line in table.strip().splitlines():
        words = line.split()
        model, figures = " ".join(words[: -len(sets)]), words[-len(sets) :]
        pairs = zip(sets, figures, strict=True)
        models[model] = {name: float(figure) for name, figure in pairs if figure != "-"}
    return models


PUBLISHED: Mapping[str, Mapping[str, float]] = {
    model: figures | _read(_TABLE_3, _TABLE_3_SETS).get(model, {})
    for model, figures in _read(_TABLE_1, _TABLE_1_SETS).items()
}
"""Model -> benchmark -> score, 0 to 100 (CIDEr may exceed it)."""


@dataclass(frozen=True, slots=True)
class Line:
    """One line of a table: the scores of a model, or its differences, by column."""

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
    """Return a table for each role that has sets."""
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


def _delta(change: Difference | None, intervals: bool) -> str:
    if change is None:
        return ""
    bounds = f" [{change.low:+.1f}, {change.high:+.1f}]" if intervals else ""
    stars = "**" if change.p < 0.01 else "*" if change.p < 0.05 else ""
    return f"{change.value:+.1f}{bounds}{stars}"


def measured_with(comparison: Comparison) -> list[str]:
    """Return one line per set: what its scores depend on."""
    lines = []
    for row in comparison.rows:
        assert row.how is not None
        n = next(iter(row.cells.values())).n
        lines.append(f"{row.title}: {row.name}, n {n}; {describe_how(row.how)}")
    return lines


def to_json(comparison: Comparison) -> dict[str, Any]:
    """Return everything as plain values; ``datasets`` by benchmark, ``means`` by role."""

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
    """Return tables for a README."""
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
    """Return a ``tabular`` for each role; it needs the package booktabs."""
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
    """Return tables for the terminal, narrow: no metrics, and intervals only on request."""
    from rich.table import Table
    from rich.text import Text

    shown_tables = []
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
        shown_tables.append(shown)
    note = NOTE if intervals else _NARROW_NOTE
    shown_tables[-1].caption = note.format(baseline=comparison.baseline)
    shown_tables[-1].caption_justify = "left"
    return shown_tables
