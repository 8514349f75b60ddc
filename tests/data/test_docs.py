"""docs/data.md agrees with the code. `python -m tests.data.test_docs` prints its table."""

import json
import re
from pathlib import Path
from typing import Any

from instructblip.data.custom.formats import FORMATS
from instructblip.data.custom.rows import ROLES
from instructblip.data.sources import SOURCES
from instructblip.data.templates import TEMPLATES, TEMPLATES_ZH
from instructblip.recipe.schema import Format
from tests.data.miniatures import CASES

DOCUMENT = Path(__file__).parents[2] / "docs" / "data.md"
HEAD = (
    "| data set | files in `annotations/` | fields | task | templates (en + zh) | licence | test |"
)


def table() -> list[str]:
    """One line per data set: files, fields, task, templates and the test of its miniature."""
    lines = [HEAD, "|---" * 7 + "|"]
    for name, source in sorted(SOURCES.items()):
        number, case = next((i, c) for i, c in enumerate(CASES) if c[0] == name)
        fields = list(dict.fromkeys(key for f, value in case[2].items() for key in keys(f, value)))
        cells = [
            f"`{name}`",
            source.files.replace("|", "/"),
            ", ".join(fields),
            source.task,
            f"{len(TEMPLATES[source.task])} + {len(TEMPLATES_ZH[source.task])}",
            source.licence,
            f"`test_miniature[{name}-{case[1]}-{number}]`",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def keys(file: str, value: Any) -> list[str]:
    """Names of the fields that hold text, numbers or lists of them."""
    if isinstance(value, str):
        first = value.split("\n")[0]
        if file.endswith(".json") and first.startswith("{"):  # a record a line
            return keys("", json.loads(first))
        return first.split(",") if file.endswith(".csv") else []
    if isinstance(value, list):
        return [key for item in value for key in keys(file, item)]
    if not isinstance(value, dict):
        return []
    names = []
    for key, inner in value.items():
        nested = isinstance(inner, dict) or (
            isinstance(inner, list) and any(isinstance(item, dict) for item in inner)
        )
        # Keys that are numbers are ids of records.
        plain = not nested and re.fullmatch(r"[A-Za-z_]\w*", key)
        names += keys(file, inner) if nested else [key] if plain else []
    return names


def test_the_table_agrees_with_the_code():
    written = DOCUMENT.read_text(encoding="utf-8").split("\n")
    start = written.index(HEAD)
    assert written[start : start + len(table())] == table()


def test_formats_and_roles_are_explained():
    text = DOCUMENT.read_text(encoding="utf-8")
    assert set(Format.__args__) == set(FORMATS)
    for name in (*FORMATS, *ROLES):
        assert f"`{name}`" in text, name


if __name__ == "__main__":
    print("\n".join(table()))
