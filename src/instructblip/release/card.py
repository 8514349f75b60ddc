"""The model card: what a model is, what it was tuned on and how, and its figures."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from instructblip.core.version import __version__
from instructblip.data.sources import SOURCES
from instructblip.evaluation.result import (
    Result,
    describe_how,
    summarise,
)

CARD = """---
library_name: transformers
pipeline_tag: image-text-to-text
tags: [instructblip, image-text-to-text]
---

# {name}

{kind}, written by instructblip {version}. Load it with `transformers.{reader}.from_pretrained`, or
with `instructblip.load("{name}")`.

| part | parameters |
|---|---|
{parameters}

## Data

{data}

## Figures

{figures}

## Recipe

{recipe}
"""


def card(
    name: str,
    reader: str,
    parts: Mapping[str, int],
    recipe: str | None = None,
    results: Sequence[Result] = (),
) -> str:
    """The ``README.md`` of a model directory; what is not known is said to be unknown.

    Args:
        name: of the model, as its directory's.
        reader: transformers' class that loads it.
        parts: parameters by part of the model.
        recipe: the YAML that it was tuned with. Folders of this machine stay out of the card.
        results: what ``evaluate`` found, one for each benchmark, with the pictures.

    Raises ValueError for a blind control and for two results of one benchmark.
    """
    for result in results:
        if result.blind:
            raise ValueError(f"{result.benchmark}: a blind control, not what the model can do")
    repeated = [name for name, count in Counter(r.benchmark for r in results).items() if count > 1]
    if repeated:
        raise ValueError(f"two results of {', '.join(repeated)}: give one folder for each")
    settings = yaml.safe_load(recipe) if recipe else None
    return CARD.format(
        name=name,
        kind="A BLIP-2" if reader.startswith("Blip2") else "An InstructBLIP",
        version=__version__,
        reader=reader,
        parameters="\n".join(f"| {part} | {count:,} |" for part, count in parts.items()),
        data=_data(settings["data"]["sets"]) if settings else "Not known.",
        figures=_figures(results) if results else "Not evaluated.",
        recipe=f"```yaml\n{_recipe(settings)}\n```" if settings else "Not known.",
    )


def _data(sets: Mapping[str, dict[str, Any]]) -> str:
    lines = ["| set | weight | terms |", "|---|---|---|"]
    for name, entry in sets.items():
        known = SOURCES.get(entry.get("source") or name)
        terms = known.licence if known else "those of its owner"
        lines.append(f"| {name} | {entry.get('weight', 1.0):g} | {terms} |")
    return "\n".join(lines)


def _recipe(settings: Any) -> str:
    """The settings that say something: no empty ones, no folders."""

    def told(value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        inner = {k: told(v) for k, v in value.items() if k not in ("root", "prepared")}
        return {k: v for k, v in inner.items() if v not in (None, {}, [])}

    return yaml.safe_dump(told(settings), sort_keys=False).strip()


def _figures(results: Sequence[Result]) -> str:
    """Each figure with its 95 % bootstrap interval, how many samples, and how they were asked."""
    lines = ["| benchmark | figure, 0 to 100 | samples | how |", "|---|---|---|---|"]
    for result in results:
        bounds, asked = result.interval, f"{result.n:,} of {result.settings['of']:,}"
        figure = "not defined: one class only"
        if bounds is not None:
            figure = f"{result.value:.1f} [{bounds.low:.1f}, {bounds.high:.1f}]"
        how = describe_how(result.how).replace("|", "\\|").replace("\n", " ")
        lines.append(f"| {result.benchmark} | {figure} | {asked} | {how} |")
    for role, mean in summarise([r for r in results if r.value is not None]).items():
        low, high = mean.interval.low, mean.interval.high
        sets = f"{len(mean.datasets)} set{'s' if len(mean.datasets) > 1 else ''}"
        name = f"mean, {role.replace('_', '-')}"
        lines.append(f"| {name} | {mean.value:.1f} [{low:.1f}, {high:.1f}] | {sets} | |")
    return "\n".join(lines)
