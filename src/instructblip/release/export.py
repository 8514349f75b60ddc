"""Write a model for others: a transformers directory with its card, or a LAVIS file. The form
"retrieval" is transformers' Blip2ForImageTextRetrieval.

The card says what a model is, what it was tuned on and how, and its scores. Its header has the
same for the Hub. No path of this machine is in what `export_model` writes.
"""

import json
import re
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from instructblip.core.files import read_json, replacing_directory, write_text
from instructblip.core.version import __version__
from instructblip.data.chat_format import ChatFormat, read_chat_template
from instructblip.data.images import ImageTransform
from instructblip.data.sources import SOURCES
from instructblip.data.tokens import load_tokenizer, qformer_tokenizer
from instructblip.evaluation.compare import summarise
from instructblip.evaluation.result import Result, describe_how
from instructblip.evaluation.tables import escape_markdown
from instructblip.inference.engine import stored_calibration
from instructblip.inference.fingerprint import fingerprint
from instructblip.model import lora
from instructblip.model.checkpoints.directory import HUB, check_output, model_directory
from instructblip.model.checkpoints.lavis import export_lavis, refuse_loss
from instructblip.model.checkpoints.small import PARTS_FILE
from instructblip.model.instructblip import InstructBlip
from instructblip.model.retrieval import Retriever
from instructblip.model.trainable import part_of
from instructblip.recipe.load import read_values
from instructblip.recipe.schema import RECIPE_FILE

ModelForm = Literal["transformers", "retrieval", "lavis"]

HINTS = {
    "license": "the licence: give it with --licence",
    "base_model": "the base model: the start is none of the Hub",
    "datasets": "data sets of the Hub: give them with --dataset",
    "language": "the languages: a set of the recipe has none, or there is no recipe",
    "model-index": "scores: give the results of `instructblip evaluate` with --results",
}
"""What the header of a card leaves out where it is not known."""


@dataclass(frozen=True)
class Given:
    """What only the owner of a model knows for its card."""

    licence: str | None = None
    """As the Hub writes it: apache-2.0, mit, cc-by-4.0, other."""
    datasets: tuple[str, ...] = ()
    """OWNER/NAME of data sets of the Hub."""


CARD = """# {name}

{kind}, written by instructblip {version}. Load it with `transformers.{reader}.from_pretrained`, or
with `instructblip.load("{name}")`.

| part | parameters |
|---|---|
{parameters}

## Prompts

{prompts}

## Data

{data}

## Figures

{figures}

## Recipe

{recipe}
"""

RETRIEVAL_CARD = """---
library_name: transformers
tags: [blip-2, image-text-retrieval]
---

# {name}

Image encoder, Q-Former and retrieval heads of a BLIP-2, written by instructblip {version}. Load it
with `transformers.Blip2ForImageTextRetrieval.from_pretrained`, or search a folder of images with
`instructblip search FOLDER WORDS --model {name}`.

## Data of the last training

{data}

## Recipe of the last training

{recipe}
"""


