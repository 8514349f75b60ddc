"""The commands that say how good a model is: evaluating, comparing, reporting."""

from pathlib import Path
from typing import Annotated, cast, get_args

import typer

from instructblip.cli import stages_measure as stages

app = typer.Typer()

Benchmarks = Annotated[
    str | None, typer.Option(help="Benchmarks or groups, with commas; else the recipe's.")
]
Limit = Annotated[int | None, typer.Option(help="Samples of each set; all if absent.")]


def _evaluation_overrides(**given: str | int | None) -> list[str]:
    return [f"evaluation.{key}={value}" for key, value in given.items() if value is not None]


def _is_override(text: str) -> bool:
    return "=" in text and not Path(text).exists()  # a folder may be called lr=1


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
        Path | None,
        typer.Option(help="Result folder; out/results/<model> by default.", file_okay=False),
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
    from instructblip.recipe.load import load_recipe

    overrides = [text for text in arguments if _is_override(text)]
    names = [text for text in arguments if text not in overrides]
    if len(names) not in (1, 2):
        raise ValueError(f"expected [RECIPE] MODEL [A.B=C]...; got {' '.join(names) or 'no model'}")
    model = names[-1]
    overrides += _evaluation_overrides(
        benchmarks=benchmarks and f"[{benchmarks}]", limit=limit, batch_size=batch_size
    )
    recipe = load_recipe(names[0] if len(names) == 2 else stages.recipe_of(model), overrides)
    folder = out or Path("out/results") / (Path(model).resolve().name + ("_blind" if blind else ""))
    stages.evaluate(recipe, model, folder, blind_seed=0 if blind else None)


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
    benchmarks: Annotated[
        str | None, typer.Option(help="Benchmarks or groups, with commas; else all there are.")
    ] = None,
    limit: Limit = None,
    out: Annotated[Path, typer.Option(help="Where results of models go.", file_okay=False)] = Path(
        "out/results"
    ),
    intervals: Annotated[
        bool, typer.Option("--intervals", help="95 % intervals in the terminal's table as well.")
    ] = False,
) -> None:
    """Put the figures of two or more models side by side, each held to the first.

    A model is a run, a BLIP-2, an InstructBLIP or any transformers image-text-to-text directory.
    """
    if form not in get_args(stages.Form):
        raise ValueError(f"--format {form}: expected one of {', '.join(get_args(stages.Form))}")
    names = [path for path in models if not _is_override(str(path))]
    overrides = [str(path) for path in models if path not in names]
    overrides += _evaluation_overrides(limit=limit)
    chosen = [name.strip() for name in benchmarks.split(",")] if benchmarks else []
    stages.compare(names, cast("stages.Form", form), recipe, overrides, out, intervals, chosen)


@app.command()
def report(
    folders: Annotated[list[Path], typer.Argument(help="Result folders of `evaluate`.")],
    out: Annotated[Path, typer.Option(help="The HTML file.", dir_okay=False)] = Path(
        "out/report.html"
    ),
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
