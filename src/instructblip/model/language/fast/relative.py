"""T5's positions in packed rows: distances between tokens, and these only count within a sample.

The first block of a T5 stack makes a bias for each pair of columns of its row, and the other blocks
take it over. In a row that holds a whole batch almost all pairs are of different samples, and
there are as many as the square of the batch. A hook in front of the first block makes the bias for
one sample of the longest length instead: the attention cuts out of it what each sample needs.
"""

from typing import Any

import torch
from torch import Tensor, nn

from instructblip.model.language.fast.packing import (
    ATTENTION,
    Packing,
    one_by_one,
)

OWN_BIAS, CROSS_BIAS = 2, 5
"""Where the biases of self-attention and cross-attention stand among the inputs of a block."""


def allow_packing(model: Any) -> None:
    """Give both stacks of a T5 the attention for packed rows, and a bias that fits it."""
    model.set_attn_implementation(ATTENTION)
    for stack in (model.get_encoder(), model.get_decoder()):
        stack.set_attn_implementation(ATTENTION)  # each has a config of its own
        stack.block[0].register_forward_pre_hook(_give_bias, with_kwargs=True)


def _give_bias(
    block: Any, inputs: tuple[Any, ...], settings: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    packing, memory = settings.get("packing"), settings.get("memory")
    if packing is None:
        return None
    given = list(inputs)
    given[OWN_BIAS] = _bias(block.layer[0].SelfAttention, packing)
    if memory is not None:
        given[CROSS_BIAS] = _padding(memory, given[OWN_BIAS])
    return tuple(given), settings


def _bias(attention: nn.Module, packing: Packing) -> Tensor:
    """[1 or B, heads, X, X]: the learned bias of each distance, -inf where nothing may be seen."""
    width = packing.index.shape[1]
    bias = attention.compute_bias(width, width)  # pyright: ignore[reportCallIssue]
    if attention.is_causal:  # padding stands behind all tokens, where none of them looks
        ahead = torch.ones(width, width, dtype=torch.bool, device=bias.device).triu(1)
        return bias.masked_fill(ahead, -torch.inf)
    return bias + _padding(packing, bias)


def _padding(packing: Packing, like: Tensor) -> Tensor:
    """[B, 1, 1, X]: -inf at the padding of each row; [1, 1, 1, 1] where samples stand alone."""
    if one_by_one(like):
        return like.new_zeros(1, 1, 1, 1)
    real = torch.zeros_like(packing.index, dtype=torch.bool).flatten()
    real[packing.slots] = True
    padding = ~real.view_as(packing.index)[:, None, None]
    return torch.zeros_like(padding, dtype=like.dtype).masked_fill(padding, -torch.inf)