def export_model(
    model: str | Path,
    out: Path,
    form: ModelForm = "transformers",
    results: Sequence[Result] = (),
    image_encoder: bool = False,
    keep_lora: bool = False,
    given: Given = Given(),
    name: str | None = None,
) -> None:
    """Write ``model`` to ``out``.

    Args:
        model: a run or model directory, "starter" or "small".
        out: a new or empty directory, or for "lavis" a new file.
        form: "retrieval" has the parts that search needs, and no language model.
        results: scores for the card of a transformers directory; `small` has its own,
            and they follow it.
        image_encoder: whether a LAVIS file includes the image encoder.
        keep_lora: keep LoRA adapters apart, in PEFT's files, instead of merging them.
        given: licence and data sets for the card.
        name: of the model in its card; that of ``out`` if absent.

    Raises ValueError, before anything is written, if ``out`` is in use, if a LAVIS file would lose
    trained parts, for results of another model, and for "retrieval" without heads that match.
    """
    check_output(out, file=form == "lavis")
    source = model_directory(str(model))
    recipe_file = source / RECIPE_FILE
    recipe: dict[str, Any] = {}
    if recipe_file.is_file():
        recipe = read_values(recipe_file)
    if form == "lavis":
        if keep_lora:
            raise ValueError("a LAVIS file has no place for an adapter: leave out --keep-lora")
        trained = recipe.get("training", {}).get("trainable", ())
        refuse_loss(list(trained), image_encoder)
        loaded = InstructBlip.from_pretrained(model)
        lora.merge_lora(loaded.adapted["qformer_lora"])
        export_lavis(loaded, out, image_encoder)
        return
    if form == "retrieval":
        if keep_lora or results:
            raise ValueError(
                "a Blip2ForImageTextRetrieval has no adapter and no card with scores: leave out "
                "--keep-lora and --results"
            )
        _export_retrieval(source, out, recipe)
        return
    loaded = InstructBlip.from_pretrained(model)
    if keep_lora and not lora.lora_layers(loaded):
        raise ValueError(f"{model} has no LoRA adapter to keep apart: leave out --keep-lora")
    card = _card_of(name or out.name, loaded, source, recipe, results, given)
    if not keep_lora:
        lora.merge_lora(loaded)
    calibration = stored_calibration(source, loaded.config.instruction_aware)
    with replacing_directory(out) as directory:
        loaded.save_pretrained(directory)
        _forget_paths(directory)
        (directory / "README.md").write_text(card, encoding="utf-8")
        if calibration is not None:  # of the same answers, with the adapters merged or not
            model = fingerprint(directory, loaded.config.instruction_aware)
            calibration.model_copy(update={"model": model}).save(directory)


def _export_retrieval(source: Path, out: Path, recipe: Mapping[str, Any]) -> None:
    retriever = Retriever.from_pretrained(source)
    card = RETRIEVAL_CARD.format(
        name=escape_markdown(out.name), version=__version__, **_trained_on(recipe)
    )
    with replacing_directory(out) as directory:
        retriever.save_pretrained(directory)
        qformer_tokenizer(source).save_pretrained(directory)
        ImageTransform.from_pretrained(source).save_pretrained(directory)
        # without placeholders for queries, which transformers' processor would put into the text
        reader = json.dumps({"processor_class": "Blip2Processor"})
        (directory / "processor_config.json").write_text(reader, encoding="utf-8")
        (directory / "README.md").write_text(card, encoding="utf-8")
        if (source / "licences").is_dir():
            shutil.copytree(source / "licences", directory / "licences")


def _trained_on(recipe: Mapping[str, Any] | None) -> dict[str, str]:
    """The parts of a card about the training."""
    return {
        "data": _data(recipe) if recipe else "Not known.",
        "recipe": _fenced(_yaml(recipe), "yaml") if recipe else "Not known.",
    }


def write_card(
    model: str | Path,
    out: Path,
    results: Sequence[Result] = (),
    given: Given = Given(),
) -> None:
    """Write only the card of `export_model`, to the new file ``out``, to read it beforehand."""
    check_output(out, file=True)
    source = model_directory(str(model))
    file = source / RECIPE_FILE
    recipe = read_values(file) if file.is_file() else {}
    loaded = InstructBlip.from_pretrained(model)
    write_text(out, _card_of(source.name, loaded, source, recipe, results, given))


def left_out(card: str) -> list[str]:
    """What the header of a card leaves out because it is not known, each with its remedy."""
    known = ModelCard(card).data.to_dict()
    return [hint for key, hint in HINTS.items() if key not in known]


def _card_of(
    name: str,
    model: InstructBlip,
    source: Path,
    recipe: Mapping[str, Any],
    results: Sequence[Result],
    given: Given,
) -> str:
    _check_results(results, source, model)
    if (source / PARTS_FILE).is_file():
        theirs = ModelCard.load(source / "README.md")
        figures = f"\n## Figures\n\n{_scores(results)}\n" if results else ""
        header = _header(name, {}, results, given).to_dict() | theirs.data.to_dict()
        header |= {"license": given.licence} if given.licence else {}
        return _with_header(ModelCardData(**header), theirs.text.lstrip() + figures)
    parts = Counter[str]()
    for parameter_name, parameter in model.named_parameters():
        if ".lora." not in parameter_name:  # merged, or a separate folder
            parts[part_of(parameter_name)] += parameter.numel()
    template = read_chat_template(source)
    chat = ChatFormat.of(load_tokenizer(source), template) if template is not None else None
    return model_card(name, model.config.reader, parts, recipe, results, chat, given)


