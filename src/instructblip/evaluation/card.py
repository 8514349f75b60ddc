"""The model card: what a model is, what it was tuned on and how, and its figures."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from instructblip import __version__
from instructblip.data.sources import SOURCES
from instructblip.evaluation.result import Result, summarise

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


def write_card(
    directory: Path,
    reader: str,
    parts: Mapping[str, int],
    recipe: str | None = None,
    results: Sequence[Result] = (),
) -> Path:
    """Write ``README.md`` into a model directory; what is not known is said to be unknown.

    Args:
        directory: its name is the model's.
        reader: transformers' class that loads it.
        parts: parameters by part of the model.
        recipe: the YAML that it was tuned with. Folders of this machine stay out of the card.
        results: what ``evaluate`` found.
    """
    settings = yaml.safe_load(recipe) if recipe else None
    text = CARD.format(
        name=directory.name,
        kind="A BLIP-2" if reader.startswith("Blip2") else "An InstructBLIP",
        version=__version__,
        reader=reader,
        parameters="\n".join(f"| {part} | {count:,} |" for part, count in parts.items()),
        data=_data(settings["data"]["sets"]) if settings else "Not known.",
        figures=_figures(results) if results else "Not evaluated.",
        recipe=f"```yaml\n{_recipe(settings)}\n```" if settings else "Not known.",
    )
    file = directory / "README.md"
    file.write_text(text, encoding="utf-8")
    return file


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
    lines = ["| benchmark | figure, 0 to 100 |", "|---|---|"]
    for result in results:
        value = "-" if result.value is None else f"{result.value:.1f}"
        lines.append(f"| {result.benchmark} | {value} |")
    for role, mean in summarise(results).items():
        value = "-" if mean.value is None else f"{mean.value:.1f}"
        lines.append(f"| mean, {role.replace('_', '-')} | {value} |")
    return "\n".join(lines)
