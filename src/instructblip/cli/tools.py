"""Commands as tools of an agent: a function's signature is the schema of its tool, too."""

import inspect
import json
import os
import re
import typing
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer import Option
from typer.models import ArgumentInfo, ParameterInfo

from instructblip.cli import data, evaluation, models, training
from instructblip.cli.options import SETTINGS
from instructblip.core.problems import problems

if TYPE_CHECKING:
    from pydantic import BaseModel

app = typer.Typer()

COMMANDS = (
    data.check,
    training.tune,
    training.train,
    training.status,
    evaluation.evaluate,
    evaluation.compare,
    models.answer,
)
NAMES_OF_PLACES = ("recipe", "model", "arguments", "overrides")
"""Parameters whose text may be a path, beside those that are a Path."""
MOST_CHARACTERS = 1 << 16
"""Of all texts of a call: a command line holds twice as many bytes in one argument."""
INSTRUCTIONS = (
    "Tune and evaluate InstructBLIP models. With a folder of images: tune. Else, in order: check, "
    "train, status, evaluate (the start, then the run), compare, answer. A cancelled training "
    "saves its step and continues with resume. Report scores with their intervals."
)


@app.command()
def mcp(
    root: Annotated[
        Path, Option(help="Folder of all data and models; no path leaves it.", file_okay=False)
    ] = Path(),
) -> None:
    """Offer commands to agents as tools, over the Model Context Protocol on stdin and stdout."""
    try:
        from instructblip.integrations.mcp import Tool, run_server
    except ModuleNotFoundError as error:
        raise ValueError(f"{error.name} is missing: pip install 'instructblip[mcp]'") from error

    if not root.is_dir():
        raise FileNotFoundError(f"--root {root} is not a folder: give one that exists")
    os.chdir(root)
    tools = []
    for command in COMMANDS:
        kind = arguments_of(command)
        text = inspect.cleandoc(command.__doc__ or "")
        words = words_of(command, kind, Path.cwd())
        tools.append(Tool(command.__name__, text, kind.model_json_schema(), words))
    run_server(tools, INSTRUCTIONS)


def parameters(command: Callable[..., Any]) -> Iterator[tuple[str, Any, ParameterInfo, Any]]:
    """Name, type, declaration and default (``...`` without one) of each option and argument."""
    declared = inspect.signature(command).parameters.values()
    flat = (one for p in declared for one in SETTINGS.get(p.name, lambda p=p: (p,))())
    for parameter in flat:
        kind, info = typing.get_args(parameter.annotation)
        default = ... if parameter.default is inspect.Parameter.empty else parameter.default
        yield parameter.name, kind, info, default


def arguments_of(command: Callable[..., Any]) -> "type[BaseModel]":
    """The model of a command's arguments, from its signature."""
    from pydantic import ConfigDict, Field, create_model

    fields: dict[str, Any] = {}
    for name, kind, info, default in parameters(command):
        shape = getattr(info, "metavar", None)
        text = " ".join(part for part in (shape, info.help) if part)
        fewest = 1 if default is ... and typing.get_origin(kind) is list else None
        limits: dict[str, Any] = {"ge": info.min, "le": info.max, "min_length": fewest}
        fields[name] = (kind, Field(default, description=text, **limits))
    return create_model(command.__name__, __config__=ConfigDict(extra="forbid"), **fields)


def words_of(
    command: Callable[..., Any], kind: "type[BaseModel]", root: Path
) -> Callable[[Mapping[str, Any]], list[str]]:
    """The function that turns a call's arguments into words of the command line. It raises
    ValueError or OSError for a mistake, and for a path that is not inside ``root``."""
    from pydantic import ValidationError

    def words(arguments: Mapping[str, Any]) -> list[str]:
        check_texts(command.__name__, arguments)
        try:
            given = kind.model_validate(arguments)
        except ValidationError as error:
            raise ValueError(f"{command.__name__}: {problems(error)}") from None
        options, positional = [], []
        for name, type_, info, default in parameters(command):
            value = getattr(given, name)
            if value == default:
                continue
            each = value if isinstance(value, list) else [value]
            if name in NAMES_OF_PLACES or Path in parts(type_):
                for text in each:
                    check_places(root, name, str(text))
            if isinstance(info, ArgumentInfo):
                positional += [str(one) for one in each]
            elif value is True:
                options.append(_option(name, info))
            else:
                options += [f"{_option(name, info)}={one}" for one in each]
        return [command.__name__, *options, "--", *positional]

    return words


def check_texts(command: str, arguments: Mapping[str, Any]) -> None:
    """ValueError for texts that no command line holds."""
    texts = json.dumps(arguments)
    if len(texts) > MOST_CHARACTERS:
        raise ValueError(
            f"{command}: the arguments have {len(texts):,} characters, expected at most "
            f"{MOST_CHARACTERS:,}; put many questions into a JSONL file, and settings into a recipe"
        )
    if re.search(r"(?<!\\)(\\\\)*\\u0000", texts):
        raise ValueError(f"{command}: a text has a NUL character; leave it out")


def parts(kind: Any) -> Iterator[Any]:
    yield kind
    for part in typing.get_args(kind):
        yield from parts(part)


def _option(name: str, info: ParameterInfo) -> str:
    names = (info.default, *(info.param_decls or ()))  # typer stores the first name as the default
    long = (text for text in names if isinstance(text, str) and text.startswith("--"))
    return next(long, "--" + name.replace("_", "-"))


def check_places(root: Path, name: str, text: str) -> None:
    """ValueError unless the path in a parameter, or in the value of a setting a.b=c, is inside
    ``root``, with its links, and the paths of the recipe that it is or has beside it are."""
    from instructblip.recipe.load import read_yaml
    from instructblip.recipe.schema import RECIPE_FILE

    key, equals, value = text.partition("=")
    if equals and name in ("arguments", "overrides", "models"):
        _check_inside(root, read_yaml(value, f"{text}: the value is not YAML"), key)
        return
    _check_inside(root, text, name)
    path = root / text
    for beside in (path / RECIPE_FILE, path / "best" / RECIPE_FILE):
        if beside.is_file():
            _check_recipe(root, beside)
    if path.is_file() and name in ("arguments", "recipe"):
        _check_recipe(root, path)


def _check_recipe(root: Path, file: Path) -> None:
    from instructblip.recipe.load import MOST_BASES, RECIPES, find_recipe, read_file

    for _ in range(MOST_BASES):
        values = read_file(file)
        base = values.pop("base", None)
        _check_inside(root, values, str(file))
        if not isinstance(base, str) or (file := find_recipe(base, file.parent)).parent == RECIPES:
            return
        _check_inside(root, str(file), "base")


def _check_inside(root: Path, value: Any, where: str) -> None:
    """ValueError if a text anywhere in a value, read as a path, leaves ``root``."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        for each in value:
            _check_inside(root, each, where)
    elif isinstance(value, str) and not value.startswith("hf://"):
        address = re.match(r"[\w.+-]+:/", value)  # also what a Path makes of file:///
        if "://" not in value and not address and (root / value).resolve().is_relative_to(root):
            return
        raise ValueError(
            f"{where}: {value!r} is outside {root}, the root of the tools: give a path in it, or "
            "start the server with another --root"
        )
