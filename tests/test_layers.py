"""Imports only fall, rooms of one floor do not know each other, and no imports form a ring."""

import ast
from collections.abc import Iterable, Mapping
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "src" / "instructblip"

FLOORS = [
    {"core"},
    {"scenes"},
    {"data", "model", "training"},
    {"evaluation", "text_to_image"},
    {"inference", "recipe"},
    {"experiment", "serving", "release", "integrations"},
    {"studio"},
    {"cli"},
    {"__init__", "__main__"},
]
"""From the ground up. A room imports from the floors below its own, and from itself."""

Imports = Mapping[str, set[str]]
"""Module to the modules of the package that it imports, anywhere in its text."""


def read_imports(package: Path) -> Imports:
    """The imports between all modules of a package, those inside functions included."""
    paths = {_module_name(package, path): path for path in sorted(package.rglob("*.py"))}
    return {name: _imports_of(path, name, paths) for name, path in paths.items()}


def _module_name(package: Path, path: Path) -> str:
    parts = path.relative_to(package.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _imports_of(path: Path, module: str, known: Iterable[str]) -> set[str]:
    package = module.split(".")[0]
    names = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import hides the floor it comes from"
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                names.append(whole if whole in known else str(node.module))
        elif isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            text = node.args[0]
            names += [text.value] if isinstance(text, ast.Constant) else []
    used = {name for name in names if name == package or name.startswith(f"{package}.")}
    return used - {module}


def room_of(module: str) -> str:
    """The room of a module: ``instructblip.data.custom.rows`` stands in ``data``."""
    return [*module.split("."), "__init__"][1]


def climbing(imports: Imports) -> list[str]:
    """Imports of a room on the same floor or above, each as one line."""
    floor = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
    lines = []
    for module, others in imports.items():
        here = room_of(module)
        assert here in floor, f"{module} has no floor: add its room to FLOORS"
        for other in sorted(others):
            there = room_of(other)
            if there != here and floor[there] >= floor[here]:
                lines.append(f"{module} imports {other}")
    return lines


def rings(imports: Imports) -> list[list[str]]:
    """Modules that import each other in a circle: strongly connected components (Tarjan, 1972)."""
    index: dict[str, int] = {}
    lowest: dict[str, int] = {}
    stack: list[str] = []
    circles = []

    def visit(module: str) -> None:
        index[module] = lowest[module] = len(index)
        stack.append(module)
        for other in sorted(imports.get(module, ())):
            if other not in index:
                visit(other)
                lowest[module] = min(lowest[module], lowest[other])
            elif other in stack:
                lowest[module] = min(lowest[module], index[other])
        if lowest[module] == index[module]:
            circle = stack[stack.index(module) :]
            del stack[stack.index(module) :]
            if len(circle) > 1:
                circles.append(sorted(circle))

    for module in imports:
        if module not in index:
            visit(module)
    return circles


def test_imports_fall():
    assert climbing(read_imports(PACKAGE)) == []


def test_no_imports_form_a_ring():
    assert rings(read_imports(PACKAGE)) == []


def test_each_planted_violation_is_caught():
    """Every pair of rooms that may not meet, planted one at a time."""
    imports = read_imports(PACKAGE)
    rooms = {room_of(module) for module in imports} - {"__init__", "__main__"}
    first = {room: min(m for m in imports if room_of(m) == room) for room in rooms}
    floor = {room: number for number, names in enumerate(FLOORS) for room in names}
    planted = 0
    for here in rooms:
        for there in rooms - {here}:
            if floor[there] < floor[here]:
                continue
            changed = {**imports, first[here]: imports[first[here]] | {first[there]}}
            assert f"{first[here]} imports {first[there]}" in climbing(changed)
            planted += 1
    assert planted > len(rooms) ** 2 / 2


def test_a_planted_ring_is_caught():
    imports = dict(read_imports(PACKAGE))
    below, above = "instructblip.data.order", "instructblip.data.loader"
    assert below in imports[above]
    imports[below] = imports[below] | {above}
    assert [below, above] in [
        [m for m in ring if m in (below, above)][::-1] for ring in rings(imports)
    ]


def test_the_reader_sees_every_kind_of_import(tmp_path: Path):
    package = tmp_path / "instructblip"
    for name in ("data", "model", "serving"):
        (package / name).mkdir(parents=True)
        (package / name / "__init__.py").touch()
    (package / "data" / "loader.py").touch()
    (package / "model" / "qformer.py").touch()
    (package / "__init__.py").write_text("from instructblip import serving\n")
    (package / "data" / "__init__.py").write_text(
        "from importlib import import_module\n"
        "import instructblip.data.loader\n"
        "def f():\n"
        "    from instructblip.model.qformer import QFormer\n"
        "    import_module('instructblip.serving')\n"
    )
    found = read_imports(package)
    assert found["instructblip"] == {"instructblip.serving"}
    assert found["instructblip.data"] == {
        "instructblip.data.loader",
        "instructblip.model.qformer",
        "instructblip.serving",
    }
    assert "instructblip.data imports instructblip.model.qformer" in climbing(found)


def test_only_one_file_knows_torch_distributed():
    files = [p for p in PACKAGE.rglob("*.py") if "torch.distributed" in p.read_text("utf-8")]
    assert [path.name for path in files] == ["distributed.py"]


def test_the_drawing_shows_every_room():
    drawing = (PACKAGE.parents[1] / "docs/pictures/architecture.svg").read_text("utf-8")
    rooms = [room for floor in FLOORS[:-1] for room in floor]
    assert [room for room in rooms if f">{room}/</text>" not in drawing] == []
