"""What a recipe may say: the model, the data, the training and the evaluation of one run.

``recipe.load`` reads it from YAML. The resolved recipe is written beside every checkpoint and
result.
"""

import re
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveInt,
    model_validator,
)

from instructblip.core.user_code import FUNCTION, is_function
from instructblip.data.reading.decode import Window
from instructblip.data.templates import check_template, templates_of
from instructblip.evaluation.benchmarks import BENCHMARKS, GROUPS, Benchmark
from instructblip.evaluation.scoring import ALIASES, NEEDS_CANDIDATES, scorer_of
from instructblip.model.config import LoraConfig
from instructblip.model.decoding import MAX_TEMPERATURE, MIN_TEMPERATURE, check_overrides
from instructblip.model.placement import Devices, Kind, Quantize, check_placement
from instructblip.text_to_image.config import ConditionerConfig, DiffusersConfig, NativeConfig
from instructblip.training.config import TrainingConfig

RECIPE_FILE = "recipe.yaml"
"""The resolved recipe beside every checkpoint, model and result."""

LONG_ANSWER = 256
"""Tokens that a long answer may have in a benchmark of the recipe."""
Fraction = Annotated[float, Field(ge=0, le=1)]


def _increasing(window: Window) -> Window:
    if isinstance(window, tuple) and not window[0] < window[1]:
        raise ValueError("expected [low, high] with low below high")
    return window


def _off(value: Any) -> Any:
    return "off" if value is False else value  # in YAML, off is false


Format = Literal[
    "llava_json", "sharegpt", "openai_messages", "table", "imagefolder", "hf_dataset", "webdataset"
]
"""How custom data may be written."""


class _Section(BaseModel):
    model_config = ConfigDict(
        frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True
    )


class ModelConfig(_Section):
    """Where the run starts from."""

    start: str = "starter"
    """A BLIP-2 or InstructBLIP directory, a run directory, ``starter`` or ``small``."""
    instruction_aware: bool = True
    """Whether the Q-Former reads the instruction; false tunes a BLIP-2, the paper's ablation."""
    text_branch: str | None = None
    """Where a BLIP-2's missing text branch comes from: a file, a directory, or ``random``."""
    chat_template: Annotated[str, BeforeValidator(_off)] = "auto"
    """The format of prompts and responses: ``auto``, the start's own or else the template of its
    tokenizer; ``off``, none; or the path of a Jinja file."""
    image_size: PositiveInt | None = None
    """Side of an image in pixels; null for the start's."""
    lora: LoraConfig | None = None
    """An adapter beside the frozen language model, trained as the part ``lora``; null for none."""
    qformer_lora: LoraConfig | None = None
    """An adapter beside the frozen Q-Former and projection, trained as the part ``qformer_lora``;
    null for none. Targets by default: ``query`` and ``value`` of each attention."""
    quantize: Kind | None = None
    """Frozen weights of the language model in 8 or 4 bits; null for the run's own type."""


class DataSet(_Section):
    """One data set of the mixture."""

    source: str | None = None
    """How its files are read, a name of ``SOURCES``; null for the name of the entry."""
    root: str | None = None
    """Its folder below ``data.root``, or a URL to fetch it from; null for the source's name."""
    split: Literal["train", "val", "test"] = "train"
    """Which of its splits to read."""
    weight: NonNegativeFloat = 1.0
    """Hand weight on top of the size; 0 leaves the set out."""
    templates: tuple[str, ...] | None = None
    """Instruction templates instead of those of its task, or ``package.module:function``."""
    language: Literal["en", "zh"] | None = None
    """Language of its instructions: English or Chinese templates; null for that of the answers of
    custom data, and for English elsewhere. Of captions in several languages (lines
    ``zh_CN.utf8=...``) those in this one are read, the English ones without it."""
    format: Format | Annotated[str, Field(pattern=FUNCTION)] | None = None
    """For custom data: how its files are written (docs/data.md), or ``package.module:function``;
    ``source`` is then unused."""
    path: str | None = None
    """File or pattern of custom data below its root, such as ``{split}.jsonl``; null for all."""
    images: str | None = None
    """Folder below the root that image paths are relative to; null for ``images`` if there is one,
    else the root. For an imagefolder, the folder that is searched: null for the root."""
    columns: dict[str, str] = Field(default_factory=dict)
    """For tables: which column holds the image, question, answer, choices, context, id."""
    task: str | None = None
    """Task of custom data, which decides its templates; null infers it from the columns."""
    group: str | None = None
    """For custom data: what may not be on two sides of a split, such as a patient. A column, or a
    regular expression over the path of an image with parentheses around the group."""

    @model_validator(mode="before")
    @classmethod
    def _published_sets_are_english(cls, entry: Any) -> Any:
        if isinstance(entry, dict) and not entry.get("format") and entry.get("language") is None:
            return {**entry, "language": "en"}
        return entry

    @model_validator(mode="after")
    def _group_fits(self) -> "DataSet":
        if self.group is None:
            return self
        if self.format is None:
            raise ValueError("group needs a format: only custom data has groups")
        try:
            re.compile(self.group)
        except re.error as error:
            raise ValueError(f"group {self.group!r} is no regular expression: {error}") from None
        return self


