"""Layers of Llama and Qwen2 over packed rows: fewer passes over memory than transformers' layers.

The definition of a layer, for hidden states x [1, n, L]::

    y = rms_norm(x)
    x = x + o_proj(attention(rotate(q_proj(y)), rotate(k_proj(y)), v_proj(y)))
    y = rms_norm(x)
    x = x + down_proj(silu(gate_proj(y)) * up_proj(y))

Between the matrix products transformers' layer reads and writes the hidden states dozens of times.
Here frozen norms and rotations have their own backward passes, the activation of a gate is not
kept, and the last layer computes what follows its attention only for the tokens that the head
reads. A step of cpu-mid from stored features takes 1,175 instead of 1,255 ms for it
(benchmarks/train_step_cpu_2026-11-23.md); not keeping the activation saves 19 of 439 MiB
(benchmarks/memory_cpu_2026-11-23.md). Rows that are not packed (a cache, generation, ranking) run
through transformers' own layer.
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


def fuse_layers(model: Any) -> None:
    """Let the layers of a Llama or Qwen2 run as below; other models do not change."""
    if not trims_last_layer(model):
        return
    layers = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]
    for layer in layers:
        layer.forward = functools.partial(_layer, layer, layer.forward, layer is layers[-1])


def trims_last_layer(model: Any) -> bool:
    """Whether a packed call returns the last hidden states of ``packing.read`` alone."""
    return model.config.model_type in TYPES


def _layer(
    layer: Any,
    plain: Callable[..., Tensor],
    last: bool,
    hidden: Float[Tensor, "B X L"],
    packing: Any = None,
    position_embeddings: Any = None,
    **settings: Any,
) -> Float[Tensor, "B Y L"]:
    if packing is None:
        return plain(hidden, position_embeddings=position_embeddings, **settings)
    attention = layer.self_attn
    cos, sin = (x[:, :, None] for x in position_embeddings)  # [1, n, 1, d]
    sin = sin[..., : attention.head_dim // 2]  # both halves are equal
    normed = _norm(layer.input_layernorm, hidden)
    query, key, value = (
        states.unflatten(2, (-1, attention.head_dim))  # [1, n, heads, d]
        for states in _project(normed, attention.q_proj, attention.k_proj, attention.v_proj)
    )
    query, key = _Rotation.apply(query, cos, sin), _Rotation.apply(key, cos, sin)
    context, _ = AttentionInterface()[attention.config._attn_implementation](
        attention,
        *(states.transpose(1, 2) for states in (query, key, value)),  # [1, heads, n, d]
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


def _norm(module: Any, hidden: Tensor) -> Tensor:
    if module.weight.requires_grad:
        return module(hidden)
    return _FrozenRMSNorm.apply(hidden, module.weight, module.variance_epsilon)


class _FrozenRMSNorm(torch.autograd.Function):
    """x / rms(x) * w with a frozen weight w, rms(x) = sqrt(mean(x ** 2) + eps) in fp32: keeps x and
    one scale s = 1 / rms(x) per token.

    The backward pass takes the gradient g of the result to s * (g w - x * s ** 2 * mean(g w * x)):
    a change of x along x itself changes only s. Eight norms, forward and backward, take 13.4
    instead of 25.5 ms (benchmarks/train_step_cpu_2026-11-23.md).
    """

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
        states, gradient = hidden.float(), (outer[0] * weight).float()
        along = torch.linalg.vecdot(gradient, states)[..., None]
        along = along * scale.square() / hidden.shape[-1]
        gradient = gradient.addcmul_(states, along, value=-1).mul_(scale)
        return gradient.to(hidden.dtype), None, None


class _Rotation(torch.autograd.Function):
    """Rotary positions of [1, n, heads, d]: the halves (x, y) of a head become
    (x cos - y sin, y cos + x sin). The backward pass rotates the gradient back.

    ``cos`` [1, n, 1, d] has two equal halves; ``sin`` [1, n, 1, d/2] is one of them.
    """

    @staticmethod
    def forward(ctx: Any, states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotate(states, cos, sin)

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _rotate(outer[0], cos, -sin), None, None


def _rotate(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    cos, sin = cos.to(states.dtype), sin.to(states.dtype)
    rotated = states * cos
    (x, y), (out_x, out_y) = states.chunk(2, -1), rotated.chunk(2, -1)
    out_x.addcmul_(y, sin, value=-1)
    out_y.addcmul_(x, sin)
    return rotated


class _SiluTimes(torch.autograd.Function):
    """silu(gate) * up. The backward pass computes silu(gate) again instead of keeping it."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        gate_gradient = torch.ops.aten.silu_backward(outer[0] * up, gate)
        return gate_gradient, F.silu(gate).mul_(outer[0])


def _project(states: Tensor, *layers: Any) -> tuple[Tensor, ...]:
    """The results of several linear layers that read the same states."""
    if not all(map(is_frozen_linear, layers)) or torch.is_autocast_enabled(states.device.type):
        return tuple(layer(states) for layer in layers)
    weights, biases = [x.weight for x in layers], [x.bias for x in layers]
    return _FrozenLinears.apply(states, biases, *weights)


class _FrozenLinears(torch.autograd.Function):
    """Frozen linear layers W_i of the same states. The gradient sum_i g_i W_i is accumulated by the
    matrix products themselves: 930 instead of 942 ms a step of cpu-mid
    (benchmarks/train_step_cpu_2026-11-23.md)."""

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
        gradient = outer[0][0] @ weights[0]
        for above, weight in zip(outer[1:], weights[1:], strict=True):
            gradient.addmm_(above[0], weight)
        return gradient[None], None, *[None] * len(weights)
