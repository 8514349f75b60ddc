"""The command line: `instructblip STAGE ...`.

A mistake of the user's is one line and exit code 2; `--debug` shows where it was noticed.
"""

import sys
import warnings
from pathlib import Path
from typing import Annotated, cast, get_args

import typer

from instructblip import stages

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
Resume = Annotated[bool, typer.Option("--resume", help="Continue where an earlier run stopped.")]


@app.callback()
def _options(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """`--debug` is taken out of the arguments by `main`; it stands here for the help."""


@app.command()
def quickstart(
    overrides: Overrides = None,
    out: Annotated[Path, typer.Option(help="Folder of data, run and results.")] = Path(
        "out/quickstart"
    ),
    resume: Resume = False,
    scale: Annotated[float, typer.Option(help="Size of the data sets; 1 for all.")] = 1.0,
) -> None:
    """Tune a small BLIP-2 on the embedded world and compare before and after: minutes, offline."""
    stages.quickstart(out, overrides or [], resume, scale)


@app.command()
def scenes(
    root: Annotated[Path, typer.Argument(help="Folder to write to.")] = Path("data/scenes"),
    seed: Annotated[int, typer.Option(help="Another seed is another world.")] = 0,
    scale: Annotated[float, typer.Option(help="Size of the data sets; 1 for all.")] = 1.0,
) -> None:
    """Write the embedded world in the official file formats."""
    stages.scenes(root, seed, scale)


@app.command()
def prepare(recipe: RecipeName, overrides: Overrides = None) -> None:
    """Read, verify and index the data sets of a recipe; print its mixture."""
    from instructblip.recipe import load_recipe

    stages.prepare(load_recipe(recipe, overrides or []))


@app.command()
def cache(recipe: RecipeName, overrides: Overrides = None) -> None:
    """Compute the image features of a recipe's pictures once, for all its runs."""
    from instructblip.recipe import load_recipe

    stages.cache(load_recipe(recipe, overrides or []))


@app.command()
def train(
    recipe: RecipeName,
    overrides: Overrides = None,
    out: Annotated[
        Path | None, typer.Option(help="Run directory; out/<recipe> by default.")
    ] = None,
    resume: Resume = False,
) -> None:
    """Tune the model of a recipe."""
    from instructblip.recipe import load_recipe

    resolved = load_recipe(recipe, overrides or [])
    stages.train(resolved, out or Path("out") / Path(recipe).stem, resume)


@app.command()
def evaluate(
    recipe: RecipeName,
    model: Annotated[str, typer.Argument(help="A run or model directory, or `starter`.")],
    overrides: Overrides = None,
    out: Annotated[
        Path | None, typer.Option(help="Result folder; out/results/<model> by default.")
    ] = None,
    blind: Annotated[
        bool, typer.Option("--blind", help="Swap the pictures between samples: the control.")
    ] = False,
) -> None:
    """Answer the benchmarks of a recipe with a model."""
    from instructblip.recipe import load_recipe

    name = Path(model).name + ("_blind" if blind else "")
    resolved = load_recipe(recipe, overrides or [])
    stages.evaluate(
        resolved, model, out or Path("out/results") / name, blind_seed=0 if blind else None
    )


@app.command()
def draw(
    instruction: Annotated[str, typer.Argument(help="What to draw.")],
    out: Annotated[Path, typer.Option(help="The picture file.")] = Path("drawn.png"),
    image: Annotated[Path | None, typer.Option(help="A picture to take from.")] = None,
    model: Annotated[str, typer.Option(help="A directory that draws, or `starter`.")] = "starter",
    num_images: Annotated[int, typer.Option(help="Number of pictures.")] = 1,
    seed: Annotated[int | None, typer.Option(help="The same seed draws the same.")] = None,
    steps: Annotated[int, typer.Option(help="Steps from noise to picture.")] = 20,
    guidance: Annotated[float, typer.Option(help="How strictly to follow; 1 is plain.")] = 2.0,
    image_guidance: Annotated[
        float | None, typer.Option(help="The same for --image; by default as --guidance.")
    ] = None,
) -> None:
    """Draw what an instruction says, on its own or about a picture."""
    stages.draw(instruction, out, model, image, num_images, seed, steps, guidance, image_guidance)


Folders = Annotated[list[Path], typer.Argument(help="Result folders of `evaluate`.")]


@app.command()
def compare(
    folders: Folders,
    form: Annotated[
        str, typer.Option("--format", help="table, markdown, latex or json.")
    ] = "table",
) -> None:
    """Put the figures of two or more models side by side, each held to the first."""
    if form not in get_args(stages.Form):
        raise ValueError(f"--format {form}: expected one of {', '.join(get_args(stages.Form))}")
    stages.compare(folders, cast("stages.Form", form))


@app.command()
def report(
    folders: Folders,
    out: Annotated[Path, typer.Option(help="The HTML file.")] = Path("out/report.html"),
    run: Annotated[list[Path] | None, typer.Option(help="Run directory: its curves.")] = None,
) -> None:
    """Write tables, a gallery of answers and curves into one offline HTML file."""
    print(stages.report(folders, out, run or []))


def main(arguments: list[str] | None = None) -> None:
    """Entry point of the command `instructblip`."""
    arguments = sys.argv[1:] if arguments is None else arguments
    debug = "--debug" in arguments
    if not debug:
        warnings.formatwarning = lambda message, *_args, **_kwargs: f"warning: {message}\n"
    try:
        app(args=[a for a in arguments if a != "--debug"], prog_name="instructblip")
    except (ValueError, OSError) as error:
        if debug:
            raise
        print(f"instructblip: {describe(error)}", file=sys.stderr)
        sys.exit(2)


def describe(error: Exception) -> str:
    """An error as one message, without the number that the system gives it."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    return str(error)