def _plain(name: str) -> str:
    # it becomes the name of a folder
    if not re.fullmatch(r"[\w-][\w.-]*", name):
        raise ValueError("expected a name of letters, digits and . _ - without a dot in front")
    return name


class DataConfig(_Section):
    """The mixture of instruction data, and how its samples become tensors."""

    root: Path = Path("data")
    """Folder that holds one folder for each source."""
    prepared: Path | None = None
    """Folder of the prepared data sets; null for ``root/prepared``."""
    sets: dict[Annotated[str, AfterValidator(_plain)], DataSet] = Field(min_length=1)
    """Name to data set: what the model is tuned on."""
    temperature: Fraction = 0.5
    """Sets are drawn in proportion to size ** temperature: 0.5 is the paper's square root."""
    seed: NonNegativeInt = 0
    """Decides order, templates, answers and crops."""
    bucket_steps: NonNegativeInt = 0
    """Steps whose samples are sorted by length together, so that a batch has less padding; 0 keeps
    the order drawn, 1 sorts within each step over its ranks and micro batches."""
    crop: bool | None = None
    """Whether training images are cropped at random; null crops published sets, not your data."""
    mirror: bool | None = None
    """Whether training images are mirrored at random, except where a text names a side; null
    mirrors published sets, not your data."""
    augment: bool | None = None
    """The earlier switch for ``crop`` and ``mirror``: their value where they are null."""
    window: Annotated[Window, AfterValidator(_increasing)] = "auto"
    """Grey values, of more than 8 bits, that become black and white: [low, high]; full, the ends of
    their type; or auto: a DICOM file's own window, and the values that an image uses where they are
    a small part. Auto keeps the window that the model was trained with."""
    num_frames: PositiveInt = 4
    """Maximum number of images of a sample; of a video so many frames, evenly spaced."""
    max_instruction: PositiveInt = 128
    """Maximum number of tokens of the instruction that the Q-Former reads."""
    max_prompt: PositiveInt = 128
    """Maximum number of tokens of the prompt that the language model reads."""
    max_response: PositiveInt = 256
    """Maximum number of tokens of a response, its end token included."""
    max_bad_rate: Fraction = 0.0
    """Share of bad samples that a set may have; they are counted, listed and left out."""
    check: Literal["required", "run", "skip"] = "required"
    """Whether training needs a passed `instructblip check`, makes one itself, or takes any data."""
    drop_leaked: bool = False
    """Whether training leaves out images that an evaluation set of the recipe shows as well."""
    cache_images_mb: NonNegativeInt = 256
    """Memory in MiB for decoded images, in each process that prepares batches."""

    def augmentation(self, name: str) -> tuple[bool, bool]:
        """Whether images of an entry are cropped, and whether they are mirrored at random."""
        default = self.sets[name].format is None if self.augment is None else self.augment
        crop, mirror = (default if each is None else each for each in (self.crop, self.mirror))
        return crop, mirror

    def source_of(self, name: str) -> str:
        return self.sets[name].source or name

    def where_of(self, source: str) -> str:
        """Folder or URL of a source, as benchmarks need it: its first entry's, else its name."""
        for name, entry in self.sets.items():
            if self.source_of(name) == source and not entry.format:
                return entry.root or source
        return source

    def root_of(self, source: str) -> Path:
        return self.root / self.where_of(source)

    @property
    def prepared_root(self) -> Path:
        return self.prepared or self.root / "prepared"


