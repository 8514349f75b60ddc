"""T5 over packed rows: the bias of relative positions for one sample instead of the whole row.

The first block of a T5 stack computes a bias for each pair of columns of its row, and the other
blocks reuse it. In a row that holds a batch of B samples nearly all of these pairs belong to
different samples: B * B times as many as one sample has. A hook in front of the first block
computes the bias for one sample of the greatest length instead, and the attention cuts out what
each sample needs::

    lengths 3 and 2     bias [3, 3]   0  1  2      sample 0: all of it
                                     -1  0  1      sample 1: the upper left [2, 2]
                                     -2 -1  0
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.activations import NewGELUActivation

from instructblip.model.language.fast.attention import ATTENTION, one_by_one
from instructblip.model.language.fast.packing import Packing

SELF_BIAS, CROSS_BIAS = 2, 5
"""Positions of the two biases among the inputs of a block."""
ALIGNED = 16


def allow_packing(model: Any) -> None:
    """Give both stacks of a T5 the attention for packed rows, and a bias that fits it."""
    model.set_attn_implementation(ATTENTION)
    for stack in (model.get_encoder(), model.get_decoder()):
        stack.set_attn_implementation(ATTENTION)  # each stack has its own config
        stack.block[0].register_forward_pre_hook(_insert_bias, with_kwargs=True)


def fuse_gelu(model: nn.Module) -> None:
    """Compute the GELU of T5 and GPT-2 as one operation.

    transformers writes its tanh approximation as eight operations and keeps most of their results
    for the backward pass.
    """
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, NewGELUActivation):
                setattr(module, name, nn.GELU(approximate="tanh"))


def _insert_bias(
    block: Any, inputs: tuple[Any, ...], settings: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    packing, memory = settings.get("packing"), settings.get("memory")
    if packing is None:
        return None
    changed = list(inputs)
    changed[SELF_BIAS] = _bias(block.layer[0].SelfAttention, packing)
    if memory is not None:
        changed[CROSS_BIAS] = _padding_bias(memory, changed[SELF_BIAS])
    return tuple(changed), settings


def _bias(attention: nn.Module, packing: Packing) -> Tensor:
    """[1 or B, heads, X, X]: the learned bias of each distance, -inf where a token is hidden.

    In memory its rows are a multiple of ``ALIGNED`` long: the fused attention of a GPU refuses
    transformers' bias, whose heads come last, and copies one whose rows have another length.
    """
    width = packing.index.shape[1]
    bias = attention.compute_bias(width, width)  # pyright: ignore[reportCallIssue]
    if attention.is_causal:  # hides the padding as well: it stands behind all tokens
        later = torch.ones(width, width, dtype=torch.bool, device=bias.device).triu(1)
        return _aligned(bias.masked_fill(later, -torch.inf))
    return _aligned(bias + _padding_bias(packing, bias))


def _aligned(bias: Tensor) -> Tensor:
    """``bias`` with its last dimension in a row, and rows of aligned length behind one another."""
    width = bias.shape[-1]
    return F.pad(bias.contiguous(), (0, -width % ALIGNED))[..., :width]


def _padding_bias(packing: Packing, like: Tensor) -> Tensor:
    """[B, 1, 1, X]: -inf at the padding of each row; [1, 1, 1, 1] of zeros where samples are
    attended to one by one, without padding."""
    if one_by_one(like):
        return like.new_zeros(1, 1, 1, 1)
    real = torch.zeros_like(packing.index, dtype=torch.bool).flatten()
    real[packing.slots] = True
    padding = ~real.view_as(packing.index)[:, None, None]
    return torch.zeros_like(padding, dtype=like.dtype).masked_fill(padding, -torch.inf)
