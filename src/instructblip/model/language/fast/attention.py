"""Attention over packed rows: each token attends to tokens of its own sample.

`attend` is registered in transformers' attention interface, so the language models themselves stay
as transformers defines them. It has four implementations of the same result:

- one sample after the other (`one_by_one`): the definition, and the fastest one on a CPU;
- padded rows by plain matrix products (`attend_by_products`), for short rows in bf16 on a CPU,
  whose own kernel takes 0.7 ms for the backward pass of each sample;
- PyTorch's flash attention for rows of different lengths (`varlen_attn`), on a GPU in half
  precision. The kernel is young and its signature has changed between releases, so it is compared
  with the definition, gradients included, once per device, dtype and head width;
- padded rows, everywhere else.
"""

import functools
import warnings
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from instructblip.model.language.fast.packing import Packing

try:
    from torch.nn.attention.varlen import varlen_attn
except ImportError:  # before torch 2.10
    varlen_attn: Any = None

ATTENTION = "instructblip_packed"
"""Name of `attend` in transformers' interface; without ``packing`` it is transformers' "sdpa"."""

ONE_BY_ONE = ("cpu",)
"""Devices that attend to one sample after the other, without padding and without a copy. Rows of
the same length, which the forecast of memory has, are attended to together: in a twelfth of the
time for 192 rows of FlanT5-XL. (With T5's bias alone: other rows would be copied.)"""

PRODUCT_DTYPES = (torch.bfloat16,)
PRODUCT_LENGTHS = range(1, 129)
"""Where `attend_by_products` is faster than one sample after the other: lengths of the longest row,
since its scores take memory."""

KERNEL_DEVICES = ("cuda",)
KERNEL_DTYPES = (torch.float16, torch.bfloat16)
KERNEL_WIDTHS = range(8, 257, 8)
"""Where `varlen_attn` is tried; widths are those of a head."""

CAUSAL = (-1, 0)
"""Window of `varlen_attn`: any number of tokens to the left, none to the right."""


def packs(model: Any) -> bool:
    """Whether a model reads packed rows."""
    return model.config._attn_implementation == ATTENTION


def one_by_one(states: Tensor) -> bool:
    """Whether samples are attended to one after the other."""
    return states.device.type in ONE_BY_ONE


@torch.compiler.disable
def attend(
    module: torch.nn.Module,
    query: Float[Tensor, "B H X d"],
    key: Float[Tensor, "B G Y d"],
    value: Float[Tensor, "B G Y d"],
    attention_mask: Tensor | None,
    packing: Packing | None = None,
    memory: Packing | None = None,
    position_bias: Tensor | None = None,
    **settings: Any,
) -> tuple[Float[Tensor, "B X H d"], None]:
    """Attention within each sample of a packed row (B = 1); without ``packing``, of plain rows.

    ``memory`` is the packing of the encoder's tokens, the keys of a decoder's cross-attention.
    ``position_bias`` [1 or B, heads or 1, X or 1, X or 1] is added to the scores of each sample and
    then contains the mask as well (`fast.t5`). With ``sliding_window`` w a token sees itself and
    the w - 1 tokens before it.
    """
    if packing is None:
        bias = {} if position_bias is None else {"position_bias": position_bias}
        return sdpa_attention_forward(module, query, key, value, attention_mask, **bias, **settings)
    keys = packing if memory is None or module.is_causal else memory
    longest, window = max(packing.lengths), settings.get("sliding_window")
    if window is not None and longest > window:
        near = torch.ones(longest, longest, dtype=torch.bool, device=query.device)
        position_bias = near.tril().triu(1 - window)  # a mask: rows are causal, without bias
    plain = position_bias is None and module.is_causal and not settings.get("dropout")
    short = query.dtype in PRODUCT_DTYPES and longest in PRODUCT_LENGTHS
    if plain and short and one_by_one(query):
        query, key, value = (packing.unpack(states) for states in (query, key, value))
        context = attend_by_products(query, key, value, settings.get("scaling"))
        return packing.pack(context), None
    alike = len({*packing.lengths}) == len({*keys.lengths}) == 1 < len(packing.lengths)
    if one_by_one(query) and not (alike and position_bias is not None):
        lengths = zip(packing.lengths, keys.lengths, strict=True)
        biases = [None if position_bias is None else position_bias[..., :x, :y] for x, y in lengths]
        rows = zip(
            query.split(packing.lengths, 2),  # [1, heads, length, d] each
            key.split(keys.lengths, 2),
            value.split(keys.lengths, 2),
            biases,
            strict=True,
        )
        contexts = [sdpa_attention_forward(module, *row, **settings)[0] for row in rows]
        return torch.cat(contexts, 1), None
    if plain and kernel_works_on(query):
        scale = settings.get("scaling")
        return attend_by_kernel(query, key, value, packing.offsets, longest, scale), None
    # Padding stands behind all tokens of its row, where causal attention never looks: no mask.
    query, key, value = packing.unpack(query), keys.unpack(key), keys.unpack(value)
    context, _ = sdpa_attention_forward(module, query, key, value, position_bias, **settings)
    return packing.pack(context), None