def _spell_out(value: object) -> object:
    # YAML 1.1 reads a bare on and off as booleans
    return {True: "on", False: "off"}.get(value, value) if isinstance(value, bool) else value


class FeaturesConfig(_Section):
    """Image features of the frozen encoder, computed once and stored on disk."""

    cache: Annotated[Literal["auto", "on", "off"], BeforeValidator(_spell_out)] = "auto"
    """Whether to store them; auto measures whether it saves time, and stores no single crop."""
    dtype: Literal["fp32", "bf16", "int8"] | None = None
    """Type on disk; null for the encoder's own, without loss. int8 has a scale for each token."""
    views: PositiveInt = 1
    """Random crops stored of each image, where ``data.crop`` is on; they are never mirrored."""
    root: Path | None = None
    """Folder of the features; null for ``data.root/features``."""


def _decoding(settings: dict[str, int | float | bool]) -> dict[str, int | float | bool]:
    check_overrides(settings)
    return settings


class OwnBenchmark(_Section):
    """One benchmark of the recipe: which rows, asked how, answered how, scored by what."""

    set: str
    """The entry of ``data.sets`` that has the rows; weight 0 there trains on none of them."""
    split: Literal["train", "val", "test"] = "test"
    """Which of its splits; no data set of the recipe may train on these rows."""
    task: str | None = None
    """Only rows of this task; null for all, if they are all short or all long answers."""
    mode: Literal["generate", "rank"] = "generate"
    """Whether the model writes its answer, or ranks candidates."""
    candidates: tuple[str, ...] | None = None
    """The answers that are ranked; null for the choices of each row."""
    verbalizers: dict[str, tuple[str, ...]] = Field(default_factory=dict)
    """Candidate -> other wordings of it; it scores as the likeliest."""
    prompt: str | None = None
    """Template of the prompt, or ``package.module:function``; null for the first of each row's
    task."""
    metrics: tuple[str, ...] = Field(min_length=1)
    """The first is the score, which validation uses; the others are reported beside it. Names, or
    ``package.module:function``."""
    decoding: Annotated[dict[str, int | float | bool], AfterValidator(_decoding)] = Field(
        default_factory=dict
    )
    """Settings of generation; else greedy with 32 tokens, or 256 where ``task`` is instruct."""

    @model_validator(mode="after")
    def _goes_together(self) -> Self:
        if self.task is not None:
            templates_of(self.task)
        if self.prompt is not None:
            check_template(self.prompt)
        for metric in self.metrics:
            scorer_of(ALIASES.get(metric, metric))
        ordered = [metric for metric in self.metrics if metric in NEEDS_CANDIDATES]
        if self.mode == "generate":
            given = [n for n in ("candidates", "verbalizers") if getattr(self, n)]
            if ordered or given:
                raise ValueError(
                    f"{', '.join(ordered + given)} needs candidates that are ranked, and mode is "
                    "generate: set mode: rank, or leave it out"
                )
        elif self.decoding:
            raise ValueError("decoding is for generated answers, and mode is rank: leave it out")
        names = self.candidates or ()
        if self.candidates is not None and len({*names}) != max(2, len(names)):
            raise ValueError(f"candidates are {list(names)}; expected two or more different ones")
        if "auroc" in self.metrics and len(names) != 2:
            raise ValueError(
                f"auroc needs two candidates, the positive one first; got {list(names) or 'none'}"
            )
        if unknown := [name for name in self.verbalizers if names and name not in names]:
            raise ValueError(f"verbalizers of {', '.join(unknown)}, which is no candidate")
        return self

    def benchmark(self, name: str) -> Benchmark:
        """What evaluation knows of it."""
        long = {"max_new_tokens": LONG_ANSWER} if self.task == "instruct" else {}
        metric, *others = (ALIASES.get(metric, metric) for metric in self.metrics)
        return Benchmark(
            name=name,
            title=name,
            source=self.set,
            split=self.split,
            prompt=self.prompt,
            mode=self.mode,
            metric=metric,
            role="own",
            candidates=self.candidates,
            verbalizers=self.verbalizers,
            decoding={**long, **self.decoding} if self.mode == "generate" else {},
            others=tuple(others),
        )


