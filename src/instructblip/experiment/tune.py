"""Tuning on a folder of images: check, split, choose settings, evaluate, train, report."""

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import yaml

from instructblip.core import distributed
from instructblip.core.files import read_json, write_json, write_text
from instructblip.core.version import __version__
from instructblip.data.custom.folder import FolderSet, Sides, SplitBy
from instructblip.data.custom.formats import group_column
from instructblip.data.templates import TEMPLATES_ZH, Language
from instructblip.evaluation.benchmarks import Benchmark
from instructblip.evaluation.compare import compare
from instructblip.evaluation.evaluate import can_swap
from instructblip.evaluation.report import write_report
from instructblip.evaluation.result import Result
from instructblip.evaluation.tables import to_markdown
from instructblip.evaluation.verdict import Verdict, constant_result, worst
from instructblip.experiment.build import DATA_FILE, Data, Variant, build
from instructblip.experiment.calibrate import fit_model, note
from instructblip.experiment.datasets import Held, benchmarks_of, scored_rows
from instructblip.experiment.evaluate import load_engine, score
from instructblip.experiment.folder import OWN, SET, describe, language_in, read_to_tune
from instructblip.experiment.sayable import LEAST_KNOWN, sayable
from instructblip.inference.engine import Engine
from instructblip.model.checkpoints.directory import NAMES, SHIPPED, model_directory, read_config
from instructblip.model.instructblip import InstructBlip
from instructblip.recipe.load import load_recipe
from instructblip.recipe.schema import RECIPE_FILE, Recipe
from instructblip.training.log import METRICS, read_metrics
from instructblip.training.run_directory import claim

MOST_EVALUATED = 1000
"""Held-back examples of a task that are answered before and after."""
SMALL = 20_000_000
"""Trainable parameters outside of tables below which a model is small: it takes higher rates and
more epochs."""
BLIND_SEED = 0
HELD_BACK = "held_back.json"
"""The file beside the run about what was held back: its images that look like one that is trained
on, a column that looks like a group and did not split, and whether no step was chosen by it."""
CHOSEN = (
    "The step that is kept is the one with the best score on some of these same examples, which "
    "makes the figure after a little too high; the interval does not cover this choice."
)
UNSEEN = "Neither the training nor the choice of its step has seen these examples."

# task -> title, prompt, metric, decoding: how a held-back example is asked and scored, where the
# recipe has no benchmark on the folder
MEASURES: dict[str, tuple[str, str, str, dict[str, int]]] = {
    "caption": ("captions", "A short image description.", "rouge_l", {"max_new_tokens": 60}),
    "vqa": (
        "short answers",
        "Question: {question} Short answer:",
        "exact_match",
        {"max_new_tokens": 16},
    ),
    "instruct": ("long answers", "{question}", "rouge_l", {"max_new_tokens": 80}),
    "multiple_choice": (
        "choices",
        "Question: {question} Options: {options}. Short answer:",
        "exact_match",
        {},
    ),
}


@dataclass(frozen=True)
class FolderTuning(Variant):
    """Trains on one side of a folder and validates on the other."""

    training: FolderSet
    held: FolderSet
    language: Language = "en"

    def refuse(self, recipe: Recipe) -> None:
        most = max(len(e.images) for side in (self.training, self.held) for e in side.examples)
        if most > recipe.data.num_frames:
            raise ValueError(
                f"an example has {most} images and data.num_frames={recipe.data.num_frames} "
                "shows fewer: raise it, or leave it out"
            )
        held_sets(self.held, recipe, self.language)

    def validates(self, recipe: Recipe) -> bool:
        return True

    def read_data(self, recipe: Recipe) -> Data:
        held = held_sets(self.held, recipe, self.language)
        return Data({SET: self.training}, {SET: fingerprint(self.training)}, held)


@dataclass(frozen=True)
class Tuned:
    """The report of `tune`, and its verdict."""

    report: Path
    verdict: Verdict


