"""Checkpoints of the official code (LAVIS ``.pth``), to our names and back.

A released InstructBLIP file is trimmed to what was trained: ``{"model": {...}}`` with the query
tokens, the Q-Former, ``ln_vision`` and the projection. Image encoder (``eva_vit_g.pth``, a bare
dict) and language model (a transformers directory) are separate. Differences from transformers:

- the image encoder has a bias for queries and values and none for keys;
- ``ln_vision`` has torch's epsilon 1e-5, every other norm of the encoder 1e-6;
- ``eva_vit_g.pth`` holds one block more than is used, and a head; both are left out;
- the Q-Former's vocabulary has one row more than BERT's, for the token [DEC];
- Vicuna's prompts begin with ``</s>``, and its vocabulary has a pad token, 32000;
- Flan-T5 runs with the exact GELU, whatever its config says.
"""

import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from tokenizers import processors
from torch import Tensor
from transformers import AutoTokenizer

from instructblip.core.files import read_json
from instructblip.model.checkpoints.combine import scale_projection
from instructblip.model.checkpoints.transformers import HARMLESS, load_weights
from instructblip.model.checkpoints.weights import read_nested, read_weights, write_pickle
from instructblip.model.config import EncoderConfig, InstructBlipConfig, QFormerConfig, VisionConfig
from instructblip.model.instructblip import InstructBlip
from instructblip.model.language.adapters import read_language_config
from instructblip.model.lora import lora_layers

LN_VISION_EPS = 1e-5
PROJECTION = "language_projection."
BLOCKS = "vision_model.encoder."
ENCODER_BLOCKS = 39
"""Of the 40 in ``eva_vit_g.pth``."""
VICUNA_PAD = "[PAD]"
BARE_ENCODER = ("blocks.", "cls_token", "pos_embed", "patch_embed.", "norm.", "head.", "fc_norm.")
"""Beginnings of the names in ``eva_vit_g.pth``, which has no prefix."""
OTHER_HEADS = re.compile(
    r"(vision_proj|text_proj|itm_head)\..*|temp|Qformer\.cls\..*|Qformer\.bert\.pooler\..*"
    r"|Qformer\.bert\.embeddings\.position_ids|(visual_encoder\.)?(norm|fc_norm|head)\..*"
)
"""Heads of stage 1 and of EVA-CLIP, which are no part of the model."""
RETRIEVAL_HEADS = {
    "vision_proj": "vision_projection",
    "text_proj": "text_projection",
    "itm_head": "itm_head",
}
"""The official names of the heads of retrieval, which stage 1 trains, and transformers'."""

NAMES = (
    ("visual_encoder.blocks.", "vision_model.encoder.layers."),
    ("visual_encoder.cls_token", "vision_model.embeddings.class_embedding"),
    ("visual_encoder.pos_embed", "vision_model.embeddings.position_embedding"),
    ("visual_encoder.patch_embed.proj.", "vision_model.embeddings.patch_embedding."),
    (".norm1.", ".layer_norm1."),
    (".norm2.", ".layer_norm2."),
    (".attn.qkv.", ".self_attn.qkv."),
    (".attn.proj.", ".self_attn.projection."),
    ("ln_vision.", "vision_model.post_layernorm."),
    ("embeddings.LayerNorm.", "embeddings.layernorm."),
    ("Qformer.bert.", "qformer."),
    ("attention.self.", "attention.attention."),
)
"""Parts of names (official, ours), replaced in this order, and in reverse on the way back."""
VISION_NAMES = (
    "vision_model.embeddings.patch_embedding.weight",
    "vision_model.embeddings.position_embedding",
    "vision_model.encoder.layers.0.mlp.fc1.bias",
)
QFORMER_NAMES = ("query_tokens", "qformer.encoder.layer.0.intermediate_query.dense.bias")
FAMILY = re.compile(r"(llm|t5|opt)_(proj|model)\.")
"""Beginnings of the names of projection and language model, by the family of the latter."""


def is_lavis(names: Any) -> bool:
    """Whether these are tensor names of the official code."""
    return any(name.startswith(("Qformer.bert.", "visual_encoder.", "blocks.")) for name in names)


