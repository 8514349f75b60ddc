"""The commands that measure a model: evaluating, comparing, reporting."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from typer import Argument, Option

from instructblip.cli.options import (
    Benchmarks,
    Limit,
    Settings,
    SettingsCommand,
    complete_either,
    read_recipe,
    run_in,
    to_dir,
    to_file,
)

if TYPE_CHECKING:
    from rich.table import Table

app = typer.Typer()

TableForm = Literal["table", "markdown", "latex", "json"]


@app.command(cls=SettingsCommand)
def evaluate(
    arguments: Annotated[
        list[str],
        Argument(
            metavar="[RECIPE] MODEL [A.B=C]...",
            help="A run or model directory, `starter` or `small`; its recipe, if another, first.",
            autocompletion=complete_either,
        ),
    ],
    benchmarks: Benchmarks = None,
    out: Annotated[Path | None, to_dir("Result folder; out/results/<model> by default.")] = None,
    limit: Limit = None,
    batch_size: Annotated[str | None, Option(help="Samples at a time, or `auto`.")] = None,
    prompts: Annotated[int, Option(min=0, help="Other wordings to answer each set under.")] = 0,
    blind: Annotated[bool, Option("--blind", help="Swap the images: the blind control.")] = False,
    placement: Settings = None,
) -> None:
    """Answer benchmarks with a model, sample by sample on disk; an interrupted run resumes there.

    Under torchrun all ranks share the samples.
    """
    from instructblip.experiment.evaluate import evaluate as run
    from instructblip.experiment.evaluate import recipe_of

    overrides = [text for text in arguments if _is_override(text)]
    names = [text for text in arguments if text not in overrides]
    if len(names) not in (1, 2):
        raise ValueError(f"expected [RECIPE] MODEL [A.B=C]...; got {' '.join(names) or 'no model'}")
    model = names[-1]
    overrides += _evaluation_overrides(benchmarks, limit, batch_size, **(placement or {}))
    overrides += [f"evaluation.wordings={prompts}"] if prompts else []
    recipe = read_recipe(names[0] if len(names) == 2 else recipe_of(model), overrides)
    folder = out or Path("out/results") / (Path(model).resolve().name + ("_blind" if blind else ""))
    run(recipe, model, folder, blind_seed=0 if blind else None)


@app.command(cls=SettingsCommand)
def calibrate(
    arguments: Annotated[
        list[str],
        Argument(
            metavar="[RECIPE] MODEL [A.B=C]...",
            help="A run or model directory; its recipe, if another, first.",
        ),
    ],
    benchmarks: Annotated[
        str | None, Option(help="Sets that it was not trained on; those of its validation.")
    ] = None,
    split: Annotated[str | None, Option(help="Of the sets; val, and never test.")] = None,
    limit: Annotated[int, Option(help="Samples of each set.", min=1)] = 1000,
    placement: Settings = None,
) -> None:
    """Fit how far a model's answers can be trusted, and store it beside the model.

    `answer`, `serve` and `evaluate` then give confidences.
    """
    from instructblip.experiment.calibrate import calibrate as run
    from instructblip.experiment.calibrate import note
    from instructblip.experiment.evaluate import recipe_of

    overrides = [text for text in arguments if _is_override(text)]
    names = [text for text in arguments if text not in overrides]
    if len(names) not in (1, 2):
        raise ValueError(f"expected [RECIPE] MODEL [A.B=C]...; got {' '.join(names) or 'no model'}")
    overrides += _evaluation_overrides(None, None, **(placement or {}))
    model = names[-1] if "://" in names[-1] else str(run_in(names[-1]))
    recipe = read_recipe(names[0] if len(names) == 2 else recipe_of(model), overrides)
    chosen = [name.strip() for name in benchmarks.split(",")] if benchmarks else []
    fitted, path = run(recipe, model, chosen, split, limit)
    print(fitted.report)
    if text := note(fitted.calibration):
        print(text)
    print(path)
    print(f"Its answers have confidences now:\n  instructblip serve --model {model}")


@app.command()
def compare(
    models: Annotated[
        list[Path],
        Argument(
            metavar="FOLDER... [A.B=C]...",
            help="Result folders of `evaluate`, or models, which are evaluated first.",
        ),
    ],
    form: Annotated[TableForm, Option("--format", help="Of the printed tables.")] = "table",
    recipe: Annotated[str | None, Option(help="Recipe for models; else that beside each.")] = None,
    benchmarks: Benchmarks = None,
    limit: Limit = None,
    out: Annotated[Path, to_dir("Where results of models go.")] = Path("out/results"),
    intervals: Annotated[bool, Option("--intervals", help="Show 95 % intervals.")] = False,
) -> None:
    """Print the scores of two or more models side by side, each compared with the first.

    A model is a run, a BLIP-2, an InstructBLIP or any transformers image-text-to-text directory.
    """
    from instructblip.evaluation import tables
    from instructblip.evaluation.compare import compare as compare_results
    from instructblip.evaluation.result import load_results, select_results

    paths = [path for path in models if not _is_override(str(path))]
    overrides = [str(path) for path in models if path not in paths]
    if (recipe or overrides or limit is not None) and not any(map(_is_model, paths)):
        raise ValueError(
            "results stand as they were evaluated: leave out --recipe, --limit and A.B=C, or give "
            "models"
        )
    overrides += _evaluation_overrides(benchmarks, limit)
    names = [path.name for path in paths]
    folders = [
        _evaluated(path, recipe, overrides, out / _name_of(path, names.count(path.name) > 1))
        for path in paths
    ]
    results = load_results(folders)
    if benchmarks:
        results = select_results(results, [name.strip() for name in benchmarks.split(",")])
    comparison = compare_results(results)
    if form == "table":
        _print_tables(tables.to_rich(comparison, intervals), tables.measured_with(comparison))
    elif form == "json":
        print(json.dumps(tables.to_json(comparison), indent=2))
    else:
        print(tables.to_latex(comparison) if form == "latex" else tables.to_markdown(comparison))


@app.command()
def reproduce(
    arguments: Annotated[
        list[str] | None,
        Argument(metavar="[NAME]... [A.B=C]...", help="Disputed scores; all if absent."),
    ] = None,
    model: Annotated[str | None, Option(help="A model to evaluate; without, the list.")] = None,
    limit: Limit = None,
    out: Annotated[Path, to_dir("Result folder.")] = Path("out/reproduce"),
) -> None:
    """List ten published scores that others did not reproduce, or evaluate a model under the
    settings of each: that of the paper, and those of the threads."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from instructblip.evaluation.disputed import DISPUTED
    from instructblip.experiment.evaluate import recipe_of
    from instructblip.experiment.evaluate import reproduce as run

    given = arguments or []
    names = [name for name in given if name in DISPUTED] or list(DISPUTED)
    overrides = [text for text in given if text not in DISPUTED]
    if unknown := [text for text in overrides if not _is_override(text)]:
        raise ValueError(f"{unknown[0]!r} is none of the scores: {', '.join(DISPUTED)}")
    if model is None and (overrides or limit is not None):
        raise ValueError("settings and --limit are those of an evaluation: give --model as well")
    results = {}
    if model is not None:
        overrides += _evaluation_overrides(None, limit)
        results = run(read_recipe(recipe_of(model), overrides), model, names, out)
    table = Table(title="Disputed scores", title_justify="left")
    columns = ("score", "setting", "paper", "thread", *(["this model"] if results else []))
    for column in columns:
        table.add_column(column, justify="left" if column in ("score", "setting") else "right")
    for name in names:
        entry = DISPUTED[name]
        for setting in entry.settings:
            first = setting == "paper"
            cells = [
                f"{name} ({entry.model})" if first else "",
                setting,
                _one_decimal(entry.published) if first else "",
                _one_decimal(entry.reported(setting)),
            ]
            if results:
                result = results[name][setting]
                bounds = result.interval
                brackets = f" [{bounds.low:.1f}, {bounds.high:.1f}]" if bounds else ""
                cells.append(_one_decimal(result.value) + brackets)
            table.add_row(*map(Text, cells))
        table.add_section()
    console = Console()
    console.print(table)
    for name in names:
        print(f"{name}: {DISPUTED[name].why} {DISPUTED[name].thread}")