def tune(
    root: Path,
    start: str,
    out: Path,
    overrides: Sequence[str] = (),
    resume: bool = False,
    split: SplitBy | None = None,
    group: str | None = None,
    anyway: bool = False,
    sides: Sides | None = None,
) -> Tuned | None:
    """Tune ``start`` on the folder ``root`` and compare before and after.

    Args:
        resume: continue the run in ``out``, with its recipe and its start.
        split: how the folder is split; None as its column or its files say, else by image.
        group: what may not be on two sides: a column, or a regular expression over image paths.
        anyway: train even where the starter cannot say the answers.
        sides: the folder, if `read_to_tune` read it before.

    Returns None if a signal interrupted the run, which ``resume`` continues.

    Raises ValueError or FileNotFoundError for what is wrong with the folder, naming every row, for
    answers that the starter cannot say, for a run that began with other data, and if another
    process tunes in ``out``.
    """
    if sides is None:
        sides = read_to_tune(root, start, out, overrides, resume, split, group)
    examples = [*sides.training.examples, *sides.final.examples]
    language = language_in(sides)
    images = max(len(example.images) for example in examples)
    variant = FolderTuning(sides.training, sides.validation, language)
    refuse_other_data(out / "run", sides.training)
    with distributed.process_group(), claim(out / "run"):
        if distributed.is_main():
            column = group_column(OWN, root, "train") if group is None else None
            print(describe(sides, column, group), flush=True)
            write_json(
                out / HELD_BACK,
                {
                    "lookalikes": sorted({held for _, held in sides.lookalikes}),
                    "group_column": column.heading if column else "",
                    "unseen": sides.test is not None,
                },
            )
            if not (resume and (out / RECIPE_FILE).is_file()):
                count = len(sides.training)
                write_recipe(root, start, out, count, overrides, images, group, language)
        distributed.barrier()
        recipe = load_recipe(out / RECIPE_FILE, overrides if resume else ())
        variant.refuse(recipe)
        sets = held_sets(sides.final, recipe, language)
        if distributed.is_main() and (note := unscored_note(sides.final, sets)):
            print(note, flush=True)
        engine = load_engine(recipe, recipe.model.start)
        report_sayable(engine, recipe.model.start, sets, language, anyway or resume)
        results = {"before": _evaluate(engine, recipe, sets, out / "results/before")}
        del engine
        result = build(recipe, variant, out / "run", resume).train(out / "run", resume)
        if result.stopped == "terminated":
            return None
        calibrate_held(recipe, sides, language, out / "run")
        engine = load_engine(recipe, str(out / "run"))
        after = _evaluate(engine, recipe, sets, out / "results/after")
        blind = [each for each in sets if can_swap(each.dataset, MOST_EVALUATED)]
        blind = _evaluate(engine, recipe, blind, out / "results/blind", BLIND_SEED)
        if blind:
            results["after, pictures swapped"] = blind
        results["after"] = after
        verdicts = verdicts_of(out, results["before"], after, blind, result.best_step)
        tuned = Tuned(out / "report.html", worst(verdicts))
        if distributed.is_main():
            write_verdict(tuned, verdicts, results, UNSEEN if sides.test else CHOSEN, out)
        return tuned


def calibrate_held(recipe: Recipe, sides: Sides, language: Language, run: Path) -> None:
    """Fit how far the answers of the run can be trusted to the examples of its validation, unless
    it was done before; print what was fitted, or why not."""
    directory = model_directory(run)
    engine = load_engine(recipe, str(run))
    if engine.calibration is None:
        sets = held_sets(sides.validation, recipe, language)
        if sides.test is not None:  # which is called as the recipe calls the split
            sets = [replace(s, benchmark=replace(s.benchmark, split="validation")) for s in sets]
        try:
            options = recipe.evaluation, MOST_EVALUATED, True
            fitted = fit_model(engine, directory, sets, *options)
        except ValueError as error:
            if distributed.is_main():
                print(f"no confidences: {error}", flush=True)
            return
        if distributed.is_main():
            fitted.calibration.save(directory)
            print(f"{fitted.report}\n{note(fitted.calibration)}", flush=True)
        distributed.barrier()


