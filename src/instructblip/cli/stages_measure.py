"""How good a model is, one function a stage, as in ``stages``: evaluating, comparing, reporting."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from rich.table import Table

    from instructblip.evaluation.report import DrawnSet
    from instructblip.evaluation.result import Result
    from instructblip.recipe.schema import Recipe

RECIPE_FILE = "recipe.yaml"
Form = Literal["table", "markdown", "latex", "json"]


def evaluate(
    recipe: "Recipe",
    model: str,
    out: Path,
    blind_seed: int | None = None,
    instruction_aware: bool | None = None,
) -> "list[Result]":
    """Answer the recipe's benchmarks with ``model``; one folder of ``out`` for each."""
    from instructblip.experiment.evaluate import evaluate as run

    return run(recipe, model, out, blind_seed, instruction_aware)


def compare(
    models: Sequence[Path],
    form: Form = "table",
    recipe: str | None = None,
    overrides: Sequence[str] = (),
    out: Path = Path("out/results"),
    intervals: bool = False,
    benchmarks: Sequence[str] = (),
) -> None:
    """Print the figures of result folders or models, each held to the first.

    A model (ours, or a transformers directory) is evaluated first, into a folder of ``out``; the
    recipe is the first model's own unless given. Names of sets or groups in ``benchmarks`` choose
    what is shown.
    """
    from instructblip.evaluation import compare as comparing
    from instructblip.evaluation import tables
    from instructblip.evaluation.result import load_results

    if (recipe or overrides) and not any(map(_is_model, models)):
        raise ValueError(
            "results stand as they were evaluated: leave out --recipe, --limit and A.B=C, or give "
            "models"
        )
    if benchmarks:
        overrides = [*overrides, f"evaluation.benchmarks=[{', '.join(benchmarks)}]"]
    names = [path.name for path in models]
    folders = [
        _evaluated(path, recipe, overrides, out / _name_of(path, names.count(path.name) > 1))
        for path in models
    ]
    results = load_results(folders)
    comparison = comparing.compare(_chosen(results, benchmarks) if benchmarks else results)
    if form == "table":
        _print_tables(tables.to_rich(comparison, intervals), tables.measured_with(comparison))
    elif form == "json":
        print(json.dumps(tables.to_json(comparison), indent=2))
    else:
        print(tables.to_latex(comparison) if form == "latex" else tables.to_markdown(comparison))


def _name_of(path: Path, whole: bool) -> str:
    """What a model's results are called: the name of its folder, or its path in one word."""
    return "_".join(p for p in path.parts if p.strip("./")) if whole else path.resolve().name


def _evaluated(path: Path, recipe: str | None, overrides: Sequence[str], folder: Path) -> Path:
    """A folder of results: ``path`` itself, or ``folder`` with those of the model it is."""
    from instructblip.recipe.load import load_recipe

    if not _is_model(path):
        return path
    evaluate(load_recipe(recipe or recipe_of(str(path)), overrides), str(path), folder)
    return folder


def _is_model(path: Path) -> bool:
    return str(path) == "starter" or any(
        (folder / "config.json").is_file() for folder in (path, path / "best", path / "last")
    )


def _chosen(
    results: "dict[str, list[Result]]", benchmarks: Sequence[str]
) -> "dict[str, list[Result]]":
    """The results of the sets or groups called ``benchmarks``; ValueError for one without any."""
    from instructblip.evaluation.benchmarks import groups_of

    names = {
        one.benchmark: {one.benchmark, *groups_of(one.benchmark, one.role)}
        for own in results.values()
        for one in own
    }
    absent = set(benchmarks).difference(*names.values())
    if absent:
        raise ValueError(
            f"no results of {', '.join(sorted(absent))}: there are {', '.join(sorted(names))}"
        )
    return {
        model: [one for one in own if names[one.benchmark].intersection(benchmarks)]
        for model, own in results.items()
    }


def _print_tables(shown: "Sequence[Table]", notes: Sequence[str]) -> None:
    from rich.console import Console

    console = Console()
    if not console.is_terminal:
        console = Console(width=max(160, console.width))
    for table in shown:
        console.print(table)
    for note in notes:
        console.print(note, style="dim", highlight=False, markup=False, soft_wrap=True)


def recipe_of(model: str) -> str:
    from instructblip.experiment.evaluate import recipe_of as find

    return find(model)


def report(
    folders: Sequence[Path],
    out: Path,
    runs: Sequence[Path] = (),
    baseline: str | None = None,
    drawn: Path | None = None,
) -> Path:
    """Write one offline HTML file: tables and charts against ``baseline`` (the first), a gallery
    of answers, drawn pictures, the curves of ``runs``."""
    from instructblip.core.version import __version__
    from instructblip.evaluation.report import write_report
    from instructblip.evaluation.result import load_results

    for run in runs:
        if not (run / "metrics.jsonl").is_file():
            raise FileNotFoundError(f"{run} holds no metrics.jsonl: give the folder of a run")
    return write_report(
        out,
        load_results(folders),
        baseline=baseline,
        curves={run.name: run / "metrics.jsonl" for run in runs},
        facts={"version": __version__},
        drawn=drawn_sets(drawn) if drawn else (),
    )


def drawn_sets(folder: Path) -> "list[DrawnSet]":
    """The images that ``benchmarks/draw.py --out`` wrote into ``folder``, for the report."""
    from instructblip.evaluation.report import DrawnImage, DrawnSet
    from instructblip.text_to_image.gallery import read_drawings

    return [
        DrawnSet(
            kind.kind.replace("_", " "),
            folder,
            asdict(kind.figures),
            [DrawnImage(d.prompt, d.picture, d.subject, d.right) for d in kind.drawings],
        )
        for kind in read_drawings(folder)
    ]
