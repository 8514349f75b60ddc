"""report.html: one file that opens without a network and without a server.

It contains everything: tables, charts, images, style and a few lines of script. A content security
policy forbids any request. The template engine escapes the texts of data sets and models, and none
is put into script or style. First the page, then its gallery of samples, then the geometry of its
charts.
"""

import hashlib
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from instructblip.core.drawings import read_drawings
from instructblip.core.files import write_text
from instructblip.core.pages import data_url, page_template
from instructblip.data.reading.images import load_image
from instructblip.evaluation.benchmarks import BENCHMARKS
from instructblip.evaluation.bootstrap import Interval, interval, resample
from instructblip.evaluation.calibration import calibrated_on
from instructblip.evaluation.classes import class_table
from instructblip.evaluation.compare import ROLES, Comparison, compare
from instructblip.evaluation.confidence import (
    aurc,
    ece,
    ece_of,
    reliability,
    selective_accuracies,
    selective_accuracy,
)
from instructblip.evaluation.result import Result
from instructblip.evaluation.scoring import CAPTION_METRICS, is_right
from instructblip.training.log import read_metrics


def write_report(
    path: Path | str,
    models: Mapping[str, Sequence[Result]],
    title: str = "InstructBLIP, evaluated",
    lead: str = "",
    baseline: str | None = None,
    curves: Mapping[str, Path] | None = None,
    facts: Mapping[str, str] | None = None,
    samples_per_set: int = 24,
    drawn: Path | None = None,
    image_roots: Sequence[Path] | None = None,
) -> Path:
    """Write the report of ``models`` to ``path``, whole or not at all.

    Args:
        models: results by the name to show. The report is about the last one that is no blind
            control.
        lead: a sentence or two under the title.
        baseline: name of the model that the others are compared with; the first by default.
        curves: name of a run -> its metrics.jsonl.
        facts: label -> value at the foot of the page (seconds, recipe, version, ...).
        samples_per_set: cards in the gallery per benchmark; 0 omits the gallery.
        image_roots: folders that images may come from, for results that others wrote; None for
            any.
        drawn: a folder of drawings (`core.drawings`) for a section of their own.
    """
    path = Path(path)
    if baseline is not None and baseline in models:
        models = {baseline: models[baseline], **models}  # first in tables, charts and gallery
    comparison = compare(models, baseline)
    blind = _blind(models)
    subject = next(
        (m for m in reversed(comparison.models) if m not in blind), comparison.models[-1]
    )
    asked: dict[str, Result] = {}
    for results in models.values():
        for result in results:
            asked.setdefault(result.benchmark, result)
    template = page_template(
        Path(__file__).with_name("report.html.j2"),
        figure=lambda value: "–" if value is None else f"{value:.1f}",
        signed=_signed,
        percent=lambda value: f"{100 * value:.0f} %",
        thumbnail=thumbnail,
    )
    text = template.render(
        title=title,
        lead=lead,
        comparison=comparison,
        roles=ROLES,
        subject=subject,
        blind=blind,
        colours={model: place for place, model in enumerate(comparison.models)},
        tiles=[row for row in comparison.means if subject in row.cells],
        scale=_scale(comparison),
        radars=_radars(comparison),
        classes=[
            table
            for result in models[subject]
            if result.settings["benchmark"]["role"] == "own"
            and result.metric not in CAPTION_METRICS
            and (table := class_table(result.title, result.predictions))
        ],
        trust=[t for r in models[subject] if (t := trust_of(r)) is not None],
        charts=[c for name, file in (curves or {}).items() for c in training_charts(file, name)],
        cards=make_cards(models, samples_per_set, image_roots) if samples_per_set else [],
        asked=asked.values(),
        drawn=read_drawings(drawn) if drawn else [],
        drawn_folder=drawn,
        facts=facts or {},
    )
    write_text(path, text)
    return path


def _blind(models: Mapping[str, Sequence[Result]]) -> set[str]:
    """The models that are blind controls."""
    return {model for model, results in models.items() if any(r.blind for r in results)}


