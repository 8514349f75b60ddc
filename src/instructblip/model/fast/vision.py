"""The image encoder without gradients: bounded memory, and states overwritten where they stand.

The plain definition is ``VisionModel.body``; the numbers are the same. Without gradients nothing
reads the input of a layer again, so sums and activations overwrite it: 813 -> 797 ms in a step of
cpu-mid (benchmarks/train_step_cpu_2026-11-23.md).
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from instructblip.model.vision import VisionLayer, VisionMLP, VisionModel


@torch.no_grad()
def encode_frozen(
    vision: VisionModel, pixel_values: Float[Tensor, "N 3 S S"], chunk: int
) -> Float[Tensor, "N P V"]:
    """``vision.body(pixel_values)`` without gradients, ``chunk`` images at a time."""
    parts = [_encode(vision, images) for images in pixel_values.split(chunk)]
    return torch.cat(parts) if len(parts) != 1 else parts[0]


def _encode(vision: VisionModel, pixel_values: Float[Tensor, "n 3 S S"]) -> Float[Tensor, "n P V"]:
    hidden = vision.embed(pixel_values)
    for layer in vision.encoder.layers:
        assert isinstance(layer, VisionLayer)
        hidden.add_(layer.self_attn(layer.layer_norm1(hidden)))
        hidden.add_(_feed_forward(layer.mlp, layer.layer_norm2(hidden)))
    return hidden


def _feed_forward(mlp: VisionMLP, hidden: Float[Tensor, "n P V"]) -> Float[Tensor, "n P V"]:
    """A function of its own, so that the inner states are freed before the next layer."""
    inner = mlp.fc1(hidden)
    if mlp.activation is F.gelu:
        torch.ops.aten.gelu_(inner)
    else:
        inner = mlp.activation(inner)
    return mlp.fc2(inner)
