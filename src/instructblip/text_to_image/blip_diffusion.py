"""BLIP-Diffusion's subject encoder on our parts, from either layout of its checkpoints.

LAVIS keeps a folder with ``blip_model/blip_weight.pt`` and ``proj_layer/proj_weight.pt``; diffusers
one with ``qformer/``. Both hold a CLIP ViT, a Q-Former that attends to the picture in every layer,
and a residual projection; Stable Diffusion's U-Net, VAE and text encoder lie beside them and are
loaded by ``diffusers_decoder``. The encoder's tokens are spliced into the embeddings that CLIP's
text encoder reads, behind the start token and "a" (BLIP-Diffusion, section 3.2).
"""

import math
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from instructblip.model.checkpoints.transformers import load_weights
from instructblip.model.checkpoints.weights import read_json, read_weights
from instructblip.model.config import QFormerConfig, VisionConfig
from instructblip.model.qformer import QFormer
from instructblip.model.vision import ACTIVATIONS, VisionModel

SPLICE_AT = 2
"""Position of the first context token in the text: behind <|startoftext|> and "a"."""

LAVIS_NAMES = (
    (r"Qformer\.bert\.embeddings\.LayerNorm\.", "qformer.embeddings.layernorm."),
    (r"Qformer\.bert\.(.*attention)\.self\.", r"qformer.\1.attention."),
    (r"Qformer\.bert\.", "qformer."),
    (r"visual_encoder\.class_embedding", "vision_model.embeddings.class_embedding"),
    (r"visual_encoder\.positional_embedding", "vision_model.embeddings.position_embedding"),
    (r"visual_encoder\.conv1\.", "vision_model.embeddings.patch_embedding."),
    (r"visual_encoder\.ln_pre\.", "vision_model.embeddings.norm."),
    (r"visual_encoder\.transformer\.resblocks\.(\d+)\.attn\.in_proj_",
     r"vision_model.encoder.layers.\1.self_attn.qkv."),
    (r"visual_encoder\.transformer\.resblocks\.(\d+)\.attn\.out_proj\.",
     r"vision_model.encoder.layers.\1.self_attn.projection."),
    (r"visual_encoder\.transformer\.resblocks\.(\d+)\.ln_(\d)\.",
     r"vision_model.encoder.layers.\1.layer_norm\2."),
    (r"visual_encoder\.transformer\.resblocks\.(\d+)\.mlp\.c_fc\.",
     r"vision_model.encoder.layers.\1.mlp.fc1."),
    (r"visual_encoder\.transformer\.resblocks\.(\d+)\.mlp\.c_proj\.",
     r"vision_model.encoder.layers.\1.mlp.fc2."),
    (r"ln_vision\.", "vision_model.post_layernorm."),
)  # fmt: skip
DIFFUSERS_NAMES = (
    (r"embeddings\.LayerNorm\.", "qformer.embeddings.layernorm."),
    (r"(embeddings|encoder)\.", r"qformer.\1."),
    (r"visual_encoder\.pre_layernorm\.", "vision_model.embeddings.norm."),
    (r"visual_encoder\.", "vision_model."),
    (r"proj_layer\.", "projection."),
)
UNUSED = re.compile(
    # heads of BLIP-2's first stage, and CLIP's own head and pooling
    r"(Qformer\.cls|itm_head|vision_proj|text_proj|visual_encoder\.(ln_post|proj))\b.*|temp"
    r"|.*\.position_ids|visual_encoder\.transformer\.resblocks\.23\..*"
)


class Projection(nn.Module):
    """LayerNorm, dense, GELU, dense, and the input added to it."""

    def __init__(self, width: int, inner: int, eps: float = 1e-12) -> None:
        super().__init__()
        self.dense1, self.dense2 = nn.Linear(width, inner), nn.Linear(inner, width)
        self.LayerNorm = nn.LayerNorm(width, eps=eps)

    def forward(self, hidden: Float[Tensor, "B Q D"]) -> Float[Tensor, "B Q D"]:
        return hidden + self.dense2(ACTIVATIONS["quick_gelu"](self.dense1(self.LayerNorm(hidden))))


class SubjectEncoder(nn.Module):
    """(picture, name of its subject) -> context tokens for CLIP's text encoder."""

    def __init__(self, vision: VisionConfig, qformer: QFormerConfig, queries: int, inner: int):
        super().__init__()
        self.vision_model = VisionModel(vision)
        self.query_tokens = nn.Parameter(torch.zeros(1, queries, qformer.hidden_size))
        self.qformer = QFormer(qformer)
        self.projection = Projection(qformer.hidden_size, inner)

    def forward(
        self,
        pixel_values: Float[Tensor, "B 3 S S"],
        qformer_ids: Int[Tensor, "B I"],
        qformer_mask: Int[Tensor, "B I"],
    ) -> Float[Tensor, "B Q D"]:
        features = self.vision_model(pixel_values)
        queries = self.query_tokens.expand(len(pixel_values), -1, -1)
        return self.projection(self.qformer(queries, features, qformer_ids, qformer_mask))


def splice_context(
    word_embeds: Float[Tensor, "B X C"], context: Float[Tensor, "B Q C"], longest: int = 77
) -> Float[Tensor, "B _ C"]:
    """Context between the words, before CLIP adds its positions; ValueError when it is too long."""
    total = word_embeds.shape[1] + context.shape[1]
    if total > longest:
        raise ValueError(
            f"{word_embeds.shape[1]} words and {context.shape[1]} context tokens are more than the "
            f"{longest} that the text encoder reads; cut the words to {longest - context.shape[1]}"
        )
    before, after = word_embeds[:, :SPLICE_AT], word_embeds[:, SPLICE_AT:]
    return torch.cat([before, context.to(word_embeds), after], dim=1)