def _radars(comparison: Comparison) -> "list[Radar]":
    """One chart per role, over the sets for which every model has a score."""
    charts = []
    for role, name in ROLES.items():
        shared: dict[str, list[float]] = {}
        for row in comparison.rows:
            values = [cell.value for cell in row.cells.values() if cell.value is not None]
            if row.role == role and len(values) == len(comparison.models):
                shared[row.title] = values
        charts.append(radar_chart(name, shared))
    return [chart for chart in charts if chart is not None]


def _scale(comparison: Comparison) -> float:
    """The right end of the bars: 100, or more where a CIDEr exceeds it."""
    highs = [c.high for row in comparison.rows for c in row.cells.values() if c.high is not None]
    return max([100.0, *highs])


def _signed(value: float) -> str:
    """One decimal with its sign; what rounds to zero has none."""
    return f"{value:+.1f}".replace("-", "−") if round(value, 1) else "0.0"


THUMBNAIL = 288
MAX_FRAMES = 4
MAX_CANDIDATES = 5


class Option(NamedTuple):
    """A ranked candidate; ``probability`` among the candidates of its sample."""

    text: str
    probability: float
    chosen: bool
    expected: bool


class CardAnswer(NamedTuple):
    """The answer of one model. ``options`` are the most probable candidates, if it ranked."""

    model: str
    prediction: Mapping[str, Any]
    right: bool
    options: list[Option]


@dataclass(frozen=True, slots=True)
class Card:
    """One sample. ``images`` are data URLs, None for an image that could not be read.

    ``change`` compares the last model with the baseline, which is the first one: gained, lost or
    same; None where the baseline has no answer or is the last model itself.
    """

    benchmark: str
    title: str
    id: str
    images: tuple[str | None, ...]
    prompt: str
    references: tuple[tuple[str, int], ...]
    answers: tuple[CardAnswer, ...]
    change: str | None

    @property
    def right(self) -> bool:
        """Whether the last model, which the report is about, is right."""
        return self.answers[-1].right


def make_cards(
    models: Mapping[str, Sequence[Result]],
    per_set: int,
    image_roots: Sequence[Path] | None = None,
) -> list[Card]:
    """Return up to ``per_set`` samples of each benchmark, half of them wrong if there are as many,
    with images from below ``image_roots``, or from anywhere for None.

    Blind controls are left out, since they saw other images.
    """
    blind = _blind(models)
    seeing = {
        model: {r.benchmark: r for r in results}
        for model, results in models.items()
        if model not in blind
    }
    if not seeing:
        return []
    baseline = next(iter(models))
    cards = []
    for name, result in next(reversed(seeing.values())).items():
        by_model = {model: results[name] for model, results in seeing.items() if name in results}
        for index in _choose(result, per_set):
            card = _card(result, index, by_model, baseline, is_shown(result, image_roots))
            cards.append(card)
    return cards


def _choose(result: Result, count: int) -> list[int]:
    """Indices of samples, half right and half wrong if possible, the same ones every time."""

    hashes = [hashlib.sha256(str(p["id"]).encode()).hexdigest() for p in result.predictions]
    order = sorted(range(result.n), key=hashes.__getitem__)
    marks = [is_right(prediction, result.metric) for prediction in result.predictions]
    right = [i for i in order if marks[i]]
    wrong = [i for i in order if not marks[i]]
    half = count // 2
    few_wrong = min(len(wrong), max(half, count - len(right)))
    return sorted(right[: count - few_wrong] + wrong[:few_wrong])


def is_shown(result: Result, image_roots: Sequence[Path] | None) -> bool:
    """Whether the images of a result are below one of these folders, or none is given."""
    place = Path(result.image_root).resolve()
    return image_roots is None or any(place.is_relative_to(r.resolve()) for r in image_roots)


