"""The command line: `instructblip COMMAND ...`.

A command is a function in the files beside this one, and its signature is the command's options.
A user's mistake is one line and exit code 2; `--debug` shows where it was noticed. Commands import
what they need when they run, so that `instructblip --help` stays fast.
"""

import platform
import sys
import warnings
from importlib.metadata import version
from itertools import pairwise
from typing import Annotated

import typer

from instructblip.cli import data, evaluation, models, tools, training
from instructblip.core.problems import problems
from instructblip.core.terminal import escape_output
from instructblip.core.version import __version__

app = typer.Typer(
    name="instructblip",
    help="Instruction tuning of vision-language models: from a BLIP-2 to an InstructBLIP.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def _version(asked: bool) -> None:
    if asked:
        used = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers"))
        print(f"instructblip {__version__} (Python {platform.python_version()}, {used})")
        raise typer.Exit


@app.callback()
def _options(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    _version: Annotated[
        bool,
        typer.Option("--version", help="Show the versions.", callback=_version, is_eager=True),
    ] = False,
) -> None:
    """`--debug` is taken out of the arguments by `main`; it stands here for the help."""


for commands in (training, data, evaluation, models, tools):
    app.add_typer(commands.app)


def main(arguments: list[str] | None = None) -> None:
    """Entry point of the command `instructblip`."""
    arguments = sys.argv[1:] if arguments is None else arguments
    debug = "--debug" in arguments
    escape_output()
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
            return f"{error.title}: {problems(error)}"
    return str(error)
