"""Make a model directory from parts: an official checkpoint, or two models and a new Q-Former."""

import json
import re
import tempfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from instructblip.core.files import replacing_directory
from instructblip.data.images import ImageTransform
from instructblip.data.tokens import Tokens, load_tokenizer, num_rows
from instructblip.model.checkpoints.combine import combine, copy_words, fit_text_branch, word_rms
from instructblip.model.checkpoints.directory import check_output, local_path
from instructblip.model.checkpoints.lavis import import_lavis, language_tokenizer, lavis_heads
from instructblip.model.checkpoints.shared_words import shared_tokenizer
from instructblip.model.checkpoints.transformers import (
    TEXT_BRANCH,
    read_text_branch,
    write_retrieval,
)
from instructblip.model.checkpoints.weights import read_nested
from instructblip.model.decoding import PAPER
from instructblip.model.encoders import check_encoder, encoder_images
from instructblip.model.instructblip import InstructBlip
from instructblip.model.language.adapters import read_language_config, text_config

BERT_WIDTH = 768
HEAD_WIDTH = 64
"""Channels of an attention head, as in BERT."""


def import_checkpoint(
    checkpoint: Path, vision: Path, language: Path, qformer_tokenizer: Path | None, out: Path
) -> None:
    """Write a checkpoint of the official code (LAVIS) as a directory that transformers reads too.
    One of stage 1 keeps its heads of retrieval.

    Args:
        checkpoint: the .pth file, which holds neither image encoder nor language model.
        vision: eva_vit_g.pth, or the weights of another image encoder.
        language: transformers directory of the language model.
        qformer_tokenizer: directory of BERT's tokenizer; None for a BLIP-2.
        out: a new or empty directory.
    """
    check_output(out)
    model = import_lavis(checkpoint, vision, language)
    if model.config.instruction_aware and qformer_tokenizer is None:
        raise ValueError(
            "an instruction-aware Q-Former needs its tokenizer: give --qformer-tokenizer DIR, a "
            "directory with the tokenizer of bert-base-uncased"
        )
    reader = load_tokenizer(qformer_tokenizer) if qformer_tokenizer is not None else None
    transform = ImageTransform(image_size=model.config.vision.image_size)
    tokens = Tokens(language_tokenizer(language), reader)
    _write(model, tokens, transform, out, lavis_heads(read_nested(checkpoint, "model")))


@dataclass(frozen=True)
class Part:
    """A row of the table that `combine` prints."""

    name: str
    type: str
    width: str
    layers: str
    parameters: int
    start: str
    """Where its weights come from."""

    @property
    def cells(self) -> tuple[str, ...]:
        return self.name, self.type, self.width, self.layers, f"{self.parameters:,}", self.start


@dataclass(frozen=True)
class Combined:
    """What `combine_parts` wrote."""

    parts: list[Part]
    tokenizers: str
    bytes_on_disk: int

    def describe(self) -> str:
        """A table of the parts, to print."""
        total = Part("all", "", "", "", sum(part.parameters for part in self.parts), "")
        head = ("part", "type", "width", "layers", "parameters", "starts from")
        rows = [head, *(part.cells for part in (*self.parts, total))]
        sizes = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = []
        for row in rows:
            left = [cell.ljust(size) for cell, size in zip(row[:2], sizes[:2], strict=True)]
            right = [cell.rjust(size) for cell, size in zip(row[2:5], sizes[2:5], strict=True)]
            lines.append("  ".join([*left, *right, row[5]]).rstrip())
        return "\n".join([*lines, f"tokenizers: {self.tokenizers}"])


def combine_parts(
    vision: str | Path,
    language: str | Path,
    qformer_tokenizer: str | Path | None,
    out: Path,
    num_queries: int = 32,
    text_branch: str | Path | None = None,
    qformer: Mapping[str, int] | None = None,
) -> Combined:
    """Write an image encoder and a language model with a new Q-Former, ready to train.

    The same parts give the same weights. Each of the four parts may also be ``hf://OWNER/NAME``;
    no other name uses the network.

    Args:
        qformer_tokenizer: directory of a BERT's tokenizer; None for the language model's own, whose
            word embeddings then start the Q-Former's word table where the widths are equal.
        text_branch: a BERT or Blip2ForImageTextRetrieval directory, or a file of this project, for
            word table, positions and text feed-forwards; None for random ones.
        qformer: fields of ``QFormerConfig`` other than those of `qformer_fields`.

    Raises FileNotFoundError for a directory without a model, and ValueError for tokenizers that do
    not fit, a text branch of other sizes and a width that the heads do not divide, before weights
    of the two models are read.
    """
    check_output(out)
    if text_branch is not None and qformer_tokenizer is None:
        raise ValueError(
            f"--text-branch {text_branch} has a word table for its own tokenizer: give that with "
            "--qformer-tokenizer DIR"
        )
    encoder, words = local_path(vision), local_path(language)
    check_encoder(encoder)
    text = text_config(read_language_config(words))
    reader = None if qformer_tokenizer is None else local_path(qformer_tokenizer)
    tokens = _tokens_for(words, text.vocab_size, reader)
    width = BERT_WIDTH if reader else min(BERT_WIDTH, text.hidden_size)
    fields = qformer_fields(tokens.qformer, {"hidden_size": width, **(qformer or {})})
    branch = None
    if text_branch is not None:
        source = local_path(text_branch)
        branch = read_text_branch(source)
        fields = fit_text_branch(branch, fields, source)
    images = encoder_images(str(encoder))
    transform = ImageTransform(**images) if images else ImageTransform.from_pretrained(encoder)
    torch.manual_seed(0)
    model = combine(encoder, words, fields, num_queries, branch, transform.image_size)
    copied = reader is None and copy_words(model)
    _write(model, tokens, transform, out)
    before, after = tokens.around_instruction
    return Combined(
        _parts_of(model, str(vision), str(language), text_branch, copied),
        f"{language}; of the Q-Former {qformer_tokenizer or 'the same'}, as {before} text {after}",
        sum(file.stat().st_size for file in out.rglob("*") if file.is_file()),
    )