def _one_decimal(score: float | None) -> str:
    return "–" if score is None else f"{score:.1f}"


@app.command()
def report(
    folders: Annotated[list[Path], Argument(help="Result folders of `evaluate`.")],
    out: Annotated[Path, to_file("The HTML file.")] = Path("out/report.html"),
    run: Annotated[list[Path] | None, Option(help="Run directory: its curves.")] = None,
    baseline: Annotated[str | None, Option(help="Folder to compare with; else the first.")] = None,
    drawn: Annotated[Path | None, Option(help="Images of benchmarks/draw.py --out.")] = None,
    images: Annotated[
        list[Path] | None, Option(help="Folder that images may come from; the working directory.")
    ] = None,
) -> None:
    """Write tables, charts, a gallery of answers and curves into one offline HTML file."""
    from instructblip.core.version import __version__
    from instructblip.evaluation.report import is_shown, write_report
    from instructblip.evaluation.result import load_results

    runs = run or []
    for folder in runs:
        if not (folder / "metrics.jsonl").is_file():
            raise FileNotFoundError(f"{folder} holds no metrics.jsonl: give the folder of a run")
    roots = images or [Path()]  # results name the folder of their images, and others may write them
    results = load_results(folders)
    page = write_report(
        out,
        results,
        image_roots=roots,
        baseline=baseline,
        curves={folder.name: folder / "metrics.jsonl" for folder in runs},
        facts={"version": __version__},
        drawn=drawn,
    )
    places = {r.image_root for each in results.values() for r in each if not is_shown(r, roots)}
    for place in sorted(places):
        print(f"images in {place} are left out: --images {place} shows them")
    print(page)


