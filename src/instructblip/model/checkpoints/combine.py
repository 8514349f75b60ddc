"""A new pair of image encoder and language model, with a new Q-Former between them.

EVA-CLIP (from a BLIP-2 or InstructBLIP directory), CLIP, SigLIP and SigLIP 2 are read from
transformers' directories into ``VisionModel``, which computes the same features; the image encoders
of ``model/encoders.py`` run as they are. Language models: any that ``model/language`` drives
(Llama, Qwen, Gemma, OPT, T5 families).
"""

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig

from instructblip.core.files import read_json
from instructblip.model.checkpoints.shared_words import shared_words
from instructblip.model.checkpoints.transformers import TEXT_BRANCH, load_weights
from instructblip.model.checkpoints.weights import read_weights
from instructblip.model.config import (
    EncoderConfig,
    InstructBlipConfig,
    QFormerConfig,
    VisionConfig,
)
from instructblip.model.encoders import WHEELS, check_encoder, read_encoder
from instructblip.model.instructblip import InstructBlip
from instructblip.model.language.adapters import read_language_config
from instructblip.model.qformer import QFormer

SHARED = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "image_size",
    "patch_size",
    "hidden_act",
    "layer_norm_eps",
    "attention_dropout",
)
"""Fields of an image encoder that transformers' CLIP and SigLIP have too."""

NORMS = {"pre_layrnorm.": "embeddings.norm.", "self_attn.out_proj.": "self_attn.projection."}


KNOWN = ("embeddings.", "encoder.", "post_layernorm.")
LEFT_OUT = re.compile(r"^embeddings\.position_ids|\.self_attn\.[kv]_proj\.")


def combine(
    vision: Path,
    language: Path,
    qformer: dict[str, Any] | None = None,
    num_query_tokens: int = 32,
    text_branch: Mapping[str, Tensor] | None = None,
    image_size: int | None = None,
) -> InstructBlip:
    """An instruction-aware model of two frozen parts and a random Q-Former, to be pre-trained.

    ``qformer`` are fields of ``QFormerConfig``; by default BERT-base, as in the paper. The
    projection starts at the scale of the language model's word embeddings (`scale_projection`).
    ``text_branch`` are tensors that `fit_text_branch` approved, ``image_size`` is what the image
    encoder reads where its weights leave that open.
    """
    text = read_language_config(language)
    vision_config, encoder = read_vision(vision, image_size)
    config = InstructBlipConfig(
        vision=vision_config,
        qformer=QFormerConfig(
            **{"vocab_size": 30523, **(qformer or {})},
            encoder_hidden_size=vision_config.hidden_size,
        ),
        language=text,
        num_query_tokens=num_query_tokens,
    )
    model = InstructBlip(config)
    weights = {f"vision_model.{name}": value for name, value in encoder.items()}
    weights |= {f"language_model.{n}": v for n, v in read_weights(language).items()}
    new = ("query_tokens", "qformer.", "language_projection.")
    weights |= {n: v for n, v in model.state_dict().items() if n.startswith(new)}
    weights |= {n: v for n, v in (text_branch or {}).items() if n in weights}
    load_weights(model, weights, f"{vision} and {language}")
    scale_projection(model)
    return model.eval()


def fit_text_branch(
    branch: Mapping[str, Tensor], fields: Mapping[str, Any], where: Path
) -> dict[str, Any]:
    """``fields`` of a ``QFormerConfig`` with the numbers of words and positions of a text branch.

    A branch with more layers gives its first ones. Raises ValueError where it has too few words, or
    another width.
    """
    tables = {"vocab_size": "word", "max_position_embeddings": "position"}
    names = {field: f"qformer.embeddings.{t}_embeddings.weight" for field, t in tables.items()}
    sizes = {field: len(branch[name]) for field, name in names.items() if name in branch}
    if (rows := sizes.get("vocab_size", 0)) < fields["vocab_size"]:
        raise ValueError(
            f"{where}: the text branch does not fit the tokenizer, it has {rows:,} words and the "
            f"ids need {fields['vocab_size']:,}; give the tokenizer that it was trained with"
        )
    with torch.device("meta"):
        state = QFormer(QFormerConfig(**{**fields, **sizes})).state_dict()
    for name, value in state.items():
        full = f"qformer.{name}"
        if TEXT_BRANCH.fullmatch(full) and (
            full not in branch or branch[full].shape != value.shape
        ):
            given = list(branch[full].shape) if full in branch else "nothing"
            raise ValueError(
                f"{where}: the text branch does not fit a Q-Former of width "
                f"{fields['hidden_size']}, it has {given} for {full} and {list(value.shape)} is "
                "expected; choose the width and at most the layers that it has"
            )
    return {**fields, **sizes}


