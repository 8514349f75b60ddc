"""The one place that turns a recipe into objects: ``build(recipe) -> Run``.

A run is built from top to bottom: read and check the data, load the model, choose what trains,
make the batches, make the validation, collect the files that lie beside the weights. Instruction
tuning does just that. What `pretrain`, `tune` and `draw` do differently is a `Variant`: each
overrides the steps in which it differs, and inherits accumulation, ranks, workers, length buckets,
frames, stored features, checked data and exact resume.
"""

import functools
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import nn

from instructblip.core import distributed
from instructblip.core.files import read_json
from instructblip.data.chat_format import CHAT_FILE, chat_note, read_chat_template
from instructblip.data.images import PREPROCESSORS, ImageTransform
from instructblip.data.loader import Loader
from instructblip.data.samples import Examples, ImageReader
from instructblip.data.templates import TEMPLATES_FILE, Language, templates_note
from instructblip.data.tokens import Tokens
from instructblip.experiment.datasets import (
    Held,
    checked_training,
    choosing_note,
    data_fingerprints,
    describe_mixture,
    languages_of,
    make_mixture,
    prepare_benchmarks,
    prepare_training,
    validation_of,
    window_note,
    without_bad,
)
from instructblip.experiment.evaluate import score
from instructblip.experiment.features import (
    began_with,
    features_note,
    training_features,
    with_features,
)
from instructblip.experiment.memory import fit_micro_batches
from instructblip.experiment.model import load_model, model_config
from instructblip.inference.engine import Engine
from instructblip.model.checkpoints.directory import model_directory, read_config, with_revision
from instructblip.model.config import InstructBlipConfig
from instructblip.model.instructblip import InstructBlip
from instructblip.model.language.adapters import num_words
from instructblip.recipe.load import differences, load_recipe
from instructblip.recipe.schema import RECIPE_FILE, Recipe
from instructblip.training.config import TrainingConfig
from instructblip.training.run_directory import refuse_existing
from instructblip.training.trackers import check_trackers
from instructblip.training.train import Batches, Evaluate, TrainResult
from instructblip.training.train import train as run_loop

DATA_FILE = "data.json"
"""In a run directory: number of examples and fingerprint of each data set."""


@dataclass(frozen=True)
class Run:
    """Everything that the training loop needs."""

    config: TrainingConfig
    """Optimizer, schedule, and how often the run validates and saves."""
    model: nn.Module
    """On the CPU, with its trainable set and data types; ``model.loss(batch)`` is what trains."""
    batches: Batches
    """This rank's micro batches."""
    validate: Evaluate | None
    """Scores of the model, 0 to 100; ``score`` chooses the best weights. None without any."""
    files: Mapping[str, str]
    """Name -> text of the files beside every checkpoint and beside the weights."""
    export: Callable[[Path], object]
    """Writes the model into a directory that `instructblip.load` reads."""

    def train(self, out: Path, resume: bool = False) -> TrainResult:
        """Train into the run directory ``out``."""
        return run_loop(
            self.model,
            self.batches,
            self.validate,
            self.config,
            out,
            resume=resume,
            export=self.export,
            notes=self.files,
        )


@dataclass(frozen=True)
class Data:
    """What a run trains on, and what it is validated on."""

    training: Mapping[str, Examples] = field(default_factory=dict)
    fingerprints: Mapping[str, str] = field(default_factory=dict)
    held: Sequence[Held] = ()


