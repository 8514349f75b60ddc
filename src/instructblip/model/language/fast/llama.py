"""Layers of Llama and Qwen2 over packed rows: transformers' numbers in fewer passes over memory.

Between its matrix products a layer of transformers walks over the hidden states dozens of times.
Here a norm and a rotation bring backward passes of their own, a gate's activation is not kept, and
the last layer goes on after its attention with those tokens alone that the head will read. Wherever
rows are not packed (a cache, generation, ranking) transformers' own layer runs.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer

from instructblip.model.language.fast.head import is_frozen_linear

TYPES = ("llama", "qwen2")
SILU = (nn.SiLU, type(ACT2FN["silu"]))


def speed_up(model: Any) -> None:
    """Let the layers of a Llama or a Qwen2 run as below; other models stay as they are."""
    if not reads_last(model):
        return
    layers = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]
    for layer in layers:
        layer.forward = functools.partial(_layer, layer, layer.forward, layer is layers[-1])


def reads_last(model: Any) -> bool:
    """Whether the last hidden states of a packed call are those of ``packing.read`` alone."""
    return model.config.model_type in TYPES


def _layer(
    layer: Any,
    theirs: Callable[..., Tensor],
    last: bool,
    hidden: Float[Tensor, "1 n L"],
    packing: Any = None,
    position_embeddings: Any = None,
    **settings: Any,
) -> Float[Tensor, "1 _ L"]:
    if packing is None:
        return theirs(hidden, position_embeddings=position_embeddings, **settings)
    attention = layer.self_attn
    cos, sin = (x[:, :, None] for x in position_embeddings)
    sin = sin[..., : attention.head_dim // 2]
    normed = _norm(layer.input_layernorm, hidden)
    query, key, value = (
        states.unflatten(2, (-1, attention.head_dim))  # [1, n, heads, d]
        for states in _project(normed, attention.q_proj, attention.k_proj, attention.v_proj)
    )
    query, key = _Rotation.apply(query, cos, sin), _Rotation.apply(key, cos, sin)
    context, _ = AttentionInterface()[attention.config._attn_implementation](
        attention,
        *(states.transpose(1, 2) for states in (query, key, value)),
        None,
        packing=packing,
        scaling=attention.scaling,
        dropout=attention.attention_dropout if attention.training else 0.0,
    )
    if last and packing.read is not None:
        hidden, context = (x.index_select(1, packing.read) for x in (hidden, context))
    hidden = hidden + attention.o_proj(context.flatten(2))
    normed, mlp = _norm(layer.post_attention_layernorm, hidden), layer.mlp
    gate, up = _project(normed, mlp.gate_proj, mlp.up_proj)
    silu = isinstance(mlp.act_fn, SILU)
    product = _SiluTimes.apply(gate, up) if silu else mlp.act_fn(gate) * up
    return hidden + mlp.down_proj(product)


class _SiluTimes(torch.autograd.Function):
    """silu(gate) * up. The activation is made again in the backward pass rather than kept."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        above = outer[0]
        slope = torch.ops.aten.silu_backward(above * up, gate)
        return slope, F.silu(gate).mul_(above)


def _project(states: Tensor, *layers: Any) -> tuple[Tensor, ...]:
    """What several linear layers make of the same states."""
    if not all(map(is_frozen_linear, layers)) or torch.is_autocast_enabled(states.device.type):
        return tuple(layer(states) for layer in layers)
    weights, biases = [x.weight for x in layers], [x.bias for x in layers]
    return _FrozenLinears.apply(states, biases, *weights)


class _FrozenLinears(torch.autograd.Function):
    """Linear layers of one input, whose slopes are summed by the products that make them."""

    @staticmethod
    def forward(
        ctx: Any, states: Tensor, biases: list[Tensor | None], *weights: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.save_for_backward(*weights)
        pairs = zip(weights, biases, strict=True)
        return tuple(F.linear(states, weight, bias) for weight, bias in pairs)

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor | None, ...]:
        weights = ctx.saved_tensors
        slope = outer[0][0] @ weights[0]
        for above, weight in zip(outer[1:], weights[1:], strict=True):
            slope.addmm_(above[0], weight)
        return slope[None], None, *[None] * len(weights)


def _norm(module: Any, hidden: Tensor) -> Tensor:
    if module.weight.requires_grad:
        return module(hidden)
    return _FrozenRMSNorm.apply(hidden, module.weight, module.variance_epsilon)


class _FrozenRMSNorm(torch.autograd.Function):
    """x / rms(x) * weight, in fp32 up to the weight, as transformers has it."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, eps: float) -> Tensor:
        states = hidden.float()
        squares = torch.linalg.vector_norm(states, dim=-1, keepdim=True).square_()
        scale = torch.rsqrt(squares / hidden.shape[-1] + eps)
        ctx.save_for_backward(hidden, weight, scale)
        return (states * scale).to(hidden.dtype) * weight

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor, None, None]:
        hidden, weight, scale = ctx.saved_tensors
        states, slope = hidden.float(), (outer[0] * weight).float()
        along = torch.linalg.vecdot(slope, states)[..., None] * scale.square() / hidden.shape[-1]
        return slope.addcmul_(states, along, value=-1).mul_(scale).to(hidden.dtype), None, None


class _Rotation(torch.autograd.Function):
    """Rotary positions of [1, n, heads, d]; ``cos`` is [1, n, 1, d], ``sin`` [1, n, 1, d/2]. The
    slope is turned back by the same angles."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotated(states, cos, sin)

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _rotated(outer[0], cos, -sin), None, None


def _rotated(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    cos, sin = cos.to(states.dtype), sin.to(states.dtype)
    rotated = states * cos
    (x, y), (out_x, out_y) = states.chunk(2, -1), rotated.chunk(2, -1)
    out_x.addcmul_(y, sin, value=-1)
    out_y.addcmul_(x, sin)
    return rotated
