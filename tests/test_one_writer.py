"""Only ``core/files.py`` syncs, renames or replaces: whoever writes goes through it."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "src" / "instructblip"
WRITER = PACKAGE / "core" / "files.py"
FORBIDDEN = {
    "os": {"fsync", "fdatasync", "rename", "renames", "replace", "sync"},
    "posix": {"fsync", "fdatasync", "rename", "replace", "sync"},
    "shutil": {"move"},
}
"""Functions that decide when and under which name content is on the disk."""
METHODS = {"fsync", "fdatasync", "rename", "renames"}
"""Names that are forbidden on any object. ``replace`` is a method of text and dates, too: `_moves`
tells them apart by the arguments."""


def violations(source: str) -> list[tuple[int, str]]:
    """(line, name) of every sync, rename or replace in a module."""
    return sorted(set(_violations(ast.parse(source))))


def _violations(tree: ast.Module) -> Iterator[tuple[int, str]]:
    modules: dict[str, str] = {}  # local name -> module
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name in FORBIDDEN:
                    modules[alias.asname or alias.name] = alias.name
        elif isinstance(node, ast.ImportFrom) and node.module in FORBIDDEN:
            for alias in node.names:
                if alias.name in FORBIDDEN[node.module] | {"*"}:
                    yield node.lineno, f"{node.module}.{alias.name}"
    called = {id(node.func): node for node in ast.walk(tree) if isinstance(node, ast.Call)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            owner = node.value.id if isinstance(node.value, ast.Name) else None
            if owner in modules:
                if node.attr in FORBIDDEN[modules[owner]]:
                    yield node.lineno, f"{modules[owner]}.{node.attr}"
            elif node.attr in METHODS:
                yield node.lineno, node.attr
            elif node.attr == "replace" and _moves(called.get(id(node))):
                yield node.lineno, "Path.replace"
        elif isinstance(node, ast.Call) and getattr(node.func, "id", "") == "getattr":
            for value in node.args[1:2]:
                if isinstance(value, ast.Constant) and value.value in {*METHODS, "replace", "move"}:
                    yield node.lineno, f"getattr {value.value}"


def _moves(call: ast.Call | None) -> bool:
    """Whether ``x.replace`` can be a path's, which takes one argument: a target.

    Text takes two or three positional arguments and dates take named ones, none called target;
    ``dataclasses.replace`` takes an object and named ones. A ``replace`` that is not called may be
    anything (``map(path.replace, targets)``).
    """
    if call is None:
        return True
    names = {keyword.arg for keyword in call.keywords}
    if "target" in names or None in names:
        return True
    starred = any(isinstance(argument, ast.Starred) for argument in call.args)
    return len(call.args) < 2 and not names if not starred else len(call.args) < 3


def test_only_the_writer_renames_and_syncs():
    files = [path for path in sorted(PACKAGE.rglob("*.py")) if path != WRITER]
    assert len(files) > 100
    found = {
        f"{path.relative_to(PACKAGE)}:{line}: {name}"
        for path in files
        for line, name in violations(path.read_text(encoding="utf-8"))
    }
    assert not found, "write with core/files.py, so that a crash leaves the old or the new"
    assert {name for _, name in violations(WRITER.read_text(encoding="utf-8"))} >= {
        "os.fsync",
        "rename",
        "Path.replace",
    }


@pytest.mark.parametrize(
    "planted",
    [
        "import os\nos.replace(a, b)",
        "import os as system\nsystem.rename(a, b)",
        "import os\nos.fsync(file.fileno())",
        "import os\nsave = os.replace",
        "from os import fsync",
        "from os import replace as put",
        "from os import *",
        "import posix\nposix.rename(a, b)",
        "def f():\n    from shutil import move\n    move(a, b)",
        "import shutil\nshutil.move(a, b)",
        "Path(a).rename(b)",
        "path.with_name('.a.tmp').replace(path)",
        "path.replace(target=other)",
        "path.replace(*pair)",
        "path.replace(**where)",
        "list(map(temporary.replace, targets))",
        "import os\ngetattr(os, 'replace')(a, b)",
        "async def f():\n    with open(a) as file:\n        file.flush(), path.rename(b)",
    ],
)
def test_a_planted_violation_is_caught(planted):
    assert violations(planted)


@pytest.mark.parametrize(
    "innocent",
    [
        "text.replace('a', 'b')",
        "text.replace(old, new, 1)",
        "text.replace(*pair, 1, 2)",
        "name.replace('.', '_').replace('-', '_')",
        "from dataclasses import replace\nreplace(sample, image=image)",
        "import dataclasses\ndataclasses.replace(sample, image=image)",
        "date.replace(year=2024)",
        "import os\nos.path.join(a, b), os.remove(c)",
        "import shutil\nshutil.rmtree(folder)",
        "table.rename_columns(names)",
    ],
)
def test_text_and_dates_are_no_violations(innocent):
    assert not violations(innocent)
