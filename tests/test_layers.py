"""Imports only ever fall, from the command line down to the batch."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "src" / "instructblip"

FLOORS = {
    "batch": 1,
    "distributed": 1,
    "parts": 1,
    "data": 2,
    "model": 2,
    "training": 2,
    "evaluation": 3,
    "serving": 3,
    "text_to_image": 3,
    "recipe": 4,
    "preparing": 4,
    "caching": 4,
    "assembly": 4,
    "checking": 4,
    "pretraining": 4,
    "tuning": 4,
    "memory": 4,
    "drawing": 4,
    "stages": 5,
    "stages_measure": 5,
    "stages_use": 5,
    "cli": 6,
    "cli_measure": 6,
    "cli_use": 6,
    "__main__": 7,
}
APART = [{"data", "model", "training"}]
"""Folders of one floor that may not import each other."""


def imports(path: Path) -> set[str]:
    """The package's own modules that a file imports anywhere in it, at the first level."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative imports hide the floor they come from"
            names = [node.module or ""]
            if node.module == "instructblip":
                names = [f"instructblip.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        found |= {name.split(".")[1] for name in names if name.startswith("instructblip.")}
    return found & set(FLOORS)


def files() -> list[Path]:
    paths = sorted(PACKAGE.rglob("*.py"))
    return [path for path in paths if path != PACKAGE / "__init__.py"]


@pytest.mark.parametrize("path", files(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_fall(path: Path):
    place = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    assert place in FLOORS, f"{place} has no floor: add it to FLOORS and to docs/architecture.md"
    for other in imports(path) - {place}:
        assert FLOORS[other] <= FLOORS[place], f"{path} imports {other}, which is above it"
        for group in APART:
            assert not {place, other} <= group, f"{path}: {place} and {other} meet in batch.py only"


def test_the_check_sees_imports(tmp_path: Path):
    path = tmp_path / "a.py"
    path.write_text(
        "import instructblip.data.loader\n"
        "from instructblip import recipe\n"
        "def f():\n    from instructblip.model.qformer import QFormer\n"
    )
    assert imports(path) == {"data", "recipe", "model"}


def test_only_one_file_knows_torch_distributed():
    users = [path.name for path in files() if "torch.distributed" in path.read_text("utf-8")]
    assert users == ["distributed.py"]