def _free(name: str) -> str:
    if name in BENCHMARKS or name in GROUPS:
        raise ValueError(f"{name} is a published benchmark or a group of them; choose another name")
    return _plain(name)


class EvaluationConfig(_Section):
    """What the model is evaluated on: during training, and after it."""

    own: dict[Annotated[str, AfterValidator(_free)], OwnBenchmark] = Field(default_factory=dict)
    """Name -> benchmark on data of ``data.sets``; ``own`` is the group of all of them."""

    validation: tuple[str, ...] = ("held_in",)
    """Benchmarks scored during training; the mean of the held-in and own ones picks the best
    weights. An empty list validates nothing: the last weights are then the result."""
    validation_limit: PositiveInt | None = None
    """Samples of each set in a validation, drawn once for all models; null for all."""
    benchmarks: tuple[str, ...] = ("held_in", "held_out")
    """Benchmarks, or groups of them, that `evaluate` answers."""
    limit: PositiveInt | None = None
    """Samples of each benchmark, drawn once for all models; null for all."""
    batch_size: PositiveInt | Literal["auto"] = 32
    """Samples answered at a time, or auto; changes speed and memory, not the answers."""
    devices: Devices = "auto"
    """Where `evaluate` has the layers of the language model: auto, on ``training.device`` if they
    fit there; several devices with commas; ``disk`` at the end for layers that do not fit."""
    quantize: Quantize = None
    """The language model of `evaluate` in 8 or 4 bits: int8, fp8 or nf4; null for its own type."""
    tokenizer: Literal["python", "ptb_java"] = "python"
    """What cuts captions into words for their scores; ptb_java is the COCO server's."""
    decoding: Annotated[dict[str, int | float | bool], AfterValidator(_decoding)] = Field(
        default_factory=dict
    )
    """Settings of generation on top of each benchmark's own."""
    prompts: dict[str, str] = Field(default_factory=dict)
    """Benchmark -> prompt, in place of the benchmark's; scores then do not compare."""

    wordings: NonNegativeInt = 0
    """Other prompts of each benchmark's task under which `evaluate` answers its samples as well, to
    show how far the score depends on the wording; at most those of ``data/templates.yaml``."""

    @model_validator(mode="after")
    def _can_be_placed(self) -> Self:
        check_placement(self.devices, self.quantize)
        return self

    @property
    def own_benchmarks(self) -> dict[str, Benchmark]:
        """The benchmarks of the recipe by name."""
        return {name: entry.benchmark(name) for name, entry in self.own.items()}


class DrawingSet(_Section):
    """One set of things to draw."""

    kind: Literal["scenes", "subjects", "captions", "instructions"]
    """Fresh scenes, fresh scenes with a subject, captions as instructions, an instruction file."""
    source: str | None = None
    """How the files of a caption set are read, a name of ``SOURCES``."""
    root: Path | None = None
    """Folder below ``data.root``: of a caption set (null: its source's name), or of the images of
    an instruction file (null: beside the file)."""
    file: Path | None = None
    """The instruction file, JSON lines, below ``data.root``."""
    shapes: tuple[PositiveInt, PositiveInt] = (1, 1)
    """Fewest and most shapes of a fresh scene."""
    weight: NonNegativeFloat = 1.0
    """Hand weight; sets of one size are drawn in proportion to it."""
    start: NonNegativeInt = 0
    """Step at which the set joins the mixture."""