def from_lavis(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors by our names, with ``qkv.bias`` joined and without other heads."""
    whole = {
        f"visual_encoder.{name}" if name.startswith(BARE_ENCODER) else name: value
        for name, value in weights.items()
    }
    ours: dict[str, Tensor] = {}
    for name, value in whole.items():
        if OTHER_HEADS.fullmatch(name) or name.endswith(".attn.v_bias"):
            continue
        if name.endswith(".attn.q_bias"):
            values = whole.get(name.replace("q_bias", "v_bias"))
            if values is None:
                raise ValueError(f"{name} has no v_bias beside it: the file is incomplete")
            name = name.replace("q_bias", "qkv.bias")
            value = torch.cat([value, torch.zeros_like(value), values])
        ours[_ours(name)] = value
    return ours


def lavis_heads(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The heads of retrieval by transformers' names; empty for a file of another stage."""
    if not {"vision_proj.weight", "text_proj.weight"} <= weights.keys():
        return {}
    parts = ((*name.partition("."), value) for name, value in weights.items())
    heads = {f"{RETRIEVAL_HEADS[p]}.{n}": v for p, _, n, v in parts if p in RETRIEVAL_HEADS}
    return heads | {name: weights[name] for name in ("temp",) if name in weights}


def to_lavis(
    weights: dict[str, Tensor], projection: str, image_encoder: bool = False
) -> dict[str, Tensor]:
    """The tensors of a trimmed file by the official names, with ``image_encoder`` or without.

    Raises ValueError for an encoder with a key bias, which the official code does not have.
    """
    lavis: dict[str, Tensor] = {}
    for name, value in weights.items():
        encoder = name.startswith(("vision_model.embeddings.", "vision_model.encoder."))
        if name.startswith("language_model.") or (encoder and not image_encoder):
            continue
        if name.endswith(".self_attn.qkv.bias"):
            query, key, values = value.chunk(3)
            if key.any():
                raise ValueError(f"{name} has a bias for keys, for which LAVIS has no place")
            block = _official(name).removesuffix("qkv.bias")
            lavis |= {block + "q_bias": query.clone(), block + "v_bias": values.clone()}
            continue
        name = name.replace("language_projection.", f"{projection}.")
        lavis[_official(name)] = value
    positions = lavis.get("Qformer.bert.embeddings.position_embeddings.weight")
    if positions is not None:
        lavis["Qformer.bert.embeddings.position_ids"] = torch.arange(len(positions))[None]
    return lavis


def _ours(name: str) -> str:
    if family := FAMILY.match(name):
        part = "language_model." if family[2] == "model" else "language_projection."
        return part + name[family.end() :]
    for official, ours in NAMES:
        name = name.replace(official, ours)
    return name


def _official(name: str) -> str:
    for official, ours in reversed(NAMES):
        name = name.replace(ours, official)
    return name


def import_lavis(
    checkpoint: Path,
    vision: Path,
    language: Path,
    vision_heads: int = 16,
    qformer_heads: int = 12,
) -> InstructBlip:
    """The whole model from its three parts, in fp32; `import` writes it with its tokenizers.

    Weights of the image encoder or the language model in ``checkpoint``, as where they were
    trained, take precedence. A file of stage 1 has no projection: a new one is drawn, as `combine`
    draws it. Raises ValueError for a file that does not hold its part.

    Args:
        checkpoint: a trimmed or whole ``.pth`` of an InstructBLIP or a BLIP-2.
        vision: ``eva_vit_g.pth``, or a directory or file with the encoder by our names.
        language: a transformers directory of the language model.
        vision_heads: attention heads, which no tensor shows; by default the official number.
        qformer_heads: likewise.
    """
    official = read_nested(checkpoint, "model")
    given = from_lavis(official)
    encoder = read_nested(vision, "model") if vision.is_file() else read_weights(vision)
    encoder = from_lavis(encoder) if is_lavis(encoder) else encoder
    norm = "vision_model.post_layernorm."
    weights = {
        name: value
        for name, value in encoder.items()
        if name.startswith("vision_model.") and not name.startswith(norm)
    }
    weights |= {name: value for name, value in given.items() if not HARMLESS.fullmatch(name)}
    spare = [n for n in weights if n.startswith(BLOCKS) and _layer(n) >= ENCODER_BLOCKS]
    for name in spare:
        del weights[name]
    prefix = "language_model."
    trained = {n.removeprefix(prefix): v for n, v in weights.items() if n.startswith(prefix)}
    text, language_weights = language_parts(language, trained)
    weights |= {prefix + name: value for name, value in language_weights.items()}
    for file, what, names in (
        (vision, "image encoder: expected eva_vit_g.pth or weights under our names", VISION_NAMES),
        (checkpoint, "Q-Former: expected a .pth of an InstructBLIP or a BLIP-2", QFORMER_NAMES),
    ):
        if absent := [name for name in names if name not in weights]:
            raise ValueError(f"{file} holds no {what} ({absent[0]} is missing)")
    model = InstructBlip(_config_of(weights, text, vision_heads, qformer_heads))
    projection = {n: v for n, v in model.state_dict().items() if n.startswith(PROJECTION)}
    new = bool(lavis_heads(official)) and not weights.keys() & projection.keys()
    load_weights(model, projection | weights if new else weights, checkpoint)
    if new:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            scale_projection(model)
    return model.eval()


def language_parts(
    language: Path, trained: Mapping[str, Tensor] | None = None
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Config and weights of a language model as the official code changes them. ``trained`` weights
    replace those in the directory, with the row of [PAD] or without it."""
    text, weights = read_language_config(language), read_weights(language)
    weights |= trained or {}
    if text.get("model_type") in ("t5", "mt5"):
        text["dense_act_fn"] = "gelu"
        return text, weights
    if text.get("model_type") == "llama" and text.get("pad_token_id") != text["vocab_size"] - 1:
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            # the row of [PAD], which is always masked and never trained
            if name in weights and len(weights[name]) == text["vocab_size"]:
                mean = weights[name].float().mean(0, keepdim=True).to(weights[name].dtype)
                weights[name] = torch.cat([weights[name], mean])
        text |= {"vocab_size": text["vocab_size"] + 1, "pad_token_id": text["vocab_size"]}
        text |= {"bos_token_id": text.get("eos_token_id", 2)}
    return text, weights


def language_tokenizer(language: Path) -> Any:
    """The tokenizer as the official code configures it: Vicuna's prompts begin with ``</s>``."""
    folder = str(language)
    tokenizer: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    if read_json(language / "config.json").get("model_type") != "llama":
        return tokenizer
    end = tokenizer.eos_token
    tokenizer.add_special_tokens(
        {"pad_token": VICUNA_PAD, "bos_token": end, "unk_token": end, "eos_token": end}
    )
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{end} $A", special_tokens=[(end, tokenizer.eos_token_id)]
    )
    return tokenizer


def _config_of(
    weights: dict[str, Tensor], text: dict[str, Any], vision_heads: int, qformer_heads: int
) -> InstructBlipConfig:
    """Sizes of the tensors; everything else as in the official code."""
    patch = weights[VISION_NAMES[0]]
    grid = int((weights["vision_model.embeddings.position_embedding"].shape[1] - 1) ** 0.5)
    blocks = 1 + max(_layer(name) for name in weights if name.startswith(BLOCKS))
    layers = 1 + max(_layer(name) for name in weights if name.startswith("qformer.encoder."))
    words = weights.get("qformer.embeddings.word_embeddings.weight")
    queries = weights["query_tokens"]
    crossed = [_layer(n) for n in weights if "crossattention.attention.key.weight" in n]
    qformer: dict[str, Any] = {
        "hidden_size": queries.shape[2],
        "num_hidden_layers": layers,
        "num_attention_heads": qformer_heads,
        "intermediate_size": len(weights["qformer.encoder.layer.0.intermediate_query.dense.bias"]),
        "encoder_hidden_size": patch.shape[0],
        "cross_attention_frequency": sorted(crossed)[1] if len(crossed) > 1 else layers,
    }
    if words is not None:
        positions = weights["qformer.embeddings.position_embeddings.weight"]
        qformer |= {"vocab_size": len(words), "max_position_embeddings": len(positions)}
    return InstructBlipConfig(
        vision=VisionConfig(
            hidden_size=patch.shape[0],
            intermediate_size=len(weights["vision_model.encoder.layers.0.mlp.fc1.bias"]),
            num_hidden_layers=blocks,
            num_attention_heads=vision_heads,
            image_size=grid * patch.shape[2],
            patch_size=patch.shape[2],
            post_layernorm_eps=LN_VISION_EPS,
        ),
        qformer=QFormerConfig(**qformer),
        language=text,
        num_query_tokens=queries.shape[1],
        instruction_aware=words is not None,
    )


def _layer(name: str) -> int:
    match = re.search(r"\.layers?\.(\d+)\.", name)
    return int(match[1]) if match else 0


def refuse_loss(trained: Collection[str], image_encoder: bool) -> None:
    """Raise ValueError where a trimmed file would leave out one of the ``trained`` parts."""
    lost = sorted({"language_model", "lora"}.intersection(trained))
    if lost:
        raise ValueError(
            f"{lost} was trained, and a LAVIS file has no place for a language model: export with "
            "--format transformers"
        )
    if "vision_tower" in trained and not image_encoder:
        raise ValueError(
            "['vision_tower'] was trained, and a LAVIS file holds the image encoder on request "
            "only: add --image-encoder"
        )


def export_lavis(model: InstructBlip, file: Path, image_encoder: bool = False) -> None:
    """Write a trimmed ``.pth`` that the official code loads; see ``to_lavis``.

    The file holds no language model. Raises ValueError for a model with an adapter.
    """
    if lora_layers(model.language_model):
        refuse_loss(["lora"], image_encoder)
    if image_encoder and isinstance(model.config.vision, EncoderConfig):
        kind = model.config.vision.encoder["model_type"]
        raise ValueError(f"LAVIS has no image encoder {kind!r}: export without --image-encoder")
    kind = str(model.config.language.get("model_type"))
    projection = {"t5": "t5_proj", "opt": "opt_proj"}.get(kind, "llm_proj")
    weights = {name: value.detach().cpu() for name, value in model.state_dict().items()}
    write_pickle({"model": to_lavis(weights, projection, image_encoder)}, file)
