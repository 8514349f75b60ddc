"""What helps to write a recipe: a shipped one with comments, and the JSON schema for editors."""

import re
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from instructblip.recipe.load import RECIPES, fields_at, find_recipe, read_values
from instructblip.recipe.schema import Recipe

WIDTH = 96
OTHERS = "All other settings have their defaults, which `instructblip schema` lists for an editor."


def titles() -> dict[str, str]:
    """The recipes that ship with the package: name -> what its comment begins with."""
    paths = sorted(RECIPES.glob("*.yaml"))
    return {path.stem: re.split(r"[.:;]( |$)", " ".join(_header(path)))[0] for path in paths}


def commented(recipe: str | Path) -> str:
    """A recipe as YAML with a sentence above each of its settings, those of its ``base`` included.

    `load_recipe` reads it as it reads ``recipe``.
    """
    path = find_recipe(recipe)
    sections = read_values(path)
    lines = [f"# {line}" for line in _header(path)]
    for name, settings in sections.items():
        lines += ["", *_comment(Recipe.model_fields[name].description), f"{name}:"]
        for key, value in (settings or {}).items():
            lines += _comment(fields_at((name,))[key].description, "  ")
            lines += _setting(key, value)
    lines += ["", *_comment(OTHERS)]
    return "\n".join(lines) + "\n"


def json_schema() -> dict[str, Any]:
    """The JSON schema of a recipe file: names, types, ranges and a sentence for each setting.

    What a recipe must have may also come from its ``base``.
    """
    schema = Recipe.model_json_schema()
    parts = {"data": "DataConfig", "drawing": "DrawingConfig"}
    inside = {
        name: {"required": schema["$defs"][part].pop("required")} for name, part in parts.items()
    }
    needed = {"required": schema.pop("required"), "properties": inside}
    schema["properties"]["base"] = {
        "type": "string",
        "description": "Name or path of the recipe whose settings this one starts from.",
    }
    dialect = "https://json-schema.org/draft/2020-12/schema"
    return {"$schema": dialect, **schema, "if": {"not": {"required": ["base"]}}, "then": needed}


def _header(path: Path) -> Iterator[str]:
    """The lines of the comment that a file begins with."""
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            return
        yield line.lstrip("# ")


def _comment(text: str | None, indent: str = "") -> list[str]:
    mark = f"{indent}# "
    plain = " ".join((text or "").replace("``", "`").split())
    return textwrap.wrap(plain, WIDTH, initial_indent=mark, subsequent_indent=mark)


def _setting(key: str, value: object) -> list[str]:
    """``key: value`` in one line; entries such as those of ``data.sets`` in a line each."""
    if not isinstance(value, dict) or not value:
        return [f"  {key}: {_flow(value)}"]
    return [f"  {key}:", *(f"    {name}: {_flow(entry)}" for name, entry in value.items())]


def _flow(value: object) -> str:
    text = yaml.safe_dump(
        value, default_flow_style=True, width=10**6, allow_unicode=True, sort_keys=False
    )
    return text.removesuffix("\n").removesuffix("\n...")
