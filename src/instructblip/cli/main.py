"""The command line: `instructblip STAGE ...`.

A mistake of the user's is one line and exit code 2; `--debug` shows where it was noticed.
"""

import sys
import warnings
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, cast

import typer

from instructblip.cli import stages
from instructblip.cli.measure import app as measure
from instructblip.cli.use import Model
from instructblip.cli.use import app as use

app = typer.Typer(
    name="instructblip",
    help="Instruction tuning of vision-language models: from a BLIP-2 to an InstructBLIP.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

RecipeName = Annotated[str, typer.Argument(help="A YAML file, or the name of a shipped recipe.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[A.B=C]...", help="Settings in place of the recipe's."),
]
Scale = Annotated[float, typer.Option(help="Size of the data sets; 1 for all.")]
Resume = Annotated[bool, typer.Option("--resume", help="Continue where an earlier run stopped.")]


@app.callback()
def _options(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """`--debug` is taken out of the arguments by `main`; it stands here for the help."""


@app.command()
def quickstart(
    overrides: Overrides = None,
    out: Annotated[
        Path, typer.Option(help="Folder of data, run and results.", file_okay=False)
    ] = Path("out/quickstart"),
    resume: Resume = False,
    scale: Scale = 1.0,
) -> None:
    """Tune a small BLIP-2 on the embedded world and compare before and after: minutes, offline."""
    stages.quickstart(out, overrides or [], resume, scale)


@app.command()
def scenes(
    root: Annotated[Path, typer.Argument(help="Folder to write to.", file_okay=False)] = Path(
        "data/scenes"
    ),
    seed: Annotated[int, typer.Option(help="Another seed is another world.")] = 0,
    scale: Scale = 1.0,
) -> None:
    """Write the embedded world in the official file formats."""
    stages.scenes(root, seed, scale)


@app.command()
def prepare(
    recipe: RecipeName,
    overrides: Overrides = None,
    workers: Annotated[
        int | None, typer.Option(help="Data sets read at a time; one a core by default.")
    ] = None,
    export: Annotated[
        str | None, typer.Option(help="Write samples: llava, sharegpt, messages or parquet.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder of the export.", file_okay=False)] = Path(
        "out/export"
    ),
) -> None:
    """Read, verify and index the data sets of a recipe; print its mixture."""
    from instructblip.recipe.load import load_recipe

    stages.prepare(
        load_recipe(recipe, overrides or []), workers, cast("stages.DataForm | None", export), out
    )


@app.command()
def check(
    recipe: RecipeName,
    overrides: Overrides = None,
    decode: Annotated[
        bool, typer.Option("--decode", help="Decode every picture whole; slower.")
    ] = False,
) -> None:
    """Find what is wrong with the data sets of a recipe, before training does; 1 if too much."""
    from instructblip.recipe.load import load_recipe

    if not stages.check(load_recipe(recipe, overrides or []), decode):
        raise typer.Exit(1)


@app.command()
def show(
    recipe: RecipeName,
    overrides: Overrides = None,
    count: Annotated[
        int, typer.Option("-n", "--count", min=1, help="Samples of each data set.")
    ] = 2,
    html: Annotated[
        Path | None, typer.Option(help="Write a page instead of printing.", dir_okay=False)
    ] = None,
) -> None:
    """Show training samples as the model gets them: picture, texts, and what carries loss."""
    from instructblip.recipe.load import load_recipe

    stages.show(load_recipe(recipe, overrides or []), count, html)


@app.command()
def cache(recipe: RecipeName, overrides: Overrides = None) -> None:
    """Compute the image features of a recipe's pictures once, for all its runs."""
    from instructblip.recipe.load import load_recipe

    stages.cache(load_recipe(recipe, overrides or []))


@app.command()
def memory(
    recipe: RecipeName,
    overrides: Overrides = None,
    devices: Annotated[int, typer.Option(min=1, help="How many devices share a batch.")] = 1,
    gigabytes: Annotated[
        float | None, typer.Option(help="GiB of each; by default those of the GPU here.")
    ] = None,
) -> None:
    """Predict the memory that a recipe needs on each device, without loading anything."""
    from instructblip.recipe.load import load_recipe

    stages.memory(load_recipe(recipe, overrides or []), devices, gigabytes)


@app.command()
def train(
    recipe: RecipeName,
    overrides: Overrides = None,
    out: Annotated[
        Path | None, typer.Option(help="Run directory; out/<recipe> by default.", file_okay=False)
    ] = None,
    resume: Resume = False,
) -> None:
    """Tune the model of a recipe."""
    from instructblip.recipe.load import load_recipe

    resolved = load_recipe(recipe, overrides or [])
    stages.train(resolved, out or Path("out") / Path(recipe).stem, resume)


@app.command()
def tune(
    root: Annotated[Path, typer.Argument(help="Folder of pictures with captions or questions.")],
    overrides: Overrides = None,
    model: Model = "starter",
    out: Annotated[
        Path, typer.Option(help="Folder of run, results and report.", file_okay=False)
    ] = Path("out/tuned"),
    resume: Resume = False,
) -> None:
    """Tune a model on a folder of your own: check, split, tune, evaluate before and after."""
    stages.tune(root, model, out, overrides or [], resume)


@app.command()
def pretrain(
    recipe: RecipeName,
    overrides: Overrides = None,
    stage: Annotated[int, typer.Option(min=1, max=2, help="1: see; 2: tell.")] = 1,
    out: Annotated[Path | None, typer.Option(help="Run directory.", file_okay=False)] = None,
    resume: Resume = False,
) -> None:
    """Run a stage of BLIP-2's pre-training for a new pair of image encoder and language model."""
    from instructblip.recipe.load import load_recipe

    resolved = load_recipe(recipe, overrides or [])
    folder = out or Path("out") / f"{Path(recipe).stem}_stage{stage}"
    stages.pretrain(resolved, stage, folder, resume)


app.add_typer(measure)
app.add_typer(use)


def main(arguments: list[str] | None = None) -> None:
    """Entry point of the command `instructblip`."""
    arguments = sys.argv[1:] if arguments is None else arguments
    debug = "--debug" in arguments
    if not debug:
        warnings.formatwarning = lambda message, *_args, **_kwargs: f"warning: {message}\n"
        # the paper's penalty is on the answer's own tokens alone, which transformers warns of
        warnings.filterwarnings("ignore", "Passing `repetition_penalty` with `inputs_embeds`")
    try:
        _refuse_empty(arguments)
        app(args=[a for a in arguments if a != "--debug"], prog_name="instructblip")
    except (ValueError, OSError) as error:
        if debug:
            raise
        print(f"instructblip: {describe(error)}", file=sys.stderr)
        sys.exit(2)


def _problem(detail: Mapping[str, Any]) -> str:
    """One of pydantic's: the key, what it expects, what it got; or what a check of ours said."""
    message = detail["msg"].removeprefix("Value error, ")
    key = ".".join(map(str, detail["loc"]))
    return f"{key}: {message} (got {detail['input']!r})" if key else message


def _refuse_empty(arguments: list[str]) -> None:
    """ValueError for an argument without a character, as a script's unset variable leaves one."""
    for before, text in pairwise(["", *arguments]):
        option, equals, value = text.partition("=")
        if option.startswith("--") and equals and not value:
            name = option
        elif text:
            continue
        elif before.startswith("--"):
            name = before
        else:
            name = f"the argument after {before}" if before else "the first argument"
        raise ValueError(f"{name} is empty: give a value; is a variable unset?")


def describe(error: Exception) -> str:
    """An error as one message, without the number that the system gives it."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    if isinstance(error, ValueError):
        from pydantic import ValidationError

        if isinstance(error, ValidationError):
            return f"{error.title}: " + "; ".join(map(_problem, error.errors()))
    return str(error)