def _tokens_for(language: Path, rows: int, qformer_tokenizer: Path | None) -> Tokens:
    """The tokenizers of a model whose language model has ``rows`` word embeddings."""
    tokenizer = load_tokenizer(language)
    if (needed := num_rows(tokenizer)) > rows:
        raise ValueError(
            f"{language}: the tokenizer does not fit, its ids need {needed:,} word embeddings and "
            f"the language model has {rows:,}; give the tokenizer that it was trained with"
        )
    if qformer_tokenizer is None:
        return Tokens(tokenizer, shared_tokenizer(tokenizer))
    tokens = Tokens(tokenizer, load_tokenizer(qformer_tokenizer))
    if not all(tokens.around_instruction):
        raise ValueError(
            f"{qformer_tokenizer}: the tokenizer does not fit, it puts no [CLS] before and no "
            "[SEP] after a text; give a BERT's, or leave --qformer-tokenizer out for the language "
            "model's own"
        )
    return tokens


def qformer_fields(tokenizer: Any, given: Mapping[str, int]) -> dict[str, Any]:
    """Fields of a ``QFormerConfig`` for a tokenizer: a head has 64 channels, the feed-forwards are
    4 times as wide as the rest, and the word table has a row for every id. ``given`` has the
    ``hidden_size``, and replaces the others. Raises ValueError for heads that do not divide it."""
    width, vocab = given["hidden_size"], tokenizer.get_vocab()
    pad, around, rows = tokenizer.pad_token_id, tokenizer("a")["input_ids"], num_rows(tokenizer)
    fields: dict[str, Any] = {
        "num_attention_heads": max(1, width // HEAD_WIDTH),
        "intermediate_size": 4 * width,
        # a BERT's gets the row of [DEC], as BLIP-2 adds it
        "vocab_size": rows + ("[CLS]" in vocab and "[DEC]" not in vocab),
        # the row of padding never trains, so it must not be that of the start or the end
        "pad_token_id": None if pad is None or pad in around or pad >= rows else pad,
        **given,
    }
    if width % (heads := fields["num_attention_heads"]):
        raise ValueError(
            f"a Q-Former of width {width} has no {heads} heads of equal width; choose the number "
            "with --heads, or a width that is a multiple of it"
        )
    return fields


ROWS = {
    "image encoder": "vision_model.",
    "query tokens": "query_tokens",
    "word table": "qformer.embeddings.word_embeddings.",
    "text branch": TEXT_BRANCH,
    "Q-Former": "qformer.",
    "projection": "language_projection.",
    "language model": "language_model.",
}
"""Row of the table -> its parameters: the first row that matches a name has it."""


def _parts_of(
    model: InstructBlip, vision: str, language: str, text_branch: str | Path | None, copied: bool
) -> list[Part]:
    """The rows of the table, with the names by which the parts were given."""
    counts = Counter[str]()
    for name, parameter in model.named_parameters():
        counts[next(row for row, pattern in ROWS.items() if re.match(pattern, name))] += (
            parameter.numel()
        )
    encoder, qformer, text = model.config.vision, model.config.qformer, model.language_model.config
    projection, width = model.language_projection, qformer.hidden_size
    deviation = f"deviation {qformer.initializer_range:g}"
    new = f"random, {deviation}"
    branch = str(text_branch or new)
    words = f"the language model's, scaled to {deviation}" if copied else branch
    scaled = f"random, {word_rms(model):.3g} as the RMS of its output and of word embeddings"
    vision_layers, layers = encoder.num_hidden_layers, qformer.num_hidden_layers
    queries, words_in = model.config.num_query_tokens, projection.out_features
    rows = (
        (
            "image encoder",
            f"{encoder.num_tokens} tokens",
            encoder.hidden_size,
            vision_layers,
            vision,
        ),
        ("query tokens", f"{queries} tokens", width, 0, new),
        ("Q-Former", f"{qformer.num_attention_heads} heads", width, layers, new),
        ("word table", f"{qformer.vocab_size} rows", width, 0, words),
        ("text branch", f"{qformer.intermediate_size} inside", width, 0, branch),
        ("projection", "linear", words_in, 0, scaled),
        ("language model", text.model_type, words_in, text.num_hidden_layers, language),
    )
    return [
        Part(name, kind, f"{size:,}", str(layers or ""), counts[name], start)
        for name, kind, size, layers, start in rows
    ]


def _write(
    model: InstructBlip,
    tokens: Tokens,
    transform: ImageTransform,
    out: Path,
    heads: Mapping[str, Tensor] = MappingProxyType({}),
) -> None:
    """Write weights, tokenizers, image transform, the paper's decoding and the heads of retrieval,
    all or nothing."""
    with tempfile.TemporaryDirectory() as folder:
        assets = Path(folder)
        tokens.save_pretrained(assets)
        transform.save_pretrained(assets)
        text = model.config.language
        ids = {
            name: text[name]
            for name in ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")
            if text.get(name) is not None
        }
        settings = {**ids, **PAPER.model_dump(exclude={"do_sample", "temperature", "top_p"})}
        (assets / "generation_config.json").write_text(json.dumps(settings, indent=2) + "\n")
        with replacing_directory(out) as directory:
            model.save_pretrained(directory, assets)
            if heads:
                write_retrieval(dict(heads), {}, directory)
