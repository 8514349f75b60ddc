"""Evaluation of a saved model by a recipe."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from instructblip.core import distributed
from instructblip.core.files import write_text
from instructblip.data.samples import Examples
from instructblip.data.templates import wordings_of
from instructblip.evaluation.disputed import DISPUTED
from instructblip.evaluation.evaluate import Answerer, pick
from instructblip.evaluation.evaluate import evaluate as answer_benchmark
from instructblip.evaluation.result import Result
from instructblip.experiment.datasets import Held, benchmarks_of, prepare_benchmarks
from instructblip.experiment.features import with_features
from instructblip.inference.baseline import TransformersModel, is_baseline
from instructblip.inference.engine import Engine
from instructblip.model.checkpoints.directory import model_directory
from instructblip.recipe.schema import RECIPE_FILE, EvaluationConfig, Recipe


def evaluate(
    recipe: Recipe,
    model: str,
    out: Path,
    blind_seed: int | None = None,
    instruction_aware: bool | None = None,
) -> list[Result]:
    """Answer the recipe's benchmarks with ``model``; one folder of ``out`` for each.

    Args:
        model: a saved model of this package, or any transformers image-text-to-text directory.
        blind_seed: swap the images between samples with this seed, the blind control.
        instruction_aware: whether the Q-Former reads the instruction; None as the model was saved.

    Raises:
        FileNotFoundError: for a missing model, or naming the data that benchmarks miss.
    """
    model_directory(model)  # a wrong path is reported before any data is read
    settings = recipe.evaluation
    benchmarks = benchmarks_of(recipe, settings.benchmarks)
    results = []
    with distributed.process_group():
        with distributed.main_first():
            held = prepare_benchmarks(recipe, benchmarks)
        answerer = load_answerer(recipe, model, [h.dataset for h in held], instruction_aware)
        if distributed.is_main():
            write_text(out / RECIPE_FILE, recipe.to_yaml())
        for each in held:
            result = score(
                answerer,
                each,
                settings,
                limit=settings.limit,
                blind_seed=blind_seed,
                out=out / each.benchmark.name,
            )
            if settings.wordings:
                result = _under_other_wordings(answerer, each, settings, result, blind_seed, out)
            if distributed.is_main():
                print(result.describe(), flush=True)
            results.append(result)
    return results


def _under_other_wordings(
    answerer: Answerer,
    held: Held,
    settings: EvaluationConfig,
    result: Result,
    blind_seed: int | None,
    out: Path,
) -> Result:
    """``result`` with the scores under other prompts, each in a folder of its own below it. The
    result is as it was for a benchmark of several tasks, or of a task with one template."""
    benchmark, folder = held.benchmark, out / held.benchmark.name
    if benchmark.mode == "retrieve":  # it has no prompt
        return result
    tasks = {held.dataset[i].task for i in pick(len(held.dataset), settings.limit)}
    prompts = ()
    if len(tasks) == 1:
        prompts = wordings_of(tasks.pop(), benchmark.prompt, settings.wordings)
    if len(prompts) < settings.wordings and distributed.is_main():
        print(f"{benchmark.name}: its task has {len(prompts)} other wordings", flush=True)
    wordings = {}
    for number, prompt in enumerate(prompts, 1):
        wordings[prompt] = score(
            answerer,
            replace(held, benchmark=replace(benchmark, prompt=prompt)),
            settings,
            limit=settings.limit,
            blind_seed=blind_seed,
            out=folder / "wordings" / str(number),
            baseline=False,
        ).value
    result = replace(result, wordings=wordings)
    if wordings and distributed.is_main():
        result.save(folder)
    return result


def reproduce(
    recipe: Recipe, model: str, names: Sequence[str], out: Path
) -> dict[str, dict[str, Result]]:
    """The disputed scores called ``names``, each under all of its settings: name -> setting ->
    result. ``out`` gets a folder for each.

    Raises FileNotFoundError naming all data that are missing, before a model is loaded.
    """
    model_directory(model)
    asked = {name: DISPUTED[name].variants() for name in names}
    results: dict[str, dict[str, Result]] = {}
    with distributed.process_group():
        with distributed.main_first():
            frozen = [benchmark for each in asked.values() for benchmark in each.values()]
            prepared = iter(prepare_benchmarks(recipe, frozen))
        held = {name: {s: next(prepared) for s in settings} for name, settings in asked.items()}
        datasets = [h.dataset for each in held.values() for h in each.values()]
        answerer = load_answerer(recipe, model, datasets)
        for name, settings in held.items():
            results[name] = {}
            for number, (setting, each) in enumerate(settings.items()):
                results[name][setting] = score(
                    answerer,
                    each,
                    recipe.evaluation,
                    limit=recipe.evaluation.limit,
                    out=out / name / str(number),
                )
    return results


def score(answerer: Answerer, held: Held, settings: EvaluationConfig, **options: Any) -> Result:
    """The score on one benchmark; ``options`` as in `evaluation.evaluate.evaluate`."""
    return answer_benchmark(
        answerer,
        held.benchmark,
        held.dataset,
        batch_size=settings.batch_size,
        vocabulary=held.vocabulary,
        tokenizer=settings.tokenizer,
        **options,
    )


def load_answerer(
    recipe: Recipe,
    model: str,
    datasets: Iterable[Examples],
    instruction_aware: bool | None = None,
) -> Answerer:
    """A saved model that answers ``datasets``, from stored features where they save time."""
    if is_baseline(Path(model)):
        if recipe.evaluation.quantize is not None:
            raise ValueError(
                f"{model} is a model of transformers, which runs as it is: leave out "
                f"evaluation.quantize={recipe.evaluation.quantize}"
            )
        device = distributed.resolve_device(recipe.training.device)
        return TransformersModel(Path(model), device, recipe.data.num_frames, recipe.data.window)
    engine = load_engine(recipe, model, instruction_aware)
    # Twice: benchmarks are answered again, by the next model or without the images.
    return with_features(recipe, engine, datasets, recipe.evaluation.limit, times=2)


def load_engine(recipe: Recipe, model: str, instruction_aware: bool | None = None) -> Engine:
    """A saved model on the device and with the lengths and frames of the recipe."""
    data, devices, device = recipe.data, recipe.evaluation.devices, recipe.training.device
    return Engine.from_pretrained(
        model,
        device=distributed.resolve_device(device) if devices == "auto" else device,
        devices=devices,
        quantize=recipe.evaluation.quantize,
        instruction_aware=instruction_aware,
        num_frames=data.num_frames,
        window=data.window,
        max_instruction=data.max_instruction,
        max_prompt=data.max_prompt,
        max_response=data.max_response,
    )


def recipe_of(model: str) -> str:
    """The recipe that lies beside a model; without one, those of the embedded worlds for the
    starter and dense, that of the real images for small, and the paper's for any other."""
    beside = [folder / RECIPE_FILE for folder in (Path(model), Path(model) / "best")]
    recipe = next((path for path in beside if path.is_file()), None)
    if recipe is not None:
        return str(recipe)
    shipped = {"starter": "scenes", "dense": "dense", "small": "quickstart_real"}
    return shipped.get(model, "instructblip_vicuna7b")