@torch.no_grad()
def word_rms(model: InstructBlip) -> float:
    """Root mean square of what the language model's word embedding returns, over all words."""
    embedding = model.language_model.get_input_embeddings()
    # not of its weight: Gemma 3 scales the rows that it looks up
    words = embedding(torch.arange(embedding.num_embeddings))
    return words.float().pow(2).mean().sqrt().item()


@torch.no_grad()
def scale_projection(model: InstructBlip) -> None:
    """Draw a new projection whose output has the root mean square of word embeddings.

    Queries leave the Q-Former through a LayerNorm, which gives them a root mean square of 1.
    """
    projection = model.language_projection
    projection.weight.normal_(std=word_rms(model) / projection.in_features**0.5)
    projection.bias.zero_()


@torch.no_grad()
def copy_words(model: InstructBlip) -> bool:
    """Start the Q-Former's word table as the language model's, for a tokenizer that both share.

    Returns False, and copies nothing, where the widths differ.
    """
    table = model.qformer.embeddings.word_embeddings.weight  # [rows, D]
    words = model.language_model.get_input_embeddings().weight[: len(table)]
    if words.shape != table.shape:
        return False
    table.copy_(shared_words(words, model.config.qformer.initializer_range))
    return True


def read_vision(
    path: Path, image_size: int | None = None
) -> tuple[VisionConfig | EncoderConfig, dict[str, Tensor]]:
    """Config and weights of an image encoder, by the names of ``vision_model``.

    Raises FileNotFoundError where there is none, ValueError for one of another kind.
    """
    check_encoder(path)
    if str(path) in WHEELS:
        return read_encoder(path, image_size)
    values = read_json(path / "config.json")
    kind = str(values.get("model_type"))
    family = kind.removesuffix("_vision_model")
    if family not in ("clip", "siglip", "siglip2") and not kind.startswith(
        ("instructblip", "blip-2")
    ):
        return read_encoder(path, image_size)
    weights = {
        name.removeprefix("vision_model."): value
        for name, value in read_weights(path).items()
        if name.startswith(("vision_model.", "embeddings.", "encoder.", "p"))
    }
    if kind.startswith(("instructblip", "blip-2")):
        config = InstructBlipConfig.from_transformers(values).vision
        return config, {n: v for n, v in weights.items() if n.startswith(KNOWN)}
    # a config file leaves out transformers' defaults
    given = values.get("vision_config", values)
    given = {n: v for n, v in given.items() if n in (*SHARED, "num_patches")}
    theirs: Any = AutoConfig.for_model(f"{family}_vision_model", **given)
    if family == "siglip2":  # its images have any shape; here a square of the learned positions
        theirs.image_size = math.isqrt(theirs.num_patches) * theirs.patch_size
    config = VisionConfig(
        **{name: getattr(theirs, name) for name in SHARED},
        class_token=family == "clip",
        pre_layernorm=family == "clip",
    )
    return config, _fused(weights, config)


def _fused(weights: dict[str, Tensor], config: VisionConfig) -> dict[str, Tensor]:
    """Tensors of CLIP or SigLIP with one matrix for queries, keys and values, without the heads."""
    ours: dict[str, Tensor] = {}
    for name, value in weights.items():
        if ".self_attn.q_proj." in name:
            parts = [weights[name.replace("q_proj", f"{part}_proj")] for part in "qkv"]
            ours[name.replace("q_proj", "qkv")] = torch.cat(parts)
        elif name == "embeddings.class_embedding":
            ours[name] = value.view(1, 1, -1)
        elif name == "embeddings.position_embedding.weight":
            ours["embeddings.position_embedding"] = value[None]
        elif name == "embeddings.patch_embedding.weight" and value.ndim == 2:
            side = config.patch_size  # SigLIP 2 multiplies flat patches [S, S, 3]
            ours[name] = value.unflatten(1, (side, side, 3)).permute(0, 3, 1, 2)
        elif not LEFT_OUT.search(name):
            for theirs, new in NORMS.items():
                name = name.replace(theirs, new)
            ours[name] = value
    if "embeddings.patch_embedding.bias" not in ours:  # CLIP's has none
        ours["embeddings.patch_embedding.bias"] = torch.zeros(config.hidden_size)
    return {name: value for name, value in ours.items() if name.startswith(KNOWN)}
