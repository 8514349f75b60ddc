"""The model card: what a model is, what it was tuned on and how, and its figures."""

from collections.abc import Sequence
from pathlib import Path

from instructblip import __version__
from instructblip.evaluation.result import Result, summarise

CARD = """---
library_name: transformers
pipeline_tag: image-text-to-text
tags: [instructblip, image-text-to-text]
---

# {name}

{kind}, written by instructblip {version}. Load it with
`transformers.{reader}.from_pretrained`, or with
`instructblip.load("{name}")`.

{parameters}

## Figures

{figures}

## Recipe

{recipe}
"""


def write_card(
    directory: Path,
    name: str,
    aware: bool,
    parts: dict[str, int],
    recipe: str | None = None,
    results: Sequence[Result] = (),
) -> Path:
    """Write ``README.md`` into a model directory; what is not known is said to be unknown."""
    rows = [f"| {part} | {count:,} |" for part, count in parts.items()]
    table = "\n".join(["| part | parameters |", "|---|---|", *rows])
    text = CARD.format(
        name=name,
        kind="An InstructBLIP" if aware else "A BLIP-2",
        version=__version__,
        reader=("InstructBlip" if aware else "Blip2") + "ForConditionalGeneration",
        parameters=table,
        figures=_figures(results) if results else "Not evaluated.",
        recipe=f"```yaml\n{recipe.strip()}\n```" if recipe else "Not known.",
    )
    file = directory / "README.md"
    file.write_text(text, encoding="utf-8")
    return file


def _figures(results: Sequence[Result]) -> str:
    lines = ["| benchmark | figure, 0 to 100 |", "|---|---|"]
    for result in results:
        value = "-" if result.value is None else f"{result.value:.1f}"
        lines.append(f"| {result.benchmark} | {value} |")
    for role, mean in summarise(results).items():
        value = "-" if mean.value is None else f"{mean.value:.1f}"
        lines.append(f"| mean, {role.replace('_', '-')} | {value} |")
    return "\n".join(lines)