def _forget_paths(directory: Path) -> None:
    """Remove from the settings in a model directory where the model once was on some machine."""

    def clean(value: Any) -> Any:
        if isinstance(value, list):
            return [clean(each) for each in value]
        if not isinstance(value, dict):
            return value
        return {k: clean(v) for k, v in value.items() if not (is_place(k) and _is_path(v))}

    def is_place(key: str) -> bool:
        return key.endswith(("_path", "_file", "_dir"))

    for file in directory.rglob("*.json"):
        if file.name not in ("tokenizer.json", "vocab.json"):  # long, and about words
            values = read_json(file)
            if (cleaned := clean(values)) != values:
                file.write_text(json.dumps(cleaned, indent=2) + "\n", encoding="utf-8")


def _is_path(value: Any) -> bool:
    """Whether a setting is a path that says something about a machine."""
    return isinstance(value, str) and "\n" not in value and value.startswith(("/", "~", "\\"))


def _check_results(results: Sequence[Result], source: Path, model: InstructBlip) -> None:
    expected = fingerprint(source, model.config.instruction_aware)
    for result in results:
        if result.settings["model"] != expected:
            raise ValueError(
                f"the results of {result.benchmark} are another model's, or older than {source}; "
                f"run `instructblip evaluate` with {source}"
            )


def model_card(
    name: str,
    reader: str,
    parts: Mapping[str, int],
    recipe: Mapping[str, Any] | None = None,
    results: Sequence[Result] = (),
    chat: ChatFormat | None = None,
    given: Given = Given(),
) -> str:
    """Return the ``README.md`` of a model directory, which says what is not known.

    Args:
        name: of the model and its directory.
        reader: class of transformers that loads it.
        parts: number of parameters by part of the model.
        recipe: what it was tuned with; None if unknown. Folders of this machine stay out.
        results: of ``evaluate``, one for each benchmark.
        chat: the chat format that it was tuned with, if any.
        given: what its owner adds.

    Raises ValueError for a blind control and for two results of one benchmark.
    """
    for result in results:
        if result.blind:
            raise ValueError(f"{result.benchmark}: a blind control, not what the model can do")
    repeated = [name for name, count in Counter(r.benchmark for r in results).items() if count > 1]
    if repeated:
        raise ValueError(f"two results of {', '.join(repeated)}: give one folder for each")
    body = CARD.format(
        name=escape_markdown(name),
        kind="A BLIP-2" if reader.startswith("Blip2") else "An InstructBLIP",
        version=__version__,
        reader=reader,
        prompts=_prompts(chat),
        parameters="\n".join(f"| {part} | {count:,} |" for part, count in parts.items()),
        figures=_scores(results) if results else "Not evaluated.",
        **_trained_on(recipe),
    )
    return _with_header(_header(name, recipe or {}, results, given), body)


def _with_header(data: ModelCardData, body: str) -> str:
    order = ["library_name", "pipeline_tag", "tags", "license", "base_model", "datasets"]
    return f"---\n{data.to_yaml(original_order=order)}\n---\n\n{body}"


def _header(
    name: str, recipe: Mapping[str, Any], results: Sequence[Result], given: Given
) -> ModelCardData:
    """What the Hub reads of a card. Nothing is in it that is not known."""
    start = str(recipe.get("model", {}).get("start", ""))
    sets = (recipe.get("data") or {}).get("sets") or {}
    languages = {entry.get("language") for entry in sets.values() if entry.get("weight", 1)}
    scores = [_eval_result(each, view) for each in results for view in each.by_metric()]
    return ModelCardData(
        library_name="transformers",
        pipeline_tag="image-text-to-text",
        tags=["instructblip", "image-text-to-text"],
        license=given.licence,
        base_model=start.removeprefix(HUB).partition("@")[0] if start.startswith(HUB) else None,
        datasets=list(given.datasets) or None,
        language=sorted(languages) if languages and None not in languages else None,
        model_name=_one_line(name) if results else None,
        eval_results=[score for score in scores if score is not None] or None,
    )