def _card(
    result: Result, index: int, by_model: Mapping[str, Result], baseline: str, shown: bool
) -> Card:
    sample = result.predictions[index]
    answers = tuple(
        _answer(model, one.predictions[index], result.metric) for model, one in by_model.items()
    )
    change = None
    if answers[0].model == baseline and len(answers) > 1:
        before, after = answers[0].right, answers[-1].right
        change = "same" if before == after else "gained" if after else "lost"
    names = sample["images"]
    if len(names) > MAX_FRAMES:
        names = [names[i * len(names) // MAX_FRAMES] for i in range(MAX_FRAMES)]
    return Card(
        benchmark=result.benchmark,
        title=result.title,
        id=str(sample["id"]),
        images=tuple(
            _thumbnail_or_none(name, Path(result.image_root)) if shown else None for name in names
        ),
        prompt=sample["prompt"],
        references=tuple(Counter(sample["answers"]).most_common()),
        answers=answers,
        change=change,
    )


def _answer(model: str, prediction: Mapping[str, Any], metric: str) -> CardAnswer:
    options: list[Option] = []
    if "candidates" in prediction:
        ranked = zip(prediction["candidates"], prediction["probabilities"], strict=True)
        options = [
            Option(text, p, text == prediction["prediction"], text in prediction["answers"])
            for text, p in sorted(ranked, key=lambda pair: -pair[1])[:MAX_CANDIDATES]
        ]
    return CardAnswer(model, prediction, is_right(prediction, metric), options)


def _thumbnail_or_none(name: str, root: Path) -> str | None:
    """None without the image: results may be on another machine, and their scores still show."""
    try:
        return thumbnail(name, root)
    except (OSError, ValueError):
        return None


def thumbnail(name: str, root: Path) -> str:
    """Return an image as a data URL: a small one as PNG without loss, others as a small JPEG."""
    image = load_image(name, root)
    if max(image.size) <= THUMBNAIL // 2:
        return data_url(image, optimize=True)
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    return data_url(image, "JPEG", quality=82, optimize=True)


WIDTH, HEIGHT = 460, 250
LEFT, RIGHT, TOP, BOTTOM = 46, 12, 12, 30

Points = Sequence[tuple[int | float, int | float]]


class Curve(NamedTuple):
    """``points`` are those of an SVG polyline, ``end`` the last one; ``last`` is its value."""

    label: str
    points: str
    last: str
    end: tuple[float, float]


@dataclass(frozen=True, slots=True)
class Chart:
    """Curves with ticks as (position, label)."""

    title: str
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]
    lines: list[Curve]

    width = WIDTH
    height = HEIGHT
    left = LEFT
    right = WIDTH - RIGHT
    bottom = HEIGHT - BOTTOM


def line_chart(title: str, series: Mapping[str, Points]) -> Chart | None:
    """Return a chart of all series on common axes; None if no series has a finite point."""
    finite = {
        label: [(float(x), float(y)) for x, y in points if math.isfinite(x) and math.isfinite(y)]
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
    for label, points in finite.items():
        placed = [place(x, y) for x, y in _thin(points)]
        text = " ".join(f"{x},{y}" for x, y in placed)
        lines.append(Curve(label, text, _label(points[-1][1]), placed[-1]))
    return Chart(
        title,
        [(place(x, y_low)[0], _label(x)) for x in x_ticks],
        [(place(x_low, y)[1], _label(y)) for y in y_ticks],
        lines,
    )


class Spoke(NamedTuple):
    """One axis of a radar chart: its end, its label and the place of the label."""

    label: str
    best: str
    end: tuple[float, float]
    text: tuple[float, float]
    anchor: str


@dataclass(frozen=True, slots=True)
class Radar:
    """Models over data sets. An axis ends at the score of the best model.

    ``rings`` and ``webs``, one for each model, are the points of SVG polygons.
    """

    title: str
    spokes: list[Spoke]
    rings: list[str]
    webs: list[str]

    width = 600
    height = 370
    centre = (300, 185)
    radius = 132


def radar_chart(title: str, scores: Mapping[str, Sequence[int | float]]) -> Radar | None:
    """Return one axis per set, from 0 to the score of the best model; None for less than three.

    ``scores`` maps a set to the scores of the models.
    """
    if len(scores) < 3:
        return None
    best = {label: max(row) for label, row in scores.items()}

    def place(axis: int, share: float) -> tuple[float, float]:
        turn = 2 * math.pi * axis / len(scores)
        x, y = Radar.centre
        return (
            round(x + Radar.radius * share * math.sin(turn), 1),
            round(y - Radar.radius * share * math.cos(turn), 1),
        )

    def points(shares: Sequence[float]) -> str:
        return " ".join(f"{x},{y}" for x, y in map(place, range(len(scores)), shares))

    spokes = []
    for i, label in enumerate(scores):
        text = place(i, 1.1)
        aside = text[0] - Radar.centre[0]
        anchor = "middle" if abs(aside) < 12 else "start" if aside > 0 else "end"
        spokes.append(Spoke(label, f"{best[label]:.1f}", place(i, 1.0), text, anchor))
    webs = [
        points([max(0.0, s) / b if b > 0 else 0.0 for s, b in zip(row, best.values(), strict=True)])
        for row in zip(*scores.values(), strict=True)
    ]
    rings = [points([share] * len(scores)) for share in (0.25, 0.5, 0.75, 1.0)]
    return Radar(title, spokes, rings, webs)


def training_charts(metrics: Path, name: str) -> list[Chart]:
    """Return charts of one run: training loss, validation, its means over held-in and held-out."""
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
        curves = [
            points
            for name, points in checks.items()
            if name in BENCHMARKS and BENCHMARKS[name].role == role
        ]
        if curves:
            means[title] = [
                (column[0][0], sum(y for _, y in column) / len(column))
                for column in zip(*curves, strict=False)
            ]
    return means if len(means) > 1 else {}


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


class Trust(NamedTuple):
    """How far the confidences of one benchmark can be trusted: its expected calibration error and
    area under the risk-coverage curve with 95 % intervals, and the share of right answers among the
    70 % most confident, all in percent. ``fitted`` says that the confidences were fitted to these
    samples."""

    title: str
    n: int
    ece: float
    interval: Interval
    aurc: float
    selective: float
    accuracy: float
    fitted: bool
    charts: list[Chart]


def trust_of(result: Result) -> Trust | None:
    """The confidences of a result beside its answers; None where it has none."""
    rows = [p for p in result.predictions if "confidence" in p]
    if not rows or len(rows) < result.n:
        return None
    confidences = np.array([p["confidence"] for p in rows])
    right = np.array([float(is_right(p, result.metric)) for p in rows])
    bins = [(100 * b.confidence, 100 * b.accuracy) for b in reliability(confidences, right)]
    accuracies = 100 * selective_accuracies(confidences, right)
    given = 100 * np.arange(1, result.n + 1) / result.n
    charts = [
        line_chart(
            f"{result.title}: right answers, % by confidence, %",
            {"answers": bins, "as confident as right": [(0, 0), (100, 100)]},
        ),
        line_chart(
            f"{result.title}: wrong answers, % by share of the questions answered, %",
            {"the most confident first": list(zip(given, 100 - accuracies, strict=True))},
        ),
    ]
    resampled = resample(ece_of(confidences, right), result.groups or result.n)
    return Trust(
        title=result.title,
        n=result.n,
        ece=100 * ece(confidences, right),
        interval=interval(resampled),
        aurc=100 * aurc(confidences, right),
        selective=100 * selective_accuracy(confidences, right),
        accuracy=100 * float(right.mean()),
        fitted=calibrated_on(result),
        charts=[chart for chart in charts if chart is not None],
    )


def _axis(low: float, high: float, wanted: int = 5) -> tuple[list[float], tuple[float, float]]:
    """Round ticks, and the range from the first to the last: it includes ``low`` and ``high``."""
    if low == high:
        low, high = low - (abs(low) or 1) / 2, high + (abs(high) or 1) / 2
    raw = (high - low) / (wanted - 1)
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * k for k in (1, 2, 2.5, 5, 10) if power * k >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    ticks = [k * step for k in range(first, last + 1)]
    return ticks, (ticks[0], ticks[-1])


def _thin(points: Points, most: int = 400) -> Points:
    """At most ``most`` points, including the last."""
    if len(points) <= most:
        return points
    kept = [points[i * len(points) // most] for i in range(most)]
    return [*kept[:-1], points[-1]]


def _label(value: float) -> str:
    if value and abs(value) < 1e-3:
        return f"{value:.1e}"
    return f"{value:,.4g}" if abs(value) < 1000 else f"{value:,.0f}"
