"""A folder of custom data for `check` and `tune`, read and described.

What is wrong with it, or with the arguments, is reported before torch is imported, which takes
seconds, and before a model is loaded.
"""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from instructblip.core.files import current
from instructblip.data.answers import describe_misspellings, misspellings
from instructblip.data.custom.folder import Sides, SplitBy, read_sides
from instructblip.data.custom.formats import GroupColumn, group_column
from instructblip.data.custom.rows import CustomSet
from instructblip.data.templates import Language, language_of
from instructblip.recipe.load import load_recipe, refuse_settings
from instructblip.recipe.schema import RECIPE_FILE

SET = "own"
"""The entry of ``data.sets`` that stands for the folder."""
OWN = CustomSet(SET, "imagefolder")
PACKAGE = Path(__file__).parents[1]
"""Which has the starter and the other models without a path."""


def check_folder(root: Path, overrides: Sequence[str] = ()) -> str:
    """What `tune` would read and hold back, in a few lines. ValueError as `read_sides`."""
    sides = read_sides(root, language=captions_in(overrides, None))
    return describe(sides, group_column(OWN, root, "train"))


def read_to_tune(
    root: Path,
    start: str,
    out: Path,
    overrides: Sequence[str] = (),
    resume: bool = False,
    split: SplitBy | None = None,
    group: str | None = None,
) -> Sides:
    """The folder as `tune`, which has these arguments, reads it. Before it is read, ValueError or
    FileNotFoundError for a run that is there, a start that is not, and an unknown setting."""
    if not resume and (out / "run" / "checkpoints").is_dir():
        from instructblip.training.run_directory import refuse_existing

        refuse_existing(out / "run")
    if not any((folder / "config.json").is_file() for folder in _may_be_start(start)):
        from instructblip.model.checkpoints.directory import model_directory

        model_directory(start)  # which may be on the Hub
    refuse_unknown(root, overrides)
    return read_sides(root, split, group, captions_in(overrides, out if resume else None))


def _may_be_start(start: str) -> list[Path]:
    path = current(Path(start))
    return [PACKAGE / start, path, *(current(path / name) for name in ("best", "last"))]


def refuse_unknown(root: Path, overrides: Sequence[str]) -> None:
    """ValueError for overrides that the recipe of a folder does not take."""
    sets = {SET: {"format": "imagefolder", "root": "."}}
    values = {"data": {"root": str(root), "sets": sets}, "evaluation": {"validation": []}}
    refuse_settings(overrides, values)


def captions_in(overrides: Sequence[str], resumed: Path | None) -> str:
    """The language that is read of captions in several: the overrides', else the resumed run's."""
    key = f"data.sets.{SET}.language="
    languages = [o.partition("=")[2] for o in overrides if o.startswith(key)]
    if not languages and resumed is not None and (resumed / RECIPE_FILE).is_file():
        languages = [load_recipe(resumed / RECIPE_FILE).data.sets[SET].language or "en"]
    return languages[-1] if languages else "en"


def language_in(sides: Sides) -> Language:
    """The language of the answers."""
    examples = [*sides.training.examples, *sides.final.examples]
    return language_of(answer for example in examples for answer in example.answers)


def describe(sides: Sides, column: GroupColumn | None = None, group: str | None = None) -> str:
    """What was read and how it is split, in a few lines; ``column`` looks like a group, and
    ``group`` is what may not be on two sides."""
    training, held = sides.training, sides.final
    tasks = Counter(example.task for side in (training, held) for example in side.examples)
    by = {
        "images": f"chosen by a hash of each {f'group ({group})' if group else 'picture'}",
        "column": "as the column `split` says",
        "files": "as the names of the files say",
    }
    lines = [
        f"{len(training) + len(held)} examples: {dict(tasks)}; {len(held)} held back, "
        f"{by[sides.by]}: the model never trains on them"
    ]
    if sides.test:
        lines.append(f"{len(sides.validation)} more choose the best step")
    rows = [example for side in sides.all for example in side.examples]
    if misspelled := describe_misspellings(misspellings(rows)):
        lines.append(misspelled)
    if language_in(sides) == "zh":
        lines.append("the answers are Chinese: Chinese templates and prompts are used")
    held_sides = {"held-back pictures": sides.final}
    if sides.test:
        held_sides["pictures that choose the best step, and"] = sides.validation
    for what, side in held_sides.items():
        if pairs := [(left, right) for left, right in sides.lookalikes if right in side.images]:
            lines.append(
                f"{what} that look like one that is trained on: "
                f"{len({right for _, right in pairs})} of {len(side.images)}, such as "
                f"{pairs[0][1]} and {pairs[0][0]}; if they show the same, scores are too high"
                + ("" if group else ", and `--group` keeps them on one side")
            )
    if column is not None:
        lines.append(column.describe(SET))
    return "\n".join(lines)
