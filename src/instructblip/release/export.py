"""Write a model for others: a transformers directory with its card, or a LAVIS file."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import yaml

from instructblip.core.files import replacing_directory
from instructblip.evaluation.result import Result
from instructblip.inference.fingerprint import fingerprint
from instructblip.model.checkpoints.directory import check_output, model_directory
from instructblip.model.checkpoints.lavis import export_lavis, refuse_loss
from instructblip.model.instructblip import InstructBlip
from instructblip.model.language import lora
from instructblip.model.trainable import part_of
from instructblip.release.card import model_card

RECIPE_FILE = "recipe.yaml"
ModelForm = Literal["transformers", "lavis"]


def export_model(
    model: str | Path,
    out: Path,
    form: ModelForm = "transformers",
    results: Sequence[Result] = (),
    image_encoder: bool = False,
    keep_lora: bool = False,
) -> None:
    """Write ``model`` to ``out``.

    Args:
        model: a run or model directory, or "starter".
        out: a new or empty directory, or for "lavis" a new file.
        results: scores for the card of a transformers directory.
        image_encoder: whether a LAVIS file includes the image encoder.
        keep_lora: keep a LoRA adapter apart, in PEFT's files, instead of merging it.

    Raises ValueError, before anything is written, if ``out`` is in use, if a LAVIS file would lose
    trained parts, and for results of another model.
    """
    check_output(out, file=form == "lavis")
    source = model_directory(str(model))
    recipe_file = source / RECIPE_FILE
    recipe = (
        yaml.safe_load(recipe_file.read_text(encoding="utf-8")) if recipe_file.is_file() else {}
    )
    if form == "lavis":
        if keep_lora:
            raise ValueError("a LAVIS file has no place for an adapter: leave out --keep-lora")
        trained = (recipe or {}).get("training", {}).get("trainable", ())
        refuse_loss(list(trained), image_encoder)
        export_lavis(InstructBlip.from_pretrained(model), out, image_encoder)
        return
    loaded = InstructBlip.from_pretrained(model)
    if keep_lora and not lora.lora_layers(loaded.language_model):
        raise ValueError(f"{model} has no LoRA adapter to keep apart: leave out --keep-lora")
    _check_results(results, source, loaded)
    if not keep_lora:
        lora.merge_lora(loaded.language_model)
    card = _card_of(loaded, out.name, recipe, results)
    with replacing_directory(out) as directory:
        loaded.save_pretrained(directory)
        (directory / "README.md").write_text(card, encoding="utf-8")


def _check_results(results: Sequence[Result], source: Path, model: InstructBlip) -> None:
    expected = fingerprint(source, model.config.instruction_aware)
    for result in results:
        if result.settings["model"] != expected:
            raise ValueError(
                f"the results of {result.benchmark} are another model's, or older than {source}; "
                f"run `instructblip evaluate` with {source}"
            )


def _card_of(
    model: InstructBlip, name: str, recipe: dict[str, Any] | None, results: Sequence[Result]
) -> str:
    parts = Counter[str]()
    for parameter_name, parameter in model.named_parameters():
        parts[part_of(parameter_name)] += parameter.numel()
    return model_card(name, model.config.reader, parts, recipe, results)
