"""Where the queries look: the weights of the Q-Former's cross-attention over the image."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from instructblip.core.batch import Batch
from instructblip.model.instructblip import InstructBlip
from instructblip.model.qformer import CrossAttention


@torch.no_grad()
def cross_attention(model: InstructBlip, batch: Batch) -> Float[Tensor, "B F Q P"]:
    """Weights of each query over the tokens of each frame, class token first; rows sum to 1.

    The mean over the heads of the last layer that attends to the image. The forward pass computes
    no weights, so a hook computes them from the inputs of that layer.
    """
    attention = [
        module for module in model.qformer.modules() if isinstance(module, CrossAttention)
    ][-1]
    captured: list[Tensor] = []
    handle = attention.register_forward_pre_hook(
        lambda _, arguments: captured.append(_weights(attention, *arguments))
    )
    try:
        model.encode_queries(batch)
    finally:
        handle.remove()
    (weights,) = captured  # [B * F, Q, P]
    return weights.unflatten(0, batch.image_index.shape)


def _weights(
    attention: CrossAttention,
    hidden: Float[Tensor, "M Q D"],
    states: Float[Tensor, "N P V"],
    mask: None,
    index: Int[Tensor, " M"] | None,
) -> Float[Tensor, "M Q P"]:
    query, key = attention.query(hidden), attention.key(states)
    key = key if index is None else key[index]
    query, key = (x.unflatten(2, (attention.num_heads, -1)).transpose(1, 2) for x in (query, key))
    scores = query @ key.transpose(2, 3) * query.shape[-1] ** -0.5
    return scores.float().softmax(-1).mean(1)