class Variant:
    """The steps of a run in which commands differ. This base is instruction tuning."""

    instructs = True
    """Whether samples are instructions, which have a chat format and templates."""

    reads_benchmarks = True
    """Whether the run is validated on the benchmarks of ``recipe.evaluation.validation``."""

    def refuse(self, recipe: Recipe) -> None:
        """Raise ValueError for a recipe that the variant cannot follow, before any work."""

    def validates(self, recipe: Recipe) -> bool:
        """Whether the run will be validated."""
        return bool(recipe.evaluation.validation)

    def read_data(self, recipe: Recipe) -> Data:
        """The checked data sets of ``recipe.data``, and what validation scores."""
        prepared = prepare_training(recipe)
        checked = checked_training(recipe, prepared)
        held = prepare_benchmarks(recipe, validation_of(recipe)) if self.reads_benchmarks else ()
        return Data(checked, data_fingerprints(prepared, checked), held)

    def tokens(self, tokens: Tokens) -> Tokens:
        """How the texts of training samples become ids."""
        return tokens

    def instructblip(self, recipe: Recipe) -> InstructBlip:
        """The InstructBLIP that the run starts from, with its trainable set."""
        return load_model(recipe)

    def model(self, recipe: Recipe, instructblip: InstructBlip) -> nn.Module:
        """The module that trains."""
        return instructblip

    def batches(
        self, recipe: Recipe, model: Any, loader: Callable[[TrainingConfig], Loader]
    ) -> Batches:
        """The batches of the run; ``loader`` makes those of ``recipe.data``."""
        return loader(recipe.training)

    def validate(
        self, recipe: Recipe, instructblip: InstructBlip, model: Any, held: Sequence[Held]
    ) -> Evaluate | None:
        """What scores the model during training."""
        return make_validation(recipe, instructblip, held)

    def export(self, instructblip: InstructBlip, model: Any) -> Callable[[Path], object]:
        """What writes the model: what it changed, where the frozen parts are large."""
        return functools.partial(instructblip.save_pretrained, whole=False)


def build(
    recipe: Recipe, variant: Variant | None = None, out: Path | None = None, resume: bool = False
) -> Run:
    """Turn a recipe into a run. All ranks call this together.

    Args:
        variant: how the run differs from instruction tuning.
        out: the run directory, which decides what a resumed run keeps; None for a new run.

    Raises:
        ValueError: for a recipe that cannot be followed, unchecked data, or an ``out`` that holds a
            run when ``resume`` is off.
        FileNotFoundError: for missing data or a missing model, naming what to get.
    """
    variant = variant or Variant()
    variant.refuse(recipe)
    check_trackers(recipe.training.report_to)
    patience = recipe.training.early_stopping_patience
    if patience is not None and not variant.validates(recipe):
        raise ValueError(
            f"training.early_stopping_patience {patience} counts validations, and this run has "
            "none: name benchmarks in evaluation.validation, or leave it out"
        )
    recipe = with_commit(recipe)
    if out is not None and distributed.is_main():
        compare_with_saved(recipe, out, resume)
    with distributed.main_first():
        data = variant.read_data(recipe)
    languages = languages_of(recipe, data.training)
    if distributed.is_main():
        if out is not None and resume:
            report_changed_data(data.fingerprints, out)
        if (training := recipe.training).warmup != training.warmup_steps:
            print(
                f"training.warmup_steps {training.warmup_steps} does not fit into "
                f"{training.steps} steps: the learning rate rises over {training.warmup} instead"
            )
        if data.training:
            print(describe_mixture(recipe, make_mixture(recipe, data.training)), flush=True)
            for name, language in languages.items():
                if language == "zh" and recipe.data.sets[name].language is None:
                    print(f"{name}: the answers are Chinese, and so its instructions are")
        notes = window_note(recipe, data.training), choosing_note(recipe) if data.held else ""
        for note in filter(None, notes):
            print(note, flush=True)
    written = recipe.to_yaml()
    recipe = fit_micro_batches(recipe, distributed.world_size())
    if not variant.instructs:
        recipe = with_chat_template(recipe, "off")
    elif resume and out is not None and recipe.model.chat_template == "auto":
        kept = read_chat_template(out) is not None
        recipe = with_chat_template(recipe, str(out / CHAT_FILE) if kept else "off")
    read_assets(recipe, model_config(recipe))  # refuses a chat template before weights are read
    instructblip = variant.instructblip(recipe)
    model = variant.model(recipe, instructblip)
    tokens, images = read_assets(recipe, instructblip.config)
    if distributed.is_main() and tokens.chat_template is not None:
        end = tokens.language.convert_ids_to_tokens(tokens.eos_id)
        print(f"prompts and responses are in chat format ({end} ends a response)", flush=True)
    elif distributed.is_main() and recipe.model.chat_template == "auto":
        print(
            "prompts and responses are plain text: model.chat_template is auto, and "
            f"{recipe.model.start} has no chat format",
            flush=True,
        )
    readers = training_readers(recipe, data.training, images)
    began = began_with(out, resume)
    readers = training_features(recipe, instructblip, readers, data.training, began)

    def loader(training: TrainingConfig) -> Loader:
        texts = variant.tokens(tokens)
        return make_loader(recipe, data.training, languages, texts, readers, training)

    files = {
        RECIPE_FILE: written,
        DATA_FILE: json.dumps(data.fingerprints, indent=2) + "\n",
    }
    if variant.instructs:
        files |= {TEMPLATES_FILE: templates_note(), **chat_files(tokens, instructblip)}
    if recipe.data.window != "auto":
        files[PREPROCESSORS[0]] = images.transform.to_json()
    return Run(
        config=recipe.training,
        model=model,
        batches=variant.batches(recipe, model, loader),
        validate=variant.validate(recipe, instructblip, model, data.held),
        files=files | features_note(readers.values()),
        export=variant.export(instructblip, model),
    )