def load_subject_encoder(path: str | Path) -> SubjectEncoder:
    """Read a checkpoint folder of either layout, in fp32 and eval mode.

    Raises FileNotFoundError naming the missing files and ValueError listing every tensor that is
    missing, unexpected or mis-shaped.
    """
    path = Path(path)
    weights = read_checkpoint(path)
    model = SubjectEncoder(*_sizes(path, weights))
    load_weights(model, weights, path)
    return model.eval()


def read_checkpoint(path: Path) -> dict[str, Tensor]:
    """The tensors of a folder under our names. Unlike LAVIS, which passes over a missing file."""
    lavis = [path / "blip_model" / "blip_weight.pt", path / "proj_layer" / "proj_weight.pt"]
    if (path / "qformer").is_dir():
        names = ("diffusion_pytorch_model", "model", "pytorch_model")
        files = [path / "qformer" / f"{n}.{e}" for n in names for e in ("safetensors", "bin")]
        file = next((f for f in files if f.is_file()), None)
        if file is None:
            folder = path / "qformer"
            raise FileNotFoundError(f"{folder} holds no weights; expected {files[0].name}")
        found = _rename(read_weights(file), DIFFUSERS_NAMES)
    elif absent := [str(f.relative_to(path)) for f in lavis if not f.is_file()]:
        raise FileNotFoundError(
            f"{path} is no BLIP-Diffusion checkpoint: {', '.join(absent)} missing (LAVIS), and no "
            "folder qformer/ (diffusers); download it again"
        )
    else:
        projection = read_weights(lavis[1])
        found = _rename(read_weights(lavis[0]), LAVIS_NAMES)
        found |= {f"projection.{name}": value for name, value in projection.items()}
    return _complete(found)


def _rename(weights: Mapping[str, Tensor], names: tuple[tuple[str, str], ...]) -> dict[str, Tensor]:
    renamed = {}
    for name, value in weights.items():
        if UNUSED.fullmatch(name):
            continue
        for pattern, ours in names:
            name, changed = re.subn(f"^{pattern}", ours, name)
            if changed:
                break
        renamed[name] = value
    return renamed


def _complete(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """CLIP's patches have no bias, and LAVIS keeps its two embeddings without leading axes."""
    prefix = "vision_model.embeddings."
    patches = weights.get(f"{prefix}patch_embedding.weight")
    if patches is not None:
        weights.setdefault(f"{prefix}patch_embedding.bias", torch.zeros(len(patches)))
    for name in ("class_embedding", "position_embedding"):
        value = weights.get(prefix + name)
        if value is not None:
            weights[prefix + name] = value.reshape(1, -1, value.shape[-1])
    return {name: value.float() for name, value in weights.items()}


def _sizes(
    path: Path, weights: Mapping[str, Tensor]
) -> tuple[VisionConfig, QFormerConfig, int, int]:
    """Sizes from the tensors themselves; the heads, which no tensor shows, are 64 wide."""
    try:
        patches = weights["vision_model.embeddings.patch_embedding.weight"]
        positions = weights["vision_model.embeddings.position_embedding"].shape[1] - 1
        words = weights["qformer.embeddings.word_embeddings.weight"]
        places = weights["qformer.embeddings.position_embeddings.weight"]
        feed_forward = weights["qformer.encoder.layer.0.intermediate.dense.weight"]
        fc1 = weights["vision_model.encoder.layers.0.mlp.fc1.weight"]
        queries, inner = weights["query_tokens"].shape[1], len(weights["projection.dense1.weight"])
    except KeyError as error:
        raise ValueError(
            f"{path} is no BLIP-Diffusion checkpoint: it has no tensor for {error}; found names "
            f"such as {', '.join(sorted(weights)[:3])}"
        ) from None
    width, patch, vision_width = words.shape[1], patches.shape[-1], len(patches)
    config = path / "qformer" / "config.json"
    given = read_json(config) if config.is_file() else {}
    vision = VisionConfig(
        hidden_size=vision_width,
        intermediate_size=len(fc1),
        num_hidden_layers=_count(weights, r"vision_model\.encoder\.layers\.(\d+)\."),
        num_attention_heads=_heads(given, "vision_config", vision_width),
        image_size=math.isqrt(positions) * patch,
        patch_size=patch,
        hidden_act="quick_gelu",
        layer_norm_eps=1e-5,
        pre_layernorm=True,
    )
    qformer = QFormerConfig(
        vocab_size=len(words),
        hidden_size=width,
        num_hidden_layers=_count(weights, r"qformer\.encoder\.layer\.(\d+)\."),
        num_attention_heads=_heads(given, "qformer_config", width),
        intermediate_size=len(feed_forward),
        max_position_embeddings=len(places),
        cross_attention_frequency=1,
        encoder_hidden_size=vision_width,
    )
    return vision, qformer, queries, inner


def _heads(given: Mapping, section: str, width: int) -> int:
    stored = (given.get(section) or {}).get("num_attention_heads")
    return stored or max(1, width // 64)


def _count(weights: Mapping[str, Tensor], pattern: str) -> int:
    found = [int(m[1]) for name in weights if (m := re.match(pattern, name))]
    return max(found, default=0) + 1
