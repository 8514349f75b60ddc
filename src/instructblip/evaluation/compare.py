"""Several models on the same benchmarks: one table, four ways to write it.

Differences are paired: both models answered the same samples, the bootstrap draws the same ones
for both, and only sets that all models have enter the means.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from instructblip.evaluation.bootstrap import (
    Difference,
    Floats,
    difference,
    interval,
    mean_over_sets,
)
from instructblip.evaluation.result import Result

if TYPE_CHECKING:
    from rich.table import Table

ROLES = {"held_in": "held-in", "held_out": "held-out", "finetuned": "fine-tuned"}
UNSEEN = "†"


@dataclass(frozen=True, slots=True)
class Cell:
    """A figure and its 95 % interval; all None where the metric is not defined."""

    value: float | None
    low: float | None
    high: float | None
    n: int


@dataclass(frozen=True, slots=True)
class Row:
    """One benchmark, or the mean over one role, for all models that have it.

    ``differences`` are those to the baseline, for every other model.
    """

    name: str
    title: str
    role: str
    metric: str
    unseen_type: bool
    cells: dict[str, Cell]
    differences: dict[str, Difference]


@dataclass(frozen=True, slots=True)
class Comparison:
    """``rows`` are benchmarks, held-in before held-out; ``means`` one row per role."""

    models: tuple[str, ...]
    baseline: str
    rows: tuple[Row, ...]
    means: tuple[Row, ...]


def compare(models: Mapping[str, Sequence[Result]], baseline: str | None = None) -> Comparison:
    """Put the results of ``models`` side by side, each held to ``baseline`` (the first).

    Raises ValueError when two models did not answer the same samples of a benchmark under the same
    settings: their difference would mean nothing.
    """
    if not models:
        raise ValueError("nothing to compare: no model")
    base = next(iter(models)) if baseline is None else baseline
    if base not in models:
        raise ValueError(f"baseline {base!r} is none of the models: {', '.join(models)}")
    found = {model: {r.benchmark: r for r in results} for model, results in models.items()}
    names: dict[str, Result] = {}
    for results in models.values():
        for result in results:
            _check_pair(names.setdefault(result.benchmark, result), result)
    ordered = sorted(names.values(), key=lambda r: list(ROLES).index(r.role))
    drawn = {
        (model, name): result.resampled()
        for model, own in found.items()
        for name, result in own.items()
        if result.value is not None
    }
    rows = tuple(_row(result, found, drawn, base) for result in ordered)
    means = tuple(
        mean
        for role in ROLES
        if (mean := _mean_row([row for row in rows if row.role == role], role, found, drawn, base))
    )
    return Comparison(tuple(models), base, rows, means)


def _check_pair(first: Result, second: Result) -> None:
    if first.settings["benchmark"] != second.settings["benchmark"]:
        raise ValueError(
            f"{first.benchmark}: the models were evaluated with different prompts, decodings or "
            "scorers; evaluate them alike"
        )
    if first.tokenizer != second.tokenizer:
        raise ValueError(
            f"{first.benchmark}: scored with the tokenizers {first.tokenizer} and "
            f"{second.tokenizer}; use one"
        )
    if [p["id"] for p in first.predictions] != [p["id"] for p in second.predictions]:
        raise ValueError(
            f"{first.benchmark}: the models did not answer the same samples ({first.n} and "
            f"{second.n}); evaluate both with the same data and limit"
        )


Found = Mapping[str, Mapping[str, Result]]
Drawn = Mapping[tuple[str, str], Floats]


def _row(result: Result, found: Found, drawn: Drawn, base: str) -> Row:
    name = result.benchmark
    cells = {
        model: _cell(own[name].value, drawn.get((model, name)), own[name].n)
        for model, own in found.items()
        if name in own
    }
    return Row(
        name=name,
        title=result.title,
        role=result.role,
        metric=result.metric,
        unseen_type=result.unseen_type,
        cells=cells,
        differences=_differences(cells, {m: drawn.get((m, name)) for m in cells}, base),
    )


def _mean_row(rows: list[Row], role: str, found: Found, drawn: Drawn, base: str) -> Row | None:
    """The mean over the sets of one role for which all models have a figure."""
    shared = [
        row.name
        for row in rows
        if all(model in row.cells and row.cells[model].value is not None for model in found)
    ]
    if not shared:
        return None
    resampled = {m: mean_over_sets([drawn[m, name] for name in shared]) for m in found}
    cells = {}
    for model, own in found.items():
        value = sum(own[name].value or 0.0 for name in shared) / len(shared)
        cells[model] = _cell(value, resampled[model], len(shared))
    return Row(
        name=f"mean_{role}",
        title=f"mean of {len(shared)} {ROLES[role]} sets",
        role=role,
        metric="mean",
        unseen_type=False,
        cells=cells,
        differences=_differences(cells, dict(resampled), base),
    )


def _cell(value: float | None, resampled: Floats | None, n: int) -> Cell:
    if value is None or resampled is None:
        return Cell(None, None, None, n)
    bounds = interval(resampled)
    return Cell(value, bounds.low, bounds.high, n)


def _differences(
    cells: Mapping[str, Cell], resampled: Mapping[str, Floats | None], base: str
) -> dict[str, Difference]:
    found = {}
    ours = cells.get(base)
    for model, cell in cells.items():
        if model == base or ours is None or cell.value is None or ours.value is None:
            continue
        a, b = resampled[model], resampled[base]
        assert a is not None
        assert b is not None
        found[model] = difference(cell.value - ours.value, a, b)
    return found


# --- four ways to write it ---------------------------------------------------------------------


def to_json(comparison: Comparison) -> dict[str, Any]:
    """Everything, as plain values; ``datasets`` by benchmark, ``means`` by role."""

    def plain(row: Row) -> dict[str, Any]:
        return {
            "title": row.title,
            "role": row.role,
            "metric": row.metric,
            "unseen_type": row.unseen_type,
            "models": {
                model: {"value": c.value, "interval_95": [c.low, c.high], "n": c.n}
                for model, c in row.cells.items()
            },
            "differences": {
                model: {"value": d.value, "interval_95": [d.low, d.high], "p": d.p}
                for model, d in row.differences.items()
            },
        }

    return {
        "models": list(comparison.models),
        "baseline": comparison.baseline,
        "datasets": {row.name: plain(row) for row in comparison.rows},
        "means": {row.role: plain(row) for row in comparison.means},
    }


def _others(comparison: Comparison) -> list[str]:
    return [model for model in comparison.models if model != comparison.baseline]


def _header(comparison: Comparison) -> list[str]:
    return ["data set", "metric", *comparison.models, *(f"Δ {m}" for m in _others(comparison))]


def _texts(comparison: Comparison, row: Row, intervals: bool = True) -> list[str]:
    """The cells of one line as plain text."""
    title = f"{row.title} {UNSEEN}" if row.unseen_type else row.title
    figures = [_figure(row.cells.get(model), intervals) for model in comparison.models]
    deltas = [_delta(row.differences.get(model), intervals) for model in _others(comparison)]
    return [title, row.metric, *figures, *deltas]


def _figure(cell: Cell | None, intervals: bool) -> str:
    if cell is None or cell.value is None:
        return "–"
    bounds = f" [{cell.low:.1f}, {cell.high:.1f}]" if intervals else ""
    return f"{cell.value:.1f}{bounds}"


def _delta(found: Difference | None, intervals: bool) -> str:
    if found is None:
        return ""
    bounds = f" [{found.low:+.1f}, {found.high:+.1f}]" if intervals else ""
    return f"{found.value:+.1f}{bounds}{_stars(found.p)}"


def _stars(p: float) -> str:
    """* for p < 0.05, ** for p < 0.01."""
    return "**" if p < 0.01 else "*" if p < 0.05 else ""


NOTE = (
    f"Brackets: 95 % bootstrap interval. Δ: difference to the baseline on the same samples, paired "
    f"bootstrap, * p < 0.05, ** p < 0.01. {UNSEEN} task type never seen in tuning."
)


def _lines(comparison: Comparison) -> list[tuple[str, list[Row]]]:
    """(role, its benchmarks and its mean), roles without rows left out."""
    return [
        (role, rows + [mean for mean in comparison.means if mean.role == role])
        for role in ROLES
        if (rows := [row for row in comparison.rows if row.role == role])
    ]


def to_markdown(comparison: Comparison) -> str:
    """A table for a README; means in bold."""
    header = _header(comparison)
    lines = [_markdown_line(header), "|---|---|" + "---:|" * (len(header) - 2)]
    for role, rows in _lines(comparison):
        lines.append(_markdown_line([f"*{ROLES[role]}*", *[""] * (len(header) - 1)]))
        for row in rows:
            texts = [_escape_markdown(text) for text in _texts(comparison, row)]
            bold = row.metric == "mean"
            lines.append(_markdown_line([f"**{t}**" if bold and t else t for t in texts]))
    return "\n".join([*lines, "", _escape_markdown(NOTE), ""])


def _markdown_line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


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


def to_latex(comparison: Comparison) -> str:
    """A ``tabular`` for the package booktabs."""
    header = _header(comparison)
    lines = [rf"\begin{{tabular}}{{ll{'r' * (len(header) - 2)}}}", r"\toprule"]
    lines.append(" & ".join(map(_escape_latex, header)) + r" \\")
    for role, rows in _lines(comparison):
        lines += [r"\midrule", rf"\multicolumn{{{len(header)}}}{{l}}{{\emph{{{ROLES[role]}}}}} \\"]
        for row in rows:
            texts = map(_escape_latex, _texts(comparison, row))
            if row.metric == "mean":
                texts = (rf"\textbf{{{text}}}" if text else "" for text in texts)
            lines.append(" & ".join(texts) + r" \\")
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", f"% {NOTE}", ""])


def to_rich(comparison: Comparison, intervals: bool = False) -> "Table":
    """A table for the terminal, ``rich.print(to_rich(comparison))``; narrow without intervals."""
    from rich.table import Table
    from rich.text import Text

    note = NOTE if intervals else NOTE.split(". ", 1)[1]
    table = Table(caption=note, caption_justify="left")
    for place, name in enumerate(_header(comparison)):
        table.add_column(Text(name), justify="left" if place < 2 else "right")
    for role, rows in _lines(comparison):
        table.add_row(Text(ROLES[role], style="italic"))
        for row in rows:
            bold = row.metric == "mean"
            cells = [
                Text(t, style="bold" if bold else "") for t in _texts(comparison, row, intervals)
            ]
            table.add_row(*cells, end_section=bold)
    return table
