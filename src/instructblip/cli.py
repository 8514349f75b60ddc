"""The command line: `instructblip STAGE ...`.

A mistake of the user's is one line and exit code 2; `--debug` shows where it was noticed.
"""

import sys
import warnings
from pathlib import Path
from typing import Annotated, cast, get_args

import typer

from instructblip import stages
from instructblip.cli_use import Model
from instructblip.cli_use import app as use

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
def prepare(
    recipe: RecipeName,
    overrides: Overrides = None,
    workers: Annotated[
        int | None, typer.Option(help="Data sets read at a time; one a core by default.")
    ] = None,
    export: Annotated[
        str | None, typer.Option(help="Write samples: llava, sharegpt, messages or parquet.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder of the export.")] = Path("out/export"),
) -> None:
    """Read, verify and index the data sets of a recipe; print its mixture."""
    from instructblip.recipe import load_recipe

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
    from instructblip.recipe import load_recipe

    if not stages.check(load_recipe(recipe, overrides or []), decode):
        raise typer.Exit(1)


@app.command()
def show(
    recipe: RecipeName,
    overrides: Overrides = None,
    count: Annotated[int, typer.Option("-n", "--count", help="Samples of each data set.")] = 2,
    html: Annotated[Path | None, typer.Option(help="Write a page instead of printing.")] = None,
) -> None:
    """Show training samples as the model gets them: picture, texts, and what carries loss."""
    from instructblip.recipe import load_recipe

    stages.show(load_recipe(recipe, overrides or []), count, html)


@app.command()
def cache(recipe: RecipeName, overrides: Overrides = None) -> None:
    """Compute the image features of a recipe's pictures once, for all its runs."""
    from instructblip.recipe import load_recipe

    stages.cache(load_recipe(recipe, overrides or []))


@app.command()
def memory(
    recipe: RecipeName,
    overrides: Overrides = None,
    devices: Annotated[int, typer.Option(help="How many devices share a batch.")] = 1,
    gigabytes: Annotated[
        float | None, typer.Option(help="GiB of each; by default those of the GPU here.")
    ] = None,
) -> None:
    """Predict the memory that a recipe needs on each device, without loading anything."""
    from instructblip.recipe import load_recipe

    stages.memory(load_recipe(recipe, overrides or []), devices, gigabytes)


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
def tune(
    root: Annotated[Path, typer.Argument(help="Folder of pictures with captions or questions.")],
    overrides: Overrides = None,
    model: Model = "starter",
    out: Annotated[Path, typer.Option(help="Folder of run, results and report.")] = Path(
        "out/tuned"
    ),
) -> None:
    """Tune a model on a folder of your own: check, split, tune, evaluate before and after."""
    stages.tune(root, model, out, overrides or [])


Benchmarks = Annotated[
    str | None, typer.Option(help="Benchmarks or groups, with commas; else the recipe's.")
]
Limit = Annotated[int | None, typer.Option(help="Samples of each set; all if absent.")]


def _evaluation_overrides(
    benchmarks: str | None, limit: int | None, batch_size: str | None = None
) -> list[str]:
    given = {
        "benchmarks": benchmarks and f"[{benchmarks}]",
        "limit": limit,
        "batch_size": batch_size,
    }
    return [f"evaluation.{key}={value}" for key, value in given.items() if value is not None]


@app.command()
def pretrain(
    recipe: RecipeName,
    overrides: Overrides = None,
    stage: Annotated[int, typer.Option(min=1, max=2, help="1: see; 2: tell.")] = 1,
    out: Annotated[Path | None, typer.Option(help="Run directory.")] = None,
    resume: Resume = False,
) -> None:
    """Run a stage of BLIP-2's pre-training for a new pair of image encoder and language model."""
    from instructblip.recipe import load_recipe

    resolved = load_recipe(recipe, overrides or [])
    folder = out or Path("out") / f"{Path(recipe).stem}_stage{stage}"
    stages.pretrain(resolved, stage, folder, resume)


@app.command()
def evaluate(
    arguments: Annotated[
        list[str],
        typer.Argument(
            metavar="[RECIPE] MODEL [A.B=C]...",
            help="A run or model directory, or `starter`; before it a recipe, if not the model's.",
        ),
    ],
    benchmarks: Benchmarks = None,
    out: Annotated[
        Path | None, typer.Option(help="Result folder; out/results/<model> by default.")
    ] = None,
    limit: Limit = None,
    batch_size: Annotated[
        str | None, typer.Option(help="Samples at a time, or `auto`; changes no answer.")
    ] = None,
    blind: Annotated[
        bool, typer.Option("--blind", help="Swap the pictures between samples: the control.")
    ] = False,
) -> None:
    """Answer benchmarks with a model, sample by sample on disk; a stopped run goes on there.

    Under torchrun all ranks share the samples.
    """
    from instructblip.recipe import load_recipe

    names = [text for text in arguments if "=" not in text]
    overrides = [text for text in arguments if "=" in text]
    if len(names) not in (1, 2):
        raise ValueError(f"expected [RECIPE] MODEL [A.B=C]...; got {' '.join(names) or 'no model'}")
    model = names[-1]
    overrides += _evaluation_overrides(benchmarks, limit, batch_size)
    recipe = load_recipe(names[0] if len(names) == 2 else stages.recipe_of(model), overrides)
    folder = out or Path("out/results") / (Path(model).name + ("_blind" if blind else ""))
    stages.evaluate(recipe, model, folder, blind_seed=0 if blind else None)


Folders = Annotated[list[Path], typer.Argument(help="Result folders of `evaluate`.")]


@app.command()
def compare(
    models: Annotated[
        list[Path],
        typer.Argument(
            metavar="FOLDER... [A.B=C]...",
            help="Result folders of `evaluate`, or models, which are evaluated first.",
        ),
    ],
    form: Annotated[
        str, typer.Option("--format", help="table, markdown, latex or json.")
    ] = "table",
    recipe: Annotated[
        str | None, typer.Option(help="Recipe for models; else the model's own.")
    ] = None,
    benchmarks: Benchmarks = None,
    limit: Limit = None,
    out: Annotated[Path, typer.Option(help="Where results of models go.")] = Path("out/results"),
    intervals: Annotated[
        bool, typer.Option("--intervals", help="95 % intervals in the terminal's table as well.")
    ] = False,
) -> None:
    """Put the figures of two or more models side by side, each held to the first.

    A model is a run, a BLIP-2, an InstructBLIP or any transformers image-text-to-text directory.
    """
    if form not in get_args(stages.Form):
        raise ValueError(f"--format {form}: expected one of {', '.join(get_args(stages.Form))}")
    names = [path for path in models if "=" not in str(path)]
    overrides = [str(path) for path in models if "=" in str(path)]
    overrides += _evaluation_overrides(benchmarks, limit)
    stages.compare(names, cast("stages.Form", form), recipe, overrides, out, intervals)


@app.command()
def report(
    folders: Folders,
    out: Annotated[Path, typer.Option(help="The HTML file.")] = Path("out/report.html"),
    run: Annotated[list[Path] | None, typer.Option(help="Run directory: its curves.")] = None,
    baseline: Annotated[
        str | None, typer.Option(help="Name of the folder the others are held to; the first.")
    ] = None,
    drawn: Annotated[
        Path | None, typer.Option(help="Folder of pictures from benchmarks/draw.py --out.")
    ] = None,
) -> None:
    """Write tables, charts, a gallery of answers and curves into one offline HTML file."""
    print(stages.report(folders, out, run or [], baseline, drawn))


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
