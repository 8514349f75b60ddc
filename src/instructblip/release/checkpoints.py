"""Model directories for others: weights, tokenizers, settings and the card, all or nothing."""

import json
import shutil
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from instructblip.core.files import replacing_directory
from instructblip.data.images import ImageTransform
from instructblip.evaluation.result import Result
from instructblip.inference.fingerprint import fingerprint
from instructblip.model.decoding import PAPER
from instructblip.model.instructblip import InstructBlip
from instructblip.model.trainable import part_of
from instructblip.release.card import card

RECIPE_FILE = "recipe.yaml"


def write_imported(
    model: InstructBlip,
    tokenizer: Any,
    qformer_tokenizer: Path | None,
    transform: ImageTransform,
    out: Path,
) -> None:
    """The directory of a model that came in parts, with its tokenizers and picture transform.

    Raises ValueError where an instruction-aware model is given no Q-Former tokenizer.
    """
    if model.config.instruction_aware and qformer_tokenizer is None:
        raise ValueError(
            "an instruction-aware Q-Former needs its tokenizer: give --qformer-tokenizer DIR, a "
            "directory with the tokenizer of bert-base-uncased"
        )
    with tempfile.TemporaryDirectory() as folder:
        assets = Path(folder)
        tokenizer.save_pretrained(folder)
        if qformer_tokenizer is not None:
            shutil.copytree(qformer_tokenizer, assets / "qformer_tokenizer")
        transform.save_pretrained(assets)
        text = model.config.language
        ids = {
            name: text[name]
            for name in ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")
            if text.get(name) is not None
        }
        settings = {**ids, **PAPER.model_dump(exclude={"do_sample", "temperature", "top_p"})}
        (assets / "generation_config.json").write_text(json.dumps(settings, indent=2) + "\n")
        model.save_pretrained(out, assets)


def write_exported(
    model: InstructBlip, out: Path, source: Path, results: Sequence[Result] = ()
) -> None:
    """A transformers directory with a card: the recipe beside ``source`` and the figures given.

    Raises ValueError, before anything is written, for figures that are not this model's.
    """
    own = fingerprint(source, model.config.instruction_aware)
    for result in results:
        if result.settings["model"] != own:
            raise ValueError(
                f"the results of {result.benchmark} are another model's, or older than {source}; "
                f"run `instructblip evaluate` with {source}"
            )
    recipe = source / RECIPE_FILE
    parts = Counter[str]()
    for name, parameter in model.named_parameters():
        parts[part_of(name)] += parameter.numel()
    text = recipe.read_text(encoding="utf-8") if recipe.is_file() else None
    readme = card(out.name, model.config.reader, parts, text, results)
    with replacing_directory(out) as directory:
        model.save_pretrained(directory)
        (directory / "README.md").write_text(readme, encoding="utf-8")
