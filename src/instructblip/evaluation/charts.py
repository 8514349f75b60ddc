"""Geometry of the report's line charts: numbers in, coordinates and ticks out. No drawing here."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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


def training_charts(metrics: Path, name: str) -> list[Chart]:
    """Training loss and validation of one run, from its metrics.jsonl."""
    lines = read_metrics(metrics)
    loss = [(line["step"], line["loss"]) for line in lines if _is_number(line.get("loss"))]
    checks: dict[str, list[tuple[float, float]]] = {}
    for line in lines:
        for label, value in (line.get("validation") or {}).items():
            if _is_number(value):
                checks.setdefault(label, []).append((line["step"], value))
    titles = {f"{name}: loss per response token": {"training": loss}, f"{name}: validation": checks}
    charts = (line_chart(title, series) for title, series in titles.items())
    return [chart for chart in charts if chart is not None]


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
