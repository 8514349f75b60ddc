"""Geometry of the report's charts: numbers in, coordinates and ticks out. No drawing here."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from instructblip.evaluation.benchmarks import BENCHMARKS
from instructblip.evaluation.compare import ROLES
from instructblip.training.log import read_metrics

WIDTH, HEIGHT = 460, 250
LEFT, RIGHT, TOP, BOTTOM = 46, 12, 12, 30

Points = Sequence[tuple[float, float]]


@dataclass(frozen=True, slots=True)
class Line:
    """``points`` is ready for an SVG polyline; ``colour`` is an index into the palette."""

    label: str
    points: str
    colour: int
    last: str
    end: tuple[float, float]


@dataclass(frozen=True, slots=True)
class Chart:
    """Lines with ticks as (position, label)."""

    title: str
    x_label: str
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]
    lines: list[Line]

    width = WIDTH
    height = HEIGHT
    left = LEFT
    right = WIDTH - RIGHT
    bottom = HEIGHT - BOTTOM


def line_chart(title: str, series: Mapping[str, Points], x_label: str = "step") -> Chart | None:
    """A chart of all series on common axes; None if no series has a finite point."""
    finite = {
        label: [(x, y) for x, y in points if math.isfinite(x) and math.isfinite(y)]
        for label, points in series.items()
    }
    finite = {label: points for label, points in finite.items() if points}
    if not finite:
        return None
    xs = [x for points in finite.values() for x, _ in points]
    ys = [y for points in finite.values() for _, y in points]
    x_ticks, (x_low, x_high) = _axis(min(xs), max(xs))
    y_ticks, (y_low, y_high) = _axis(min(ys), max(ys))

    def place(x: float, y: float) -> tuple[float, float]:
        across = LEFT + (x - x_low) / (x_high - x_low) * (WIDTH - LEFT - RIGHT)
        down = HEIGHT - BOTTOM - (y - y_low) / (y_high - y_low) * (HEIGHT - TOP - BOTTOM)
        return round(across, 1), round(down, 1)

    lines = []
    for colour, (label, points) in enumerate(finite.items()):
        placed = [place(x, y) for x, y in _thin(points)]
        text = " ".join(f"{x},{y}" for x, y in placed)
        lines.append(Line(label, text, colour, _label(points[-1][1]), placed[-1]))
    return Chart(
        title,
        x_label,
        [(place(x, y_low)[0], _label(x)) for x in x_ticks],
        [(place(x_low, y)[1], _label(y)) for y in y_ticks],
        lines,
    )


@dataclass(frozen=True, slots=True)
class Spoke:
    """One axis of a radar chart: its end, and where its label stands."""

    label: str
    best: str
    end: tuple[float, float]
    text: tuple[float, float]
    anchor: str


@dataclass(frozen=True, slots=True)
class Web:
    """The figures of one model as the points of an SVG polygon."""

    label: str
    points: str
    colour: int


@dataclass(frozen=True, slots=True)
class Radar:
    """Models over data sets; the rim of an axis is the best of the models."""

    title: str
    spokes: list[Spoke]
    rings: list[str]
    webs: list[Web]

    width = 600
    height = 370
    centre = (300, 185)
    radius = 132


def radar_chart(
    title: str, labels: Sequence[str], models: Mapping[str, Sequence[float]]
) -> Radar | None:
    """One axis a set, from 0 in the middle to the best model's figure; None for less than three."""
    if len(labels) < 3 or not models:
        return None
    best = [max(figures[i] for figures in models.values()) for i in range(len(labels))]

    def place(axis: int, share: float) -> tuple[float, float]:
        turn = 2 * math.pi * axis / len(labels)
        x, y = Radar.centre
        return (
            round(x + Radar.radius * share * math.sin(turn), 1),
            round(y - Radar.radius * share * math.cos(turn), 1),
        )

    def points(shares: Sequence[float]) -> str:
        return " ".join(f"{x},{y}" for x, y in map(place, range(len(labels)), shares))

    spokes = []
    for i, label in enumerate(labels):
        text = place(i, 1.1)
        aside = text[0] - Radar.centre[0]
        anchor = "middle" if abs(aside) < 12 else "start" if aside > 0 else "end"
        spokes.append(Spoke(label, f"{best[i]:.1f}", place(i, 1), text, anchor))
    webs = [
        Web(
            model,
            points([max(0.0, f) / b if b > 0 else 0.0 for f, b in zip(own, best, strict=True)]),
            place_in_palette,
        )
        for place_in_palette, (model, own) in enumerate(models.items())
    ]
    rings = [points([share] * len(labels)) for share in (0.25, 0.5, 0.75, 1)]
    return Radar(title, spokes, rings, webs)


def training_charts(metrics: Path, name: str) -> list[Chart]:
    """Training loss, validation, and its means over held-in and held-out sets, of one run."""
    lines = read_metrics(metrics)
    loss = [(line["step"], line["loss"]) for line in lines if _is_number(line.get("loss"))]
    checks: dict[str, list[tuple[float, float]]] = {}
    for line in lines:
        for label, value in (line.get("validation") or {}).items():
            if _is_number(value):
                checks.setdefault(label, []).append((line["step"], value))
    titles = {
        f"{name}: loss per response token": {"training": loss},
        f"{name}: validation": checks,
        f"{name}: held-in and held-out": _role_means(checks),
    }
    charts = (line_chart(title, series) for title, series in titles.items())
    return [chart for chart in charts if chart is not None]


def _role_means(checks: Mapping[str, Points]) -> dict[str, Points]:
    """Mean of the held-in and of the held-out sets at each validation, where both were scored."""
    means: dict[str, Points] = {}
    for role, title in ROLES.items():
        own = [points for name, points in checks.items() if role_of(name) == role]
        if own:
            means[title] = [
                (column[0][0], sum(y for _, y in column) / len(column))
                for column in zip(*own, strict=False)
            ]
    return means if len(means) > 1 else {}


def role_of(benchmark: str) -> str | None:
    return BENCHMARKS[benchmark].role if benchmark in BENCHMARKS else None


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _axis(low: float, high: float, wanted: int = 5) -> tuple[list[float], tuple[float, float]]:
    """Round ticks, and the range they span: it holds ``low`` and ``high``."""
    if low == high:
        low, high = low - (abs(low) or 1) / 2, high + (abs(high) or 1) / 2
    raw = (high - low) / (wanted - 1)
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * k for k in (1, 2, 2.5, 5, 10) if power * k >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    ticks = [k * step for k in range(first, last + 1)]
    return ticks, (ticks[0], ticks[-1])


def _thin(points: Points, most: int = 400) -> Points:
    """At most ``most`` points, the last one kept."""
    if len(points) <= most:
        return points
    kept = [points[i * len(points) // most] for i in range(most)]
    return [*kept[:-1], points[-1]]


def _label(value: float) -> str:
    if value and abs(value) < 1e-3:
        return f"{value:.1e}"
    return f"{value:,.4g}" if abs(value) < 1000 else f"{value:,.0f}"