def _evaluation_overrides(
    benchmarks: str | None, limit: int | None, batch_size: str | None = None, **placement: str
) -> list[str]:
    names = benchmarks and f"[{benchmarks}]"
    given = {"benchmarks": names, "limit": limit, "batch_size": batch_size, **placement}
    return [f"evaluation.{key}={value}" for key, value in given.items() if value is not None]


def _is_override(text: str) -> bool:
    return "=" in text and not Path(text).exists()  # a folder may be called lr=1


def _is_model(path: Path) -> bool:
    from instructblip.model.checkpoints.directory import NAMES

    return str(path) in NAMES or any(
        (folder / "config.json").is_file() for folder in (path, path / "best", path / "last")
    )


def _name_of(path: Path, whole: bool) -> str:
    """The name of a model's results: that of its folder, or its ``whole`` path in one word."""
    return "_".join(p for p in path.parts if p.strip("./")) if whole else path.resolve().name


def _evaluated(path: Path, recipe: str | None, overrides: list[str], folder: Path) -> Path:
    """A folder of results: ``path`` itself, or ``folder`` with those of the model at ``path``."""
    from instructblip.experiment.evaluate import evaluate as run
    from instructblip.experiment.evaluate import recipe_of

    if not _is_model(path):
        return path
    run(read_recipe(recipe or recipe_of(str(path)), overrides), str(path), folder)
    return folder


def _print_tables(shown: "Sequence[Table]", notes: Sequence[str]) -> None:
    from instructblip.core.progress import Terminal
    from instructblip.core.terminal import escape

    console = Terminal()
    if not console.is_terminal:
        console = Terminal(width=max(160, console.width))
    for table in shown:
        console.print(table)
    for note in notes:
        console.print(escape(note), style="dim", soft_wrap=True)