AttentionInterface.register(ATTENTION, attend)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)


def kernel_works_on(query: Float[Tensor, "1 H n d"]) -> bool:
    """Whether `attend_by_kernel` can be used for queries like these."""
    device, dtype, width = query.device, query.dtype, query.shape[-1]
    fits = device.type in KERNEL_DEVICES and dtype in KERNEL_DTYPES and width in KERNEL_WIDTHS
    return fits and _kernel_agrees(device, dtype, width)


def attend_by_kernel(
    query: Float[Tensor, "1 H n d"],
    key: Float[Tensor, "1 G n d"],
    value: Float[Tensor, "1 G n d"],
    offsets: Int[Tensor, " B1"],
    longest: int,
    scale: float | None = None,
) -> Float[Tensor, "1 n H d"]:
    """Causal attention of packed rows: row i is ``offsets[i]`` up to, and without,
    ``offsets[i + 1]``. One key serves H / G query heads; ``scale`` None: d ** -0.5."""
    shared = query.shape[1] // key.shape[1]
    if shared > 1:
        key, value = (x.repeat_interleave(shared, 1) for x in (key, value))
    packed = (x.squeeze(0).transpose(0, 1) for x in (query, key, value))
    context = varlen_attn(
        *packed, offsets, offsets, longest, longest, scale=scale, window_size=CAUSAL
    )
    return context.unsqueeze(0)


def attend_by_products(
    query: Float[Tensor, "B H X d"],
    key: Float[Tensor, "B G X d"],
    value: Float[Tensor, "B G X d"],
    scale: float | None = None,
) -> Float[Tensor, "B X H d"]:
    """Causal attention of rows padded on the right. One key serves H / G query heads; ``scale``
    None: d ** -0.5."""
    (rows, heads, length, width), groups = query.shape, key.shape[1]
    scaled = query * (width**-0.5 if scale is None else scale)
    shared = scaled.reshape(rows, groups, -1, width)  # [B, G, H / G * X, d]
    scores = (shared @ key.transpose(2, 3)).view(rows, heads, length, length)
    future = torch.ones(length, length, dtype=torch.bool, device=query.device).triu(1)
    weights = scores.masked_fill(future, -torch.inf).softmax(-1, dtype=query.dtype)
    context = weights.view(rows, groups, -1, length) @ value
    return context.view(rows, heads, length, width).transpose(1, 2)


@functools.cache
def _kernel_agrees(device: torch.device, dtype: torch.dtype, width: int) -> bool:
    """Compare the kernel with rows attended to one by one, and warn if it fails or differs."""
    lengths = [5, 1, 9]
    offsets = torch.tensor([0, 5, 6, 15], dtype=torch.int32, device=device)
    generator = torch.Generator(device).manual_seed(0)
    # The first call may happen inside a checkpointed layer, whose hooks do not apply here.
    no_hooks = torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x)
    with torch.inference_mode(False), torch.enable_grad(), no_hooks:
        query, key, value, outer = (
            torch.randn(1, 2, 15, width, generator=generator, device=device).to(dtype)
            for _ in range(4)
        )
        states = [x.requires_grad_() for x in (query, key, value)]
        outer = outer.transpose(1, 2)
        rows = zip(*(x.split(lengths, 2) for x in states), strict=True)
        expected = torch.cat(
            [F.scaled_dot_product_attention(*row, is_causal=True) for row in rows], 2
        ).transpose(1, 2)
        gradients = torch.autograd.grad(expected, states, outer)
        try:
            got = attend_by_kernel(query, key, value, offsets, max(lengths))
            results = [got, *torch.autograd.grad(got, states, outer)]
        except Exception as error:  # whatever a kernel may raise
            return _warn(f"fails ({type(error).__name__}: {error})")
    apart = max(
        (a.detach().float() - b.detach().float()).abs().max().item()
        for a, b in zip(results, [expected, *gradients], strict=True)
    )
    return apart < 0.05 or _warn(f"differs by {apart:.2g}")  # values of about 1, in 8 bits


def _warn(what: str) -> bool:
    warnings.warn(
        f"flash attention for packed rows {what} with torch {torch.__version__}; attention reads "
        "padded rows instead, which is slower and gives the same result",
        stacklevel=2,
    )
    return False
