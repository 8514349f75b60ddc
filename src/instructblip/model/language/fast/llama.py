"""Layers like Llama's over packed rows: fewer passes over memory than transformers' layers.

The definition of a layer, for hidden states x [1, n, L]::

    y = rms_norm(x)
    x = x + o_proj(attention(rotate(q_proj(y)), rotate(k_proj(y)), v_proj(y)))
    y = rms_norm(x)
    x = x + down_proj(silu(gate_proj(y)) * up_proj(y))

Families differ from it in what a layer has: norms of queries and keys (Qwen3, Gemma 3), layers or
parts of a head without rotation (SmolLM3, Phi-3), joint projections (Phi-3), norms behind attention
and feed-forward (Gemma 3), other norms and activations (Gemma). `fast.probe` compares the result
with transformers' before it is used.

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

SILU = (nn.SiLU, type(ACT2FN["silu"]))


def fuse_layers(model: Any) -> bool:
    """Let layers like Llama's run as below. Returns whether the model has such layers, and no
    others; a model that has others does not change."""
    layers = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]
    if not layers or not all(map(_is_known, layers)):
        return False
    for layer in layers:
        layer.forward = functools.partial(_layer, layer, layer.forward, layer is layers[-1])
    return True


def _is_known(layer: Any) -> bool:
    """Whether a layer has the parts that are read below, and drops nothing out between them."""
    attention, mlp = getattr(layer, "self_attn", None), getattr(layer, "mlp", None)
    has_parts = (
        hasattr(layer, "input_layernorm") and hasattr(layer, "post_attention_layernorm"),
        hasattr(attention, "q_proj") or hasattr(attention, "qkv_proj"),
        hasattr(mlp, "gate_proj") or hasattr(mlp, "gate_up_proj"),
    )
    return all(has_parts) and not any(isinstance(m, nn.Dropout) and m.p for m in layer.modules())


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
    attention, mlp = layer.self_attn, layer.mlp
    query, key, value = _heads(attention, _norm(layer.input_layernorm, hidden))
    if hasattr(attention, "q_norm"):
        query, key = _norm(attention.q_norm, query), _norm(attention.k_norm, key)
    if getattr(attention, "use_rope", True):
        cos, sin = (x[:, :, None] for x in position_embeddings)  # [1, n, 1, d]
        sin = sin[..., : sin.shape[-1] // 2]  # both halves are equal
        query, key = _rotated(query, cos, sin), _rotated(key, cos, sin)
    config = attention.config
    context, _ = AttentionInterface()[config._attn_implementation](
        attention,
        *(states.transpose(1, 2) for states in (query, key, value)),  # [1, heads, n, d]
        None,
        packing=packing,
        scaling=attention.scaling,
        dropout=attention.attention_dropout if attention.training else 0.0,
        sliding_window=getattr(
            attention, "sliding_window", getattr(config, "sliding_window", None)
        ),
    )
    if last and packing.read is not None:
        hidden, context = (x.index_select(1, packing.read) for x in (hidden, context))
    change, middle = attention.o_proj(context.flatten(2)), layer.post_attention_layernorm
    if hasattr(layer, "pre_feedforward_layernorm"):  # norms behind both parts as well
        change, middle = _norm(middle, change), layer.pre_feedforward_layernorm
    hidden = hidden + change
    normed = _norm(middle, hidden)
    if hasattr(mlp, "gate_up_proj"):
        gate, up = _project(normed, mlp.gate_up_proj)[0].chunk(2, -1)
    else:
        gate, up = _project(normed, mlp.gate_proj, mlp.up_proj)
    activation = mlp.act_fn if hasattr(mlp, "act_fn") else mlp.activation_fn
    silu = isinstance(activation, SILU)
    change = mlp.down_proj(_SiluTimes.apply(gate, up) if silu else activation(gate) * up)
    if hasattr(layer, "post_feedforward_layernorm"):
        change = _norm(layer.post_feedforward_layernorm, change)
    return hidden + change


def _heads(
    attention: Any, states: Float[Tensor, "1 n L"]
) -> tuple[Float[Tensor, "1 n H d"], Float[Tensor, "1 n G d"], Float[Tensor, "1 n G d"]]:
    """Queries, keys and values."""
    shape = (-1, attention.head_dim)
    if hasattr(attention, "qkv_proj"):
        joint = _project(states, attention.qkv_proj)[0].unflatten(2, shape)
        keys = attention.num_key_value_heads
        query, key, value = joint.split([joint.shape[2] - 2 * keys, keys, keys], 2)
        return query, key, value
    layers = (attention.q_proj, attention.k_proj, attention.v_proj)
    query, key, value = (x.unflatten(2, shape) for x in _project(states, *layers))
    return query, key, value


def _rotated(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Heads [1, n, heads, d] with their first numbers, as many as ``cos`` has, rotated."""
    width = cos.shape[-1]
    if width == states.shape[-1]:
        return _Rotation.apply(states, cos, sin)
    return torch.cat([_Rotation.apply(states[..., :width], cos, sin), states[..., width:]], -1)


def _norm(module: Any, hidden: Tensor) -> Tensor:
    """``module(hidden)``; the frozen norm of Llama keeps less."""
    if module.weight.requires_grad or not hasattr(module, "variance_epsilon"):
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
