"""Reading recipes: ``load_recipe(name_or_file, ["training.steps=100", ...])``.

A file may name another one as its ``base``, whose settings it then starts from. Unknown keys are
errors that name the nearest known one.
"""

import types
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from copy import deepcopy
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from instructblip.core.problems import problem
from instructblip.core.user_code import find_function, import_from
from instructblip.recipe.schema import RECIPE_FILE, Recipe

RECIPES = Path(__file__).parent
"""The recipes that ship with the package."""
MOST_DEPTH, MOST_VALUES, MOST_BYTES = 32, 100_000, 1 << 22
"""Nesting, values and bytes of a recipe."""
MOST_BASES = 8
"""Longest chain of recipes of which each is the base of the one before."""


def load_recipe(recipe: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe file, or one that ships with the package by its name.

    Args:
        overrides: ``a.b=c``, each value read as YAML: ``training.steps=100``,
            ``training.trainable=[qformer]``, ``training.clip_norm=null``.

    Raises:
        FileNotFoundError: naming the recipes there are.
        ValueError: naming the file, the key and what was expected; for an unknown key the nearest.
    """
    path = find_recipe(recipe)
    values = read_values(path)
    for override in overrides:
        _override(values, override)
    try:
        return _with_code(Recipe.model_validate(values), path)
    except ValidationError as error:
        where = f"{path}" + (f" with {' '.join(overrides)}" if overrides else "")
        raise ValueError(f"{where}: " + "; ".join(_explain(error.errors()))) from None


def refuse_settings(overrides: Sequence[str], values: Mapping[str, Any]) -> None:
    """ValueError for overrides of ``values`` that no recipe takes: an unknown setting, or a value
    that it cannot have. Whether the settings of a section go together is for `load_recipe`, since
    those that are not there are chosen later."""
    changed = deepcopy(dict(values))
    for override in overrides:
        _override(changed, override)
    try:
        Recipe.model_validate(changed)
    except ValidationError as error:
        if alone := [detail for detail in error.errors() if len(detail["loc"]) != 1]:
            raise ValueError(f"{' '.join(overrides)}: " + "; ".join(_explain(alone))) from None


def _with_code(recipe: Recipe, path: Path) -> Recipe:
    """The recipe with the folder of its Python files, each of which is imported once.

    A ``recipe.yaml``, which lies beside every model, runs no file below its own folder: a model
    from elsewhere brings no code along.
    """
    if not recipe.functions:
        return recipe
    folder = (path.parent / (recipe.code or ".")).resolve()
    if path.name == RECIPE_FILE and folder.is_relative_to(path.parent.resolve()):
        raise ValueError(
            f"{path} names the functions {', '.join(recipe.functions)} beside a model, and they "
            "are not run from there: read them, and copy the recipe under another name to run them"
        )
    import_from(folder)
    for name in recipe.functions:
        find_function(name)
    return recipe.model_copy(update={"code": folder})


def read_file(path: Path) -> dict[str, Any]:
    """The sections of a file alone, with the name of its ``base``."""
    if path.stat().st_size > MOST_BYTES:
        raise ValueError(f"{path} has more than {MOST_BYTES} bytes; is this a recipe?")
    values = read_yaml(path.read_text(encoding="utf-8"), f"{path} is not YAML")
    if not isinstance(values, dict):
        sections = ", ".join(Recipe.model_fields)
        raise ValueError(f"{path}: expected the sections {sections}; got {str(values)[:200]!r}")
    return values


def read_values(path: Path, depth: int = 0) -> dict[str, Any]:
    """The sections of a file, on top of those of its ``base``.

    A setting such as ``training.steps`` or ``data.sets`` replaces that of the base as a whole.
    """
    values = read_file(path)
    if "base" not in values:
        return values
    base = values.pop("base")
    if not isinstance(base, str):
        raise ValueError(f"{path}: base: expected the name or path of a recipe; got {base!r}")
    if depth == MOST_BASES:
        raise ValueError(f"{path}: base: more than {MOST_BASES} recipes are based on each other")
    below = read_values(find_recipe(base, path.parent), depth + 1)
    for name, section in values.items():
        if isinstance(section, dict) and isinstance(below.get(name), dict):
            values[name] = {**below[name], **section}
    return {**below, **values}


def find_recipe(recipe: str | Path, folder: Path = Path()) -> Path:
    """The file of a recipe given by its path, relative to ``folder``, or by its name."""
    path = folder / recipe
    if path.is_file():
        return path
    shipped = RECIPES / f"{recipe}.yaml"
    if shipped.is_file():
        return shipped
    if path.is_dir():
        raise FileNotFoundError(
            f"{recipe} is a folder, not a recipe; `instructblip tune {recipe}` checks a folder of "
            "images before it trains, and `instructblip check {recipe}` only checks it"
        )
    names = sorted(p.stem for p in RECIPES.glob("*.yaml"))
    near = get_close_matches(str(recipe), names, n=1)
    hint = f"did you mean {near[0]}? " if near else ""
    known = ", ".join(names)
    raise FileNotFoundError(f"no recipe {recipe}: {hint}expected a YAML file or one of {known}")


def differences(left: Recipe, right: Recipe) -> list[str]:
    """``key: left -> right`` for every setting in which two recipes differ."""
    mine, other = (dict(_leaves(r.model_dump(mode="json"))) for r in (left, right))
    return [
        f"{key}: {mine.get(key)} -> {other.get(key)}"
        for key in {**mine, **other}
        if mine.get(key) != other.get(key)
    ]


class _Loader(yaml.SafeLoader):
    """YAML without keys that are there twice, of which PyYAML would take the last, and with bounds
    on its depth and on what its aliases stand for, written out."""

    def __init__(self, stream: Any) -> None:
        super().__init__(stream)
        self._depth = 0
        self._sizes: dict[yaml.Node, int] = {}

    def compose_node(self, parent: Any, index: Any) -> Any:
        self._depth += 1
        event: Any = self.peek_event()
        mark = event.start_mark
        if self._depth > MOST_DEPTH:
            raise yaml.MarkedYAMLError(problem="it is nested too deeply", problem_mark=mark)
        node: Any = super().compose_node(parent, index)
        self._depth -= 1
        if isinstance(event, yaml.AliasEvent):
            self._sizes.setdefault(node, MOST_VALUES + 1)  # of a node around it: endless
        else:
            inner = node.value if isinstance(node, yaml.CollectionNode) else ()
            nodes = (part for one in inner for part in (one if isinstance(one, tuple) else (one,)))
            self._sizes[node] = 1 + sum(self._sizes[part] for part in nodes)
        if self._sizes[node] > MOST_VALUES:
            raise yaml.MarkedYAMLError(problem="its aliases stand for too much", problem_mark=mark)
        return node

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    what = f"the key {key.value} is there twice"
                    raise yaml.MarkedYAMLError(problem=what, problem_mark=key.start_mark)
                seen.add(key.value)
        return node


def read_yaml(text: str, complaint: str) -> Any:
    """A YAML value within the bounds. ValueError, which begins with ``complaint``, for others."""
    try:
        return yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise ValueError(f"{complaint}: {' '.join(str(error).split())}") from error


def _override(values: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    *sections, last = key.split(".")
    if not equals or not all((*sections, last)):
        raise ValueError(f"expected an override such as training.steps=100; got {override!r}")
    place = values
    for section in sections:
        if place.get(section) is None:
            place[section] = {}
        place = place[section]
        if not isinstance(place, dict):
            raise ValueError(f"{override}: {section} is {place!r}, which has no keys of its own")
    place[last] = read_yaml(text, f"{override}: the value is not YAML")


def _explain(details: Iterable[ErrorDetails]) -> Iterator[str]:
    for detail in details:
        key = ".".join(map(str, detail["loc"]))
        if detail["type"] == "extra_forbidden":
            name, known = str(detail["loc"][-1]), sorted(fields_at(detail["loc"][:-1]))
            near = get_close_matches(name, known, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(known)}"
            yield f"unknown key {key}: {hint}"
        elif detail["type"] == "missing":
            yield f"{key} is missing"
        else:
            yield problem(detail)


def fields_at(place: tuple[int | str, ...]) -> Mapping[str, Any]:
    """Names of the settings at a place of the recipe, such as ("data", "sets", "vqav2")."""
    kind: Any = Recipe
    for name in place:
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            kind = kind.model_fields[str(name)].annotation
        elif typing.get_origin(kind) is types.UnionType:  # the name is the tag of one of several
            options = typing.get_args(kind)
            kind = next(o for o in options if o.model_fields["kind"].default == name)
        else:  # an entry of dict[str, Section]
            kind = typing.get_args(kind)[-1]
        if type(None) in typing.get_args(kind):  # Section | None
            kind = typing.get_args(kind)[0]
    return kind.model_fields


def _leaves(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, dict) and value:
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