# --- batches -------------------------------------------------------------------------------------


def read_assets(recipe: Recipe, config: InstructBlipConfig) -> tuple[Tokens, ImageReader]:
    """Tokenizers and image reader of the start, with the recipe's limits and without features."""
    data, directory = recipe.data, model_directory(recipe.model.start)
    tokens = Tokens.from_pretrained(
        directory,
        max_instruction=min(data.max_instruction, config.qformer.max_position_embeddings),
        max_prompt=data.max_prompt,
        max_response=data.max_response,
    )
    tokens = replace(
        tokens,
        qformer=tokens.qformer if config.instruction_aware else None,
        chat_template=chat_template_of(recipe.model.chat_template, directory, tokens),
    )
    tokens.check_rows(num_words(config.language), config.qformer.vocab_size)
    transform = ImageTransform.from_pretrained(directory)
    transform = replace(transform, image_size=config.vision.image_size)
    if data.window != "auto":
        transform = replace(transform, window=data.window)
    return tokens, ImageReader(transform, data.num_frames, data.cache_images_mb)


def chat_template_of(setting: str, directory: Path, tokens: Tokens) -> str | None:
    """The template that ``model.chat_template`` means for the start in ``directory``.

    "auto" is what the start records, and else its tokenizer's template; none for an
    encoder-decoder, and for a start that was tuned before there was a record.
    """
    if setting == "off":
        return None
    if setting == "auto":
        if (directory / CHAT_FILE).is_file():
            return tokens.chat_template
        if not tokens.decoder_only or (directory / TEMPLATES_FILE).is_file():
            return None
        template = tokens.language.chat_template
        return template.get("default") if isinstance(template, dict) else template
    path = Path(setting)
    if not path.is_file():
        raise FileNotFoundError(
            f"model.chat_template: no file {path}; give auto, off, or the path of a Jinja file"
        )
    if path.name == CHAT_FILE:
        return read_chat_template(path.parent)
    return path.read_text(encoding="utf-8")


def with_commit(recipe: Recipe) -> Recipe:
    """The recipe with the commit of a start from the Hub, which is stored with the run."""
    start = with_revision(recipe.model.start)
    if start == recipe.model.start:
        return recipe
    model = recipe.model.model_copy(update={"start": start})
    return recipe.model_copy(update={"model": model})


def with_chat_template(recipe: Recipe, setting: str) -> Recipe:
    """The recipe with another ``model.chat_template``."""
    model = recipe.model.model_copy(update={"chat_template": setting})
    return recipe.model_copy(update={"model": model})


def chat_files(tokens: Tokens, model: InstructBlip) -> dict[str, str]:
    """The record of the chat format, and for transformers its template and its end token beside the
    model's own. Nothing where neither the run nor its start has one."""
    if tokens.chat_template is None:
        recorded = model.assets is not None and (model.assets / CHAT_FILE).is_file()
        return {CHAT_FILE: chat_note(None)} if recorded else {}
    ends = model.language_model.generation_config.eos_token_id
    ends = [] if ends is None else [ends] if isinstance(ends, int) else list(ends)
    settings = {
        **model.generation_settings,
        "eos_token_id": list(dict.fromkeys((*ends, tokens.eos_id))),
    }
    return {
        CHAT_FILE: chat_note(tokens.chat_template),
        "chat_template.jinja": tokens.chat_template,
        "generation_config.json": json.dumps(settings, indent=2) + "\n",
    }