class DrawingConfig(_Section):
    """Text to image: what is drawn, and the parts it needs beside the InstructBLIP."""

    sets: dict[str, DrawingSet] = Field(min_length=1)
    """Name to set: what the decoder is trained on."""
    start: str | None = None
    """A model directory whose conditioner and decoder are trained further, in place of the two
    below. It must have the Q-Former of ``model.start``; null starts with fresh ones."""
    conditioner: ConditionerConfig = ConditionerConfig()
    """From the Q-Former to the condition."""
    decoder: NativeConfig | DiffusersConfig = Field(default=NativeConfig(), discriminator="kind")
    """What draws."""
    understanding: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of micro batches that come from ``data``, to keep understanding while the Q-Former
    trains."""
    validation_prompts: PositiveInt = 32
    """Fresh prompts of each kind that a validation on Scenes draws."""


def _rewards(rewards: dict[str, float]) -> dict[str, float]:
    for metric in rewards:
        scorer_of(ALIASES.get(metric, metric)).require()
        if metric in NEEDS_CANDIDATES:
            raise ValueError(f"{metric} scores candidates, and a reward scores a written response")
    return {ALIASES.get(metric, metric): weight for metric, weight in rewards.items()}


class PreferenceConfig(_Section):
    """Training from better and worse responses: where they come from, and the objective."""

    objective: Literal["dpo", "self_critical"] = "dpo"
    """dpo trains on pairs of a chosen and a rejected response; self_critical on responses sampled
    in each step, by how much their reward is above that of the greedy one."""
    rewards: Annotated[dict[str, float], AfterValidator(_rewards)] = Field(default_factory=dict)
    """Metric -> weight: the sum of the scores of a response, 0 to 1 each (CIDEr 0 to 10), is its
    reward. For dpo the model samples its pairs then; empty takes the column ``rejected`` of the
    data."""
    pairs: PositiveInt = 2000
    """Instructions for which the model samples responses once, before dpo with rewards; one is a
    pair, of the best and the worst, unless all are equally good."""
    num_responses: Annotated[int, Field(ge=1, le=64)] = 4
    """Responses sampled for an instruction; dpo needs 2."""
    references: bool = False
    """Whether the response of the data is one of those of dpo too: it is then mostly the chosen
    one."""
    temperature: Annotated[float, Field(ge=MIN_TEMPERATURE, le=MAX_TEMPERATURE)] = 1.0
    """Temperature at which they are sampled."""
    max_new_tokens: PositiveInt = 64
    """Most tokens of a sampled response; one that has not ended by then is no part of a pair."""
    beta: Annotated[float, Field(gt=0)] = 0.1
    """How strongly dpo ties the model to its start: less for smaller values."""
    per_token: bool = False
    """Whether dpo divides log-likelihoods by the number of tokens."""
    rpo: NonNegativeFloat = 0.0
    """Weight of the chosen response's loss per token, which keeps its likelihood up."""

    @model_validator(mode="after")
    def _goes_together(self) -> Self:
        if self.objective == "self_critical" and not self.rewards:
            raise ValueError("self_critical needs rewards, such as {rouge_l: 1}")
        if self.objective == "dpo" and self.rewards and self.num_responses < 2:
            raise ValueError("num_responses is 1, and a pair of dpo needs 2 or more")
        return self


class Recipe(_Section):
    """Everything that decides a run."""

    model: ModelConfig = ModelConfig()
    """Where the run starts from."""
    data: DataConfig
    """What it is tuned on."""
    training: TrainingConfig = TrainingConfig()
    """How it is tuned."""
    features: FeaturesConfig = FeaturesConfig()
    """Whether image features of the frozen encoder are stored."""
    evaluation: EvaluationConfig = EvaluationConfig()
    """What it is evaluated on."""
    drawing: DrawingConfig | None = None
    """Text to image; null tunes the model to answer."""
    preference: PreferenceConfig | None = None
    """Training from better and worse responses; null trains on the responses of the data."""
    code: Path | None = None
    """Folder of the Python files that ``package.module:function`` names; null for that of the
    recipe."""

    @property
    def functions(self) -> list[str]:
        """The functions of the user that the recipe names; using one runs its file."""
        own, sets = self.evaluation.own.values(), self.data.sets.values()
        names = [name for entry in own for name in (*entry.metrics, entry.prompt or "")]
        names += [name for entry in sets for name in (*(entry.templates or ()), entry.format or "")]
        names += self.evaluation.prompts.values()
        names += self.preference.rewards if self.preference else ()
        return list(filter(is_function, names))

    @model_validator(mode="after")
    def _sets_exist(self) -> Self:
        for name, entry in self.evaluation.own.items():
            if entry.set not in self.data.sets:
                near = get_close_matches(entry.set, self.data.sets, n=1)
                hint = f"did you mean {near[0]}? " if near else ""
                raise ValueError(
                    f"evaluation.own.{name}.set: no entry '{entry.set}' in data.sets; {hint}"
                    f"there are {', '.join(self.data.sets)} (weight: 0 trains on none of it)"
                )
        return self

    def to_yaml(self) -> str:
        """The recipe with every default written out; `load_recipe` reads it back as the same."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
