"""The image encoder: a pre-norm ViT whose last LayerNorm is a separate part.

``ImageEncoder`` is what an InstructBLIP needs of any image encoder, ``VisionModel`` the paper's. It
equals transformers' InstructBlipVisionModel and Blip2VisionModel, parameter names included. Both
papers freeze the body and train the last LayerNorm (``ln_vision`` in the official code), so
``body`` stops before it, and stored features are its output.
"""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from instructblip.model.config import EncoderConfig, VisionConfig

ACTIVATIONS = {
    "gelu": F.gelu,
    "gelu_new": lambda x: F.gelu(x, approximate="tanh"),
    "gelu_pytorch_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "relu": F.relu,
}


class VisionEmbeddings(nn.Module):
    """Patches by convolution, a class token in front, learned positions on all of them."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.class_embedding = (
            nn.Parameter(torch.randn(1, 1, config.hidden_size) * 0.02)
            if config.class_token
            else None
        )
        self.patch_embedding = nn.Conv2d(
            3, config.hidden_size, kernel_size=config.patch_size, stride=config.patch_size
        )
        self.position_embedding = nn.Parameter(
            torch.randn(1, config.num_tokens, config.hidden_size) * 0.02
        )
        self.norm = (
            nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
            if config.pre_layernorm
            else None
        )

    def forward(self, pixel_values: Float[Tensor, "N 3 S S"]) -> Float[Tensor, "N P V"]:
        patches = self.patch_embedding(pixel_values.to(self.patch_embedding.weight.dtype))
        patches = patches.flatten(2).transpose(1, 2)  # [N, P-1, V]
        tokens = patches
        if self.class_embedding is not None:
            first = self.class_embedding.expand(len(patches), -1, -1).to(patches)
            tokens = torch.cat([first, patches], 1)
        tokens = tokens + self.position_embedding.to(patches.dtype)
        return tokens if self.norm is None else self.norm(tokens)


class VisionAttention(nn.Module):
    """Self-attention with one fused layer for queries, keys and values."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.num_heads = config.num_attention_heads
        self.dropout = config.attention_dropout
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size, bias=config.qkv_bias)
        self.projection = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, hidden: Float[Tensor, "N P V"]) -> Float[Tensor, "N P V"]:
        qkv = self.qkv(hidden).unflatten(2, (3, self.num_heads, -1))  # [N, P, 3, heads, V/heads]
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        dropout = self.dropout if self.training else 0.0
        context = F.scaled_dot_product_attention(query, key, value, dropout_p=dropout)
        return self.projection(context.transpose(1, 2).flatten(2))


class VisionMLP(nn.Module):
    """The feed-forward of one layer."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.activation = ACTIVATIONS[config.hidden_act]
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, hidden: Float[Tensor, "N P V"]) -> Float[Tensor, "N P V"]:
        return self.fc2(self.activation(self.fc1(hidden)))


class VisionLayer(nn.Module):
    """One pre-norm transformer layer."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.self_attn = VisionAttention(config)
        self.layer_norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = VisionMLP(config)
        self.layer_norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, hidden: Float[Tensor, "N P V"]) -> Float[Tensor, "N P V"]:
        hidden = hidden + self.self_attn(self.layer_norm1(hidden))
        return hidden + self.mlp(self.layer_norm2(hidden))


class VisionEncoder(nn.Module):
    """The stack of layers; a separate module for the sake of parameter names only."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(VisionLayer(config) for _ in range(config.num_hidden_layers))

    def forward(self, hidden: Float[Tensor, "N P V"]) -> Float[Tensor, "N P V"]:
        for layer in self.layers:
            hidden = layer(hidden)
        return hidden


class ImageEncoder(nn.Module):
    """pixel_values [N, 3, S, S] -> [N, P, V], all tokens, last LayerNorm included.

    The tokens before the grid (class, registers) come first, then the grid row by row.
    """

    config: VisionConfig | EncoderConfig
    encoder: nn.Module
    post_layernorm: nn.LayerNorm
    compiled = False
    """Whether the layers of a frozen `VisionModel` run compiled (``fast.encode_frozen``)."""

    @property
    def tower(self) -> list[nn.Module]:
        """The modules before the last LayerNorm."""
        return [module for name, module in self.named_children() if name != "post_layernorm"]

    @property
    def dtype(self) -> torch.dtype:
        """That of the weights before the last LayerNorm."""
        return next(self.encoder.parameters()).dtype

    def check_size(self, pixel_values: Float[Tensor, "N 3 _ _"]) -> None:
        """Raises ValueError for images of another size."""
        size = self.config.image_size
        if pixel_values.shape[-2:] != (size, size):
            raise ValueError(
                f"images must be {size} x {size} pixels; got {tuple(pixel_values.shape[-2:])}. "
                "Resize the images, or load the model with image_size set to theirs."
            )

    def body(self, pixel_values: Float[Tensor, "N 3 S S"]) -> Float[Tensor, "N P V"]:
        """Everything but the last LayerNorm. Without gradients ``fast.encode_frozen`` is faster."""
        raise NotImplementedError

    def norm(self, features: Float[Tensor, "N P V"]) -> Float[Tensor, "N P V"]:
        """The last LayerNorm, in its own dtype: it may train in fp32 on a bf16 body."""
        return self.post_layernorm(features.to(self.post_layernorm.weight.dtype))

    def forward(self, pixel_values: Float[Tensor, "N 3 S S"]) -> Float[Tensor, "N P V"]:
        return self.norm(self.body(pixel_values))


class VisionModel(ImageEncoder):
    """The pre-norm ViT of BLIP-2 and InstructBLIP, which CLIP's and SigLIP's are as well."""

    config: VisionConfig
    encoder: VisionEncoder

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.config = config
        self.embeddings = VisionEmbeddings(config)
        self.encoder = VisionEncoder(config)
        self.post_layernorm = nn.LayerNorm(
            config.hidden_size, eps=config.post_layernorm_eps or config.layer_norm_eps
        )
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                nn.init.normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def embed(self, pixel_values: Float[Tensor, "N 3 S S"]) -> Float[Tensor, "N P V"]:
        """The input of the first layer. Raises ValueError for images of another size."""
        self.check_size(pixel_values)
        return self.embeddings(pixel_values)

    def body(self, pixel_values: Float[Tensor, "N 3 S S"]) -> Float[Tensor, "N P V"]:
        return self.encoder(self.embed(pixel_values))


def interpolate_positions(
    positions: Float[Tensor, "1 P V"], num_tokens: int
) -> Float[Tensor, "1 P2 V"]:
    """Resize learned positions to ``num_tokens``, a square grid behind the class token if there is
    one, bicubically.

    The class token keeps its position. The interpolation is that of the official code
    (``interpolate_pos_embed``) and of transformers. Raises ValueError unless the grid is square.
    """
    count = positions.shape[1]
    if count == num_tokens:
        return positions
    first = int(math.isqrt(count) ** 2 != count)  # SigLIP has no class token
    old, new = math.isqrt(count - first), math.isqrt(num_tokens - first)
    if old * old != count - first:
        raise ValueError(f"positions must form a square grid; got {count - first} patches")
    grid = positions[:, first:].float().unflatten(1, (old, old)).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, size=(new, new), mode="bicubic", align_corners=False)
    grid = grid.flatten(2).transpose(1, 2).to(positions.dtype)
    return torch.cat([positions[:, :first], grid], dim=1)