def training_readers(
    recipe: Recipe, names: Iterable[str], images: ImageReader
) -> dict[str, ImageReader]:
    """A reader for each entry of ``data.sets``; those of equal augmentation share one."""
    kinds = {name: recipe.data.augmentation(name) for name in names}
    cache = images.cache_images_mb // (len({*kinds.values()}) or 1)
    readers = {
        kind: replace(images, transform=images.transform.for_training(*kind), cache_images_mb=cache)
        for kind in kinds.values()
    }
    return {name: readers[kind] for name, kind in kinds.items()}


def make_loader(
    recipe: Recipe,
    datasets: Mapping[str, Examples],
    languages: Mapping[str, Language],
    tokens: Tokens,
    images: Mapping[str, ImageReader],
    training: TrainingConfig,
) -> Loader:
    """This rank's batches of ``recipe.data``. Raises ValueError where a step does not divide."""
    data = recipe.data
    training.micro_batch_size(distributed.world_size())
    return Loader(
        datasets,
        make_mixture(recipe, datasets),
        tokens,
        images,
        batch_size=training.batch_size,
        seed=data.seed,
        rank=distributed.rank(),
        world_size=distributed.world_size(),
        accumulate=training.accumulate,
        tokens_per_micro_batch=training.token_budget,
        tokens_per_image=read_config(recipe.model.start).num_query_tokens,
        workers=training.workers,
        bucket_steps=data.bucket_steps,
        templates={name: entry.templates for name, entry in data.sets.items() if entry.templates},
        languages=languages,
    )


def training_samples(recipe: Recipe) -> Loader:
    """The loader of a recipe without its model: what `instructblip show` prints.

    Bad examples that a check found are left out; no check is required.
    """
    rate = recipe.data.max_bad_rate
    datasets = {name: without_bad(each, rate) for name, each in prepare_training(recipe).items()}
    tokens, images = read_assets(recipe, model_config(recipe))
    readers = training_readers(recipe, datasets, images)
    languages = languages_of(recipe, datasets)
    return make_loader(recipe, datasets, languages, tokens, readers, recipe.training)


# --- validation ----------------------------------------------------------------------------------


def make_validation(recipe: Recipe, model: InstructBlip, held: Sequence[Held]) -> Evaluate | None:
    """Scores of the held sets, 0 to 100, and their mean over the held-in ones: the ``score``.

    Held-out sets are scored for the curves of the report and choose no weights, unless there are no
    others. Returns None without any set: no weights are the best then.
    """
    if not held:
        return None
    settings, training = recipe.evaluation, recipe.training
    choosing = [h.benchmark.name for h in held if h.benchmark.role in ("held_in", "own")]
    choosing = choosing or [h.benchmark.name for h in held]
    times = training.steps // (training.validate_every or training.steps)
    engine = Engine(model, *read_assets(recipe, model.config))
    datasets = [each.dataset for each in held]
    engine = with_features(recipe, engine, datasets, settings.validation_limit, times)

    def validate(_model: object) -> dict[str, float]:
        scores = {}
        for each in held:
            result = score(
                engine,
                each,
                settings,
                limit=settings.validation_limit,
                progress=False,
                baseline=False,
                together=training.parallel == "fsdp2",
            )
            scores[each.benchmark.name] = result.value or 0.0
        return {"score": sum(scores[name] for name in choosing) / len(choosing), **scores}

    return validate


# --- resuming ------------------------------------------------------------------------------------


def compare_with_saved(recipe: Recipe, out: Path, resume: bool) -> None:
    """Refuse to overwrite a run; print what a resumed run changes in its recipe."""
    path = out / RECIPE_FILE
    if not resume:
        refuse_existing(out)
    elif path.is_file():
        for change in differences(load_recipe(path), recipe):
            print(f"resuming with a changed recipe: {change}")


def report_changed_data(fingerprints: Mapping[str, str], out: Path) -> None:
    """Print which data sets of a resumed run have changed."""
    path = out / DATA_FILE
    if not path.is_file():
        return
    before = read_json(path)
    changed = [name for name in fingerprints if before.get(name) != fingerprints[name]]
    if changed:
        print(
            f"resuming with other data: {', '.join(changed)} changed or were prepared anew; "
            "the samples that follow are not those of an uninterrupted run"
        )
