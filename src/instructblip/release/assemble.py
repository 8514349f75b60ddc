"""Make a model directory from parts: an official checkpoint, or two models and a new Q-Former."""

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

from instructblip.data.images import ImageTransform
from instructblip.data.tokens import load_tokenizer
from instructblip.model.checkpoints.combine import combine
from instructblip.model.checkpoints.directory import check_output
from instructblip.model.checkpoints.lavis import import_lavis, language_tokenizer
from instructblip.model.decoding import PAPER
from instructblip.model.instructblip import InstructBlip


def import_checkpoint(
    checkpoint: Path, vision: Path, language: Path, qformer_tokenizer: Path | None, out: Path
) -> None:
    """Write a checkpoint of the official code (LAVIS) as a directory that transformers reads too.

    Args:
        checkpoint: the .pth file, which holds neither image encoder nor language model.
        vision: eva_vit_g.pth, or the weights of another image encoder.
        language: transformers directory of the language model.
        qformer_tokenizer: directory of BERT's tokenizer; None for a BLIP-2.
        out: a new or empty directory.
    """
    check_output(out)
    model = import_lavis(checkpoint, vision, language)
    transform = ImageTransform(image_size=model.config.vision.image_size)
    _write(model, language_tokenizer(language), qformer_tokenizer, transform, out)


def combine_parts(
    vision: Path,
    language: Path,
    qformer_tokenizer: Path,
    out: Path,
    num_queries: int = 32,
    num_layers: int = 12,
) -> None:
    """Write an image encoder and a language model with a new Q-Former, ready to train."""
    check_output(out)
    transform, tokenizer = ImageTransform.from_pretrained(vision), load_tokenizer(language)
    model = combine(vision, language, {"num_hidden_layers": num_layers}, num_queries)
    _write(model, tokenizer, qformer_tokenizer, transform, out)


def _write(
    model: InstructBlip,
    tokenizer: Any,
    qformer_tokenizer: Path | None,
    transform: ImageTransform,
    out: Path,
) -> None:
    """Write weights, tokenizers, image transform and the paper's decoding, all or nothing."""
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
