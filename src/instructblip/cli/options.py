"""Arguments and options that several commands share."""

import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer import Argument, Option
from typer.core import TyperCommand

if TYPE_CHECKING:
    from instructblip.recipe.schema import Recipe

MODELS = ("starter", "dense", "small")
"""Those of `model/checkpoints/directory.py`, which is not imported to complete a word."""


def complete_recipe(incomplete: str) -> list[str]:
    """Shipped recipes that begin so. A shell adds files where nothing does."""
    folder = Path(__file__).parents[1] / "recipe"
    return [p.stem for p in sorted(folder.glob("*.yaml")) if p.stem.startswith(incomplete)]


def complete_model(incomplete: str) -> list[str]:
    """Models without a path that begin so."""
    return [name for name in MODELS if name.startswith(incomplete)]


def complete_either(incomplete: str) -> list[str]:
    """Models, then recipes."""
    return [*complete_model(incomplete), *complete_recipe(incomplete)]


def complete_benchmarks(incomplete: str) -> list[str]:
    """Groups and benchmarks for the last of several with commas."""
    from instructblip.evaluation.benchmarks import BENCHMARKS, GROUPS

    before, comma, last = incomplete.rpartition(",")
    names = [*GROUPS, *BENCHMARKS]
    return [f"{before}{comma}{name}" for name in names if name.startswith(last)]


RecipeName = Annotated[
    str,
    Argument(help="A YAML file, or the name of a shipped recipe.", autocompletion=complete_recipe),
]
Overrides = Annotated[
    list[str] | None, Argument(metavar="[A.B=C]...", help="Settings in place of the recipe's.")
]
Scale = Annotated[float, Option(help="Size of the data sets; 1 for all.")]
Resume = Annotated[bool, Option("--resume", help="Continue where an earlier run stopped.")]
Model = Annotated[
    str,
    Option(
        "--model",
        help="A run or model directory, hf://OWNER/NAME, `starter`, `dense`, `small`.",
        autocompletion=complete_model,
    ),
]
Images = Annotated[
    list[Path] | None, Option("--image", help="An image or a video; several are read together.")
]
Benchmarks = Annotated[
    str | None,
    Option(
        help="Benchmarks or groups, with commas; all if absent.",
        autocompletion=complete_benchmarks,
    ),
]
Limit = Annotated[int | None, Option(help="Samples of each set; all if absent.")]
Settings = Annotated[dict[str, Any] | None, Option(parser=str)]
"""The parameter ``decoding`` or ``placement`` of a command that is a `SettingsCommand`."""


def to_dir(help: str) -> Any:
    """An option for a folder to write; a file that stands there is refused."""
    return Option(help=help, file_okay=False)


def to_file(help: str) -> Any:
    """An option for a file to write; a folder that stands there is refused."""
    return Option(help=help, dir_okay=False)


class SettingsCommand(TyperCommand):
    """A command whose parameters ``decoding`` and ``placement``, if it has them, are filled from
    one option for each field of ``Decoding`` and ``Placement``. These are imported only when the
    command runs or shows its help."""

    def get_params(self, ctx: Any) -> list[Any]:
        *others, help_option = super().get_params(ctx)
        settings = [p.name for p in others if p.name in SETTINGS]
        others = [p for p in others if p.name not in settings]
        return [*others, *(o for name in settings for o in _options(name)), help_option]

    def invoke(self, ctx: Any) -> Any:
        from instructblip.model.decoding import Decoding, check_overrides
        from instructblip.model.placement import Placement, check_placement

        for name, kind in (("decoding", Decoding), ("placement", Placement)):
            if name in (p.name for p in super().get_params(ctx)):
                given = {field: ctx.params.pop(field, None) for field in kind.model_fields}
                given = {field: value for field, value in given.items() if value is not None}
                ctx.params[name] = check_overrides(given) if kind is Decoding else given
                if kind is Placement:
                    check_placement(**given)
        return super().invoke(ctx)


def _options(name: str) -> list[Any]:
    """The options that typer makes of a function with the fields of a model as parameters."""

    def declare() -> None: ...

    declare.__signature__ = inspect.Signature(list(SETTINGS[name]()))  # type: ignore
    app = typer.Typer(add_completion=False)
    app.command()(declare)
    return typer.main.get_command(app).params


def _decoding_parameters() -> Iterator[inspect.Parameter]:
    from instructblip.model.decoding import PAPER, Decoding, allowed_values

    for name, field in Decoding.model_fields.items():
        if name == "do_sample":  # a temperature or top_p turns it on
            continue
        text = f"{field.description} {allowed_values(name).capitalize()}"
        text += f"; {field.default} in the paper." if name in PAPER.generate_options() else "."
        yield _parameter(name, field.annotation, text)


def _placement_parameters() -> Iterator[inspect.Parameter]:
    from instructblip.model.placement import Placement

    for name, field in Placement.model_fields.items():
        yield _parameter(name, str, field.description or "")


def _parameter(name: str, kind: Any, text: str) -> inspect.Parameter:
    option = Annotated[kind | None, Option(help=text)]
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=option)


SETTINGS = {"decoding": _decoding_parameters, "placement": _placement_parameters}
"""What stands for these parameters on the command line."""


def run_in(folder: str | Path) -> Path:
    """The run in a folder that `tune` wrote; any other model or run as it is."""
    run = Path(folder) / "run"
    return run if (run / "recipe.yaml").is_file() else Path(folder)


def read_recipe(recipe: str, overrides: list[str] | None) -> "Recipe":
    """The recipe of a command's arguments."""
    from instructblip.recipe.load import load_recipe

    return load_recipe(recipe, overrides or [])