def _eval_result(result: Result, view: Result) -> EvalResult | None:
    """A score of ``result``, by the metric of ``view``, as the model index has it; None where it
    is not defined."""
    bounds = view.interval
    if view.value is None:
        return None
    return EvalResult(
        task_type="image-text-to-text",
        dataset_type=_one_line(result.benchmark),
        dataset_name=_one_line(result.title),
        metric_type=view.metric.split()[0],
        metric_name=f"{view.metric}, 0 to 100",
        metric_value=round(view.value, 2),
        metric_args={
            "interval_95": bounds and [round(bounds.low, 2), round(bounds.high, 2)],
            "samples": view.n,
            "samples_of_the_set": view.settings["of"],
        },
    )


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _prompts(chat: ChatFormat | None) -> str:
    if chat is None:
        return "Plain text: prompts and responses have no chat format."
    end = chat.tokenizer.convert_ids_to_tokens(chat.end_id)
    return (
        "Prompts and responses have the chat format of `chat_template.jinja`, and "
        f"{_code(end)} ends a response:\n\n{_fenced(chat.example().strip())}"
    )


def _code(text: str) -> str:
    """The text as code in a line, which it cannot end."""
    inner = " ".join(text.replace("`", "'").split())
    return f"`{inner}`"


def _fenced(text: str, language: str = "") -> str:
    """The text as a block of code, which it cannot end."""
    longest = max(map(len, re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text}\n{fence}"


def _data(recipe: Mapping[str, Any]) -> str:
    sets = recipe["data"].get("sets") if isinstance(recipe.get("data"), dict) else None
    if not isinstance(sets, dict) or not all(isinstance(one, dict) for one in sets.values()):
        raise ValueError(f"the model's {RECIPE_FILE} has no data.sets; repair or remove it")
    lines = ["| set | weight | terms |", "|---|---|---|"]
    for name, entry in sets.items():
        known = SOURCES.get(entry.get("source") or name)
        terms = known.licence if known else "those of its owner"
        weight = entry.get("weight", 1)
        weight = f"{weight:g}" if isinstance(weight, int | float) else str(weight)
        cells = (name, weight, terms)
        lines.append(f"| {' | '.join(map(escape_markdown, cells))} |")
    return "\n".join(lines)


def _yaml(recipe: Mapping[str, Any]) -> str:
    """The recipe without empty settings and without folders; of a path its last name."""

    def clean(value: Any) -> Any:
        if isinstance(value, list):
            return [clean(each) for each in value]
        if not isinstance(value, dict):
            return Path(value).name if _is_path(value) else value
        inner = {k: clean(v) for k, v in value.items() if k not in ("root", "prepared")}
        return {k: v for k, v in inner.items() if v not in (None, {}, [])}

    return yaml.safe_dump(clean(recipe), sort_keys=False).strip()


def _scores(results: Sequence[Result]) -> str:
    """Each score with its 95 % bootstrap interval, the number of samples, prompt and decoding."""
    lines = ["| benchmark | figure, 0 to 100 | samples | how |", "|---|---|---|---|"]
    for result in (view for each in results for view in each.by_metric()):
        bounds, asked = result.interval, f"{result.n:,} of {result.settings['of']:,}"
        score = f"not defined: {result.undefined}"
        if bounds is not None:
            score = f"{result.value:.1f} [{bounds.low:.1f}, {bounds.high:.1f}]"
        elif result.value is not None:
            score = f"{result.value:.1f}"
        how = describe_how(result.how)
        if (constant := result.constant) is not None:
            how += f"; always {constant.answer[:60]!r}: {constant.score:.1f}"
        benchmark, how = map(escape_markdown, (result.benchmark, how))
        lines.append(f"| {benchmark} | {score} | {asked} | {how} |")
    for role, mean in summarise([r for r in results if r.value is not None]).items():
        sets = f"{mean.n} set{'s' if mean.n > 1 else ''}"
        name = f"mean, {role.replace('_', '-')}"
        bounds = "" if mean.low is None else f" [{mean.low:.1f}, {mean.high:.1f}]"
        lines.append(f"| {name} | {mean.value:.1f}{bounds} | {sets} | |")
    return "\n".join(lines)
