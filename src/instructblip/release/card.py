"""The model card: what a model is, what it was tuned on and how, and its scores."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from instructblip.core.version import __version__
from instructblip.data.sources import SOURCES
from instructblip.evaluation.compare import summarise
from instructblip.evaluation.result import Result, describe_how

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


def model_card(
    name: str,
    reader: str,
    parts: Mapping[str, int],
    recipe: Mapping[str, Any] | None = None,
    results: Sequence[Result] = (),
) -> str:
    """Return the ``README.md`` of a model directory, which says what is not known.

    Args:
        name: of the model and its directory.
        reader: class of transformers that loads it.
        parts: number of parameters by part of the model.
        recipe: what it was tuned with; None if unknown. Folders of this machine stay out.
        results: of ``evaluate``, one for each benchmark.

    Raises ValueError for a blind control and for two results of one benchmark.
    """
    for result in results:
        if result.blind:
            raise ValueError(f"{result.benchmark}: a blind control, not what the model can do")
    repeated = [name for name, count in Counter(r.benchmark for r in results).items() if count > 1]
    if repeated:
        raise ValueError(f"two results of {', '.join(repeated)}: give one folder for each")
    return CARD.format(
        name=name,
        kind="A BLIP-2" if reader.startswith("Blip2") else "An InstructBLIP",
        version=__version__,
        reader=reader,
        parameters="\n".join(f"| {part} | {count:,} |" for part, count in parts.items()),
        data=_data(recipe["data"]["sets"]) if recipe else "Not known.",
        figures=_scores(results) if results else "Not evaluated.",
        recipe=f"```yaml\n{_yaml(recipe)}\n```" if recipe else "Not known.",
    )


def _data(sets: Mapping[str, dict[str, Any]]) -> str:
    lines = ["| set | weight | terms |", "|---|---|---|"]
    for name, entry in sets.items():
        known = SOURCES.get(entry.get("source") or name)
        terms = known.licence if known else "those of its owner"
        lines.append(f"| {name} | {entry.get('weight', 1.0):g} | {terms} |")
    return "\n".join(lines)


def _yaml(recipe: Mapping[str, Any]) -> str:
    """The recipe without empty settings and without folders."""

    def clean(value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        inner = {k: clean(v) for k, v in value.items() if k not in ("root", "prepared")}
        return {k: v for k, v in inner.items() if v not in (None, {}, [])}

    return yaml.safe_dump(clean(recipe), sort_keys=False).strip()


def _scores(results: Sequence[Result]) -> str:
    """Each score with its 95 % bootstrap interval, the number of samples, prompt and decoding."""
    lines = ["| benchmark | figure, 0 to 100 | samples | how |", "|---|---|---|---|"]
    for result in results:
        bounds, asked = result.interval, f"{result.n:,} of {result.settings['of']:,}"
        score = "not defined: one class only"
        if bounds is not None:
            score = f"{result.value:.1f} [{bounds.low:.1f}, {bounds.high:.1f}]"
        how = describe_how(result.how).replace("|", "\\|").replace("\n", " ")
        lines.append(f"| {result.benchmark} | {score} | {asked} | {how} |")
    for role, mean in summarise([r for r in results if r.value is not None]).items():
        sets = f"{mean.n} set{'s' if mean.n > 1 else ''}"
        name = f"mean, {role.replace('_', '-')}"
        lines.append(f"| {name} | {mean.value:.1f} [{mean.low:.1f}, {mean.high:.1f}] | {sets} | |")
    return "\n".join(lines)
