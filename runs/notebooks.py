"""Write notebooks/*.ipynb from docs/howto/notebooks.md: a section is a notebook, a text or a block
of Python is a cell. Without outputs, so that the page is all there is to review.

    python runs/notebooks.py
"""

import json
import re
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).parents[1]
PAGE = REPOSITORY / "docs/howto/notebooks.md"
NAMES = {"Quickstart": "quickstart", "Your pictures": "own_pictures"}


def notebooks() -> dict[str, dict[str, Any]]:
    """The notebooks of the page, by the names of their files."""
    _, *sections = PAGE.read_text(encoding="utf-8").split("\n## ")
    written = {}
    for section in sections:
        title = section.partition("\n")[0]
        written[f"{NAMES[title]}.ipynb"] = notebook(f"# {section}")
    return written


def notebook(text: str) -> dict[str, Any]:
    """Markdown as a notebook of format 4.5."""
    cells = []
    for number, part in enumerate(re.split(r"```python\n(.*?)```", text, flags=re.DOTALL)):
        is_code = number % 2 == 1
        source = part.strip() if is_code else links_to_docs(part.strip())
        if source:
            kind: dict[str, Any] = {"cell_type": "code" if is_code else "markdown"}
            kind |= {"execution_count": None, "outputs": []} if is_code else {}
            lines = source.splitlines(keepends=True)
            cells.append({**kind, "id": f"cell-{len(cells)}", "metadata": {}, "source": lines})
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    metadata = {"kernelspec": kernel, "language_info": {"name": "python"}}
    return {"cells": cells, "metadata": metadata, "nbformat": 4, "nbformat_minor": 5}


def links_to_docs(text: str) -> str:
    """Links between pages, as a file in notebooks/ has them."""
    return re.sub(r"\]\((?!http)([^)]+)\)", r"](../docs/howto/\1)", text)


def to_text(content: dict[str, Any]) -> str:
    return json.dumps(content, indent=1, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    for name, content in notebooks().items():
        (REPOSITORY / "notebooks" / name).write_text(to_text(content), encoding="utf-8")
