"""report.html: one file that opens without a network and without a server.

Everything is inside: tables, charts, pictures, style and a few lines of script. A content security
policy in the page forbids any request. Texts of data sets and models are escaped by the template
engine; none is ever put into script or style.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template

from instructblip.core.files import write_text
from instructblip.evaluation.charts import (
    Radar,
    radar_chart,
    training_charts,
)
from instructblip.evaluation.compare import (
    ROLES,
    Comparison,
    Row,
    compare,
)
from instructblip.evaluation.gallery import make_cards, thumbnail
from instructblip.evaluation.result import Result

TEMPLATE = "report.html.j2"


@dataclass(frozen=True, slots=True)
class DrawnImage:
    """A generated image, the image it was drawn from (None without one), and the verdict."""

    prompt: str
    image: str
    source: str | None
    correct: bool


@dataclass(frozen=True, slots=True)
class DrawnSet:
    """Generated images of one kind of prompt. ``folder`` holds their files.

    ``figures``: objects, exact, place, colour and shape in percent, the number of pictures, and the
    seconds that one of them takes.
    """

    title: str
    folder: Path
    figures: Mapping[str, float]
    images: Sequence[DrawnImage]


def write_report(
    path: Path | str,
    models: Mapping[str, Sequence[Result]],
    title: str = "InstructBLIP, evaluated",
    lead: str = "",
    baseline: str | None = None,
    curves: Mapping[str, Path] | None = None,
    facts: Mapping[str, str] | None = None,
    samples_per_set: int = 24,
    drawn: Sequence[DrawnSet] = (),
) -> Path:
    """Write the report of ``models`` to ``path``, whole or not at all.

    Args:
        models: results by the name to show; the first is the baseline unless ``baseline`` says
            otherwise, the last that is no blind control is the one the report is about.
        lead: a sentence or two under the title.
        curves: name of a run -> its metrics.jsonl.
        facts: label -> value, for the foot of the page (seconds, recipe, version, ...).
        samples_per_set: cards in the gallery per benchmark; 0 leaves it out.
        drawn: generated images with the figures of each kind of prompt; a separate section.
    """
    path = Path(path)
    if baseline is not None and baseline in models:
        models = {baseline: models[baseline], **models}  # first in tables, charts and gallery
    comparison = compare(models, baseline)
    blind = _blind(models)
    subject = next(
        (m for m in reversed(comparison.models) if m not in blind), comparison.models[-1]
    )
    charts = [c for name, file in (curves or {}).items() for c in training_charts(Path(file), name)]
    text = _template().render(
        title=title,
        lead=lead,
        comparison=comparison,
        roles=ROLES,
        subject=subject,
        blind=blind,
        colours={model: place for place, model in enumerate(comparison.models)},
        tiles=_tiles(comparison, subject),
        scale=_scale(comparison),
        radars=_radars(comparison),
        charts=charts,
        cards=make_cards(models, samples_per_set) if samples_per_set else [],
        settings=_settings(models),
        drawn=[(each.title, each.figures, _drawn_cards(each)) for each in drawn],
        facts=dict(facts or {}),
    )
    write_text(path, text)
    return path


def _blind(models: Mapping[str, Sequence[Result]]) -> set[str]:
    """The models that are blind controls."""
    return {model for model, results in models.items() if any(result.blind for result in results)}


@dataclass(frozen=True, slots=True)
class Tile:
    """A headline figure: one role's mean of the subject, beside every other model's."""

    role: str
    row: Row


def _tiles(comparison: Comparison, subject: str) -> list[Tile]:
    return [Tile(ROLES[row.role], row) for row in comparison.means if subject in row.cells]


def _drawn_cards(drawn: DrawnSet) -> list[DrawnImage]:
    """The images of one kind of prompt, with data URLs in place of file names."""
    return [
        replace(
            each,
            image=thumbnail(each.image, drawn.folder),
            source=each.source and thumbnail(each.source, drawn.folder),
        )
        for each in drawn.images
    ]


def _radars(comparison: Comparison) -> list[Radar]:
    """One chart a role, over the sets for which every model has a figure."""
    charts = []
    for role, name in ROLES.items():
        rows = [row for row in comparison.rows if row.role == role]
        figures = {
            row.title: [cell.value for m in comparison.models if (cell := row.cells.get(m))]
            for row in rows
        }
        shared = {
            title: [value for value in values if value is not None]
            for title, values in figures.items()
            if len(values) == len(comparison.models) and None not in values
        }
        models = {
            model: [values[i] for values in shared.values()]
            for i, model in enumerate(comparison.models)
        }
        charts.append(radar_chart(name, list(shared), models))
    return [chart for chart in charts if chart is not None]


def _scale(comparison: Comparison) -> float:
    """The right end of the bars: 100, or more where a CIDEr exceeds it."""
    highs = [c.high for row in comparison.rows for c in row.cells.values() if c.high is not None]
    return max(100.0, *highs) if highs else 100.0


def _settings(models: Mapping[str, Sequence[Result]]) -> list[dict[str, Any]]:
    """How each benchmark was asked and scored."""
    found: dict[str, dict[str, Any]] = {}
    for results in models.values():
        for result in results:
            asked = result.settings["benchmark"]
            decoding = ", ".join(f"{k} {v}" for k, v in asked["decoding"].items())
            found.setdefault(
                result.benchmark,
                {
                    "name": result.benchmark,
                    "title": result.title,
                    "prompt": asked["prompt"],
                    "how": decoding or "highest log-likelihood of the candidates",
                    "metric": result.metric,
                    "tokenizer": result.tokenizer or "",
                    "n": result.n,
                    "split": f"{asked['source']} {asked['split']}",
                },
            )
    return list(found.values())


def _template() -> Template:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["figure"] = lambda value: "–" if value is None else f"{value:.1f}"
    environment.filters["signed"] = _signed
    environment.filters["percent"] = lambda value: f"{100 * value:.0f} %"
    return environment.get_template(TEMPLATE)


def _signed(value: float) -> str:
    """One digit with its sign; what rounds to nothing has none."""
    return f"{value:+.1f}".replace("-", "−") if round(value, 1) else "0.0"