def report_sayable(
    engine: Engine, start: str, sets: Sequence[Held], language: Language, anyway: bool
) -> None:
    """Print how well the language model can say the answers; ValueError if the starter cannot."""
    examples = [e for each in sets for e in each.dataset]
    prompts = [each.benchmark.prompt for each in sets for _ in range(len(each.dataset))]
    measured = sayable(engine, examples, prompts)
    if distributed.is_main():
        print(measured.describe(), flush=True)
    if start in SHIPPED and measured.known < LEAST_KNOWN and not anyway:
        where = (
            "one whose language model writes Chinese, such as `instructblip combine` makes with a "
            "Qwen2"
            if language == "zh"
            else "--model small, which has read English, /models/blip2-flan-t5-xl or another "
            "directory in transformers' format, or one that `instructblip combine` makes"
        )
        raise ValueError(
            f"the starter cannot say these answers: it knows {measured.known:.0%} of their words "
            f"({LEAST_KNOWN:.0%} expected; not {', '.join(map(repr, measured.spelled))}). Its "
            "language model has read only about coloured shapes, and tuning leaves it as it is. "
            f"Start from a BLIP-2 with a real language model: {where}; --anyway trains the starter "
            "all the same"
        )


def refuse_other_data(run: Path, training: FolderSet) -> None:
    """ValueError if the run in this folder began with other training examples."""
    file = run / DATA_FILE
    if not file.is_file():
        return
    if read_json(file).get(SET) != fingerprint(training):
        raise ValueError(
            f"{run} began with other training examples: the pictures, their texts, --split or "
            "--group have changed since; undo this, or begin anew with another --out"
        )


def kept_start(run: Path, best_step: int | None) -> tuple[float, float] | None:
    """The scores of the first and the last validation, if no step was better than the start."""
    lines = [line["validation"] for line in read_metrics(run / METRICS) if "validation" in line]
    return (lines[0]["score"], lines[-1]["score"]) if best_step == 0 else None


def verdicts_of(
    out: Path,
    before: Sequence[Result],
    after: Sequence[Result],
    blind: Sequence[Result],
    best_step: int | None,
) -> list[Verdict]:
    """The verdict on each benchmark of the tuning in ``out``; ``blind`` may lack some of them."""
    held = read_held_back(out)
    kept = kept_start(out / "run", best_step)
    swapped = {each.benchmark: each for each in blind}
    return [
        Verdict(
            before=old,
            after=new,
            constant=constant_result(new),
            blind=swapped.get(new.benchmark),
            kept_start=kept,
            lookalikes=frozenset(held["lookalikes"]),
            group_column=held["group_column"],
        )
        for old, new in zip(before, after, strict=True)
    ]


def read_held_back(out: Path) -> dict[str, Any]:
    """What is known of what the tuning in ``out`` held back."""
    known = {"lookalikes": [], "group_column": "", "unseen": False}
    file = out / HELD_BACK
    return known | (read_json(file) if file.is_file() else {})


def write_verdict(
    tuned: Tuned,
    verdicts: Sequence[Verdict],
    results: dict[str, list[Result]],
    caution: str,
    out: Path,
) -> None:
    """Print the verdict with its tables, and write the report."""
    others = [v.headline for v in verdicts if v is not tuned.verdict]
    parts = [tuned.verdict.caution, *others, *(verdict.baselines for verdict in verdicts), caution]
    text = " ".join(filter(None, parts))
    print(f"\n{tuned.verdict.headline}\n{text}\n\n{to_markdown(compare(results))}", flush=True)
    write_report(
        tuned.report,
        results,
        title=tuned.verdict.headline,
        lead=text,
        curves={"run": out / "run" / METRICS},
        facts={"version": __version__},
    )


