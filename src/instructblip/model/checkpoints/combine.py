"""A new pair of image encoder and language model, with a new Q-Former between them.

Image encoders: EVA-CLIP (from a BLIP-2 or InstructBLIP directory), CLIP and SigLIP, read from
transformers' directories into ``VisionModel``, which computes the same features. Language models:
any that ``model/language`` drives (Llama, Qwen, Gemma, OPT, T5 families).
"""

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig

from instructblip.model.checkpoints.transformers import load_weights
from instructblip.model.checkpoints.weights import read_json, read_weights
from instructblip.model.config import InstructBlipConfig, QFormerConfig, VisionConfig
from instructblip.model.instructblip import InstructBlip
from instructblip.model.language.adapters import read_language_config

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
) -> InstructBlip:
    """An instruction-aware model of two frozen parts and a random Q-Former, to be pre-trained.

    ``qformer`` are fields of ``QFormerConfig``; by default BERT-base, as in the paper.
    """
    vision_config, encoder = read_vision(vision)
    text = read_language_config(language)
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
    load_weights(model, weights, f"{vision} and {language}")
    return model.eval()


def read_vision(path: Path) -> tuple[VisionConfig, dict[str, Tensor]]:
    """Config and weights of an image encoder, by the names of ``VisionModel``.

    Raises ValueError for an image encoder of another kind.
    """
    values = read_json(path / "config.json")
    kind = str(values.get("model_type"))
    weights = {
        name.removeprefix("vision_model."): value
        for name, value in read_weights(path).items()
        if name.startswith(("vision_model.", "embeddings.", "encoder.", "p"))
    }
    if kind.startswith(("instructblip", "blip-2")):
        config = InstructBlipConfig.from_transformers(values).vision
        return config, {n: v for n, v in weights.items() if n.startswith(KNOWN)}
    family = kind.removesuffix("_vision_model")
    if family not in ("clip", "siglip"):
        raise ValueError(
            f"{path} holds an image encoder of model_type {kind!r}; expected CLIP, SigLIP, or that "
            "of a BLIP-2 or InstructBLIP"
        )
    # a config file leaves out transformers' defaults
    given = {n: v for n, v in values.get("vision_config", values).items() if n in SHARED}
    theirs = AutoConfig.for_model(f"{family}_vision_model", **given)
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
        elif not LEFT_OUT.search(name):
            for theirs, new in NORMS.items():
                name = name.replace(theirs, new)
            ours[name] = value
    if "embeddings.patch_embedding.bias" not in ours:  # CLIP's has none
        ours["embeddings.patch_embedding.bias"] = torch.zeros(config.hidden_size)
    return {name: value for name, value in ours.items() if name.startswith(KNOWN)}