def write_recipe(
    root: Path,
    start: str,
    out: Path,
    examples: int,
    overrides: Sequence[str],
    images: int = 1,
    group: str | None = None,
    language: Language = "en",
) -> Recipe:
    """Choose settings for ``examples`` training examples of at most ``images`` images each, write
    them to ``out/recipe.yaml`` and return them; ``overrides`` have precedence."""
    small = num_trainable(start) < SMALL
    batch = max(2, min(32 if small else 16, examples // 4 * 2))
    epochs, rate = (30, 1e-3) if small else (3, 1e-5)
    steps = max(20, min(2000, epochs * examples // batch))
    asked = [o.partition("=")[2] for o in overrides if o.startswith("training.steps=")]
    if asked and asked[-1].isdigit():  # warm-up, validation and checkpoints follow from it
        steps = int(asked[-1])
    values: dict[str, Any] = {
        "model": {"start": _absolute(start)},
        "data": {
            "root": str(root.absolute()),
            "num_frames": max(4, images),
            "sets": {
                SET: {
                    "format": "imagefolder",
                    "root": ".",
                    "language": language,
                    "group": group,
                }
            },
        },
        "training": {
            "steps": steps,
            "batch_size": batch,
            "learning_rate": rate,
            "warmup_steps": steps // 10,
            "validate_every": max(1, steps // 4),
            "validate_first": True,
            "save_every": max(1, steps // 4),
            "workers": 0,
            "precision": "fp32" if small else "bf16",
        },
        "features": {"root": str((out / "features").absolute())},
        # `tune` validates on what it held back; who trains by this recipe has no such set
        "evaluation": {"validation": [], "validation_limit": 64},
    }
    file = out / RECIPE_FILE
    write_text(file, yaml.safe_dump(values, sort_keys=False))
    recipe = load_recipe(file, overrides)
    write_text(file, recipe.to_yaml())
    return recipe


def num_trainable(start: str) -> int:
    """The number of parameters that tuning ``start`` trains by default, without its weights. Tables
    of words and positions do not count: a step reads a few rows of them."""
    config = read_config(start)
    with torch.device("meta"):
        model = InstructBlip(config)
    return sum(p.numel() for n, p in model.trainable_parameters() if "_embeddings." not in n)


def _absolute(start: str) -> str:
    """The name of a model as it holds in any working directory."""
    is_path = start not in NAMES and Path(start).exists()
    return str(Path(start).absolute()) if is_path else start


def held_sets(held: FolderSet, recipe: Recipe, language: Language = "en") -> list[Held]:
    """The benchmarks of the recipe on the folder, each with the held-back examples that it scores;
    without any, one for each task.

    Raises ValueError for a benchmark that the examples do not fit.
    """
    names = [name for name, entry in recipe.evaluation.own.items() if entry.set == SET]
    sets = []
    for benchmark in benchmarks_of(recipe, names) if names else ():
        key = f"evaluation.own.{benchmark.name}"
        if benchmark.split == "train":
            raise ValueError(f"{key}.split is train, and `tune` scores what it holds back")
        if benchmark.metric == "mrr":
            raise ValueError(
                f"{key}: `tune` compares with the best constant answer, which mrr does not have; "
                "put another metric first, such as accuracy"
            )
        rows = scored_rows(recipe, benchmark, held)
        tasks = {rows[i].task for i in range(len(rows))}
        if benchmark.prompt is None and language == "zh" and len(tasks) == 1:
            benchmark = replace(benchmark, prompt=TEMPLATES_ZH[tasks.pop()][0])
        sets.append(Held(benchmark, rows))
    return sets or _measured_by_task(held, language)


def _measured_by_task(held: FolderSet, language: Language) -> list[Held]:
    """A benchmark for each task among the held-back examples, as ``MEASURES`` says."""
    sets = []
    for task, (title, prompt, metric, decoding) in MEASURES.items():
        prompt = TEMPLATES_ZH[task][0] if language == "zh" else prompt
        examples = [example for example in held.examples if example.task == task]
        benchmark = Benchmark(
            name=f"own_{task}",
            title=title,
            source=SET,
            split="val",
            prompt=prompt,
            mode="rank" if task == "multiple_choice" else "generate",
            metric=metric,
            role="own",
            decoding=decoding,
        )
        if examples:
            sets.append(Held(benchmark, replace(held, examples=examples)))
    return sets


def unscored_note(held: FolderSet, sets: Sequence[Held]) -> str:
    """The line about held-back examples that no benchmark scores; empty without any."""
    scored = {each.dataset[i].id for each in sets for i in range(len(each.dataset))}
    rest = Counter(example.task for example in held.examples if example.id not in scored)
    if not rest:
        return ""
    return f"{rest.total()} of {len(held)} held-back examples are not scored: {dict(rest)}"


def fingerprint(folder: FolderSet) -> str:
    """Number of examples, and a digest of their texts and of the files of their images."""
    digest = hashlib.sha256()
    for example in folder.examples:
        digest.update(repr(example).encode())
        for name in example.images:
            digest.update(hashlib.sha256((folder.image_root / name).read_bytes()).digest())
    return f"{len(folder)} {digest.hexdigest()[:16]}"


def _evaluate(
    engine: Engine, recipe: Recipe, sets: Sequence[Held], out: Path, blind_seed: int | None = None
) -> list[Result]:
    options = {"limit": MOST_EVALUATED, "progress": False, "blind_seed": blind_seed}
    return [
        score(engine, held, recipe.evaluation, out=out / held.benchmark.name, **options)
        for held in sets
    ]
