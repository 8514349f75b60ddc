"""Packed rows on a GPU: flash attention that is told where each row ends, so that none is padded.

PyTorch's kernel is young and its signature has changed between releases. So it is held, once for
each device, type and width of head, to rows attended to one by one, slopes included. Where it is
missing, fails or disagrees, a warning says so and the rows are padded as before.
"""

import functools
import warnings
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

try:
    from torch.nn.attention.varlen import varlen_attn
except ImportError:  # before torch 2.10
    varlen_attn: Any = None

DEVICES = ("cuda",)
DTYPES = (torch.float16, torch.bfloat16)
WIDTHS = range(8, 257, 8)
"""Of a head."""

CAUSAL = (-1, 0)
"""Any number of tokens to the left, none to the right."""


def works_on(query: Float[Tensor, "1 H n d"]) -> bool:
    """Whether ``attend_causally`` can be used for queries like these."""
    width = query.shape[-1]
    fits = query.dtype in DTYPES and width in WIDTHS
    return query.device.type in DEVICES and fits and _agrees(query.device, query.dtype, width)


def attend_causally(
    query: Float[Tensor, "1 H n d"],
    key: Float[Tensor, "1 G n d"],
    value: Float[Tensor, "1 G n d"],
    offsets: Int[Tensor, " B1"],
    longest: int,
    scale: float | None = None,
) -> Float[Tensor, "1 n H d"]:
    """Attention of B packed rows to their own earlier tokens: row i is ``offsets[i]`` up to, and
    without, ``offsets[i + 1]``, int32. A key serves H / G heads of queries; no ``scale``: d ** -0.5
    """
    shared = query.shape[1] // key.shape[1]
    if shared > 1:
        key, value = (x.repeat_interleave(shared, 1) for x in (key, value))
    packed = (x[0].transpose(0, 1) for x in (query, key, value))
    context = varlen_attn(
        *packed, offsets, offsets, longest, longest, scale=scale, window_size=CAUSAL
    )
    return context[None]


@functools.cache
def _agrees(device: torch.device, dtype: torch.dtype, width: int) -> bool:
    lengths = [5, 1, 9]
    offsets = torch.tensor([0, 5, 6, 15], dtype=torch.int32, device=device)
    generator = torch.Generator(device).manual_seed(0)
    # not the hooks of a checkpoint that the first call may stand in
    plain = torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x)
    with torch.inference_mode(False), torch.enable_grad(), plain:
        query, key, value, above = (
            torch.randn(1, 2, 15, width, generator=generator, device=device).to(dtype)
            for _ in range(4)
        )
        states = [x.requires_grad_() for x in (query, key, value)]
        above = above.transpose(1, 2)
        rows = zip(*(x.split(lengths, 2) for x in states), strict=True)
        expected = torch.cat(
            [F.scaled_dot_product_attention(*row, is_causal=True) for row in rows], 2
        ).transpose(1, 2)
        slopes = torch.autograd.grad(expected, states, above)
        try:
            got = attend_causally(query, key, value, offsets, max(lengths))
            found = [got, *torch.autograd.grad(got, states, above)]
        except Exception as error:  # whatever a kernel may raise
            return _warn(f"fails ({type(error).__name__}: {error})")
    apart = max(
        (a.detach().float() - b.detach().float()).abs().max().item()
        for a, b in zip(found, [expected, *slopes], strict=True)
    )
    return apart < 0.05 or _warn(f"is {apart:.2g} off")  # values of about 1, in 8 bits


def _warn(what: str) -> bool:
    warnings.warn(
        f"flash attention for packed rows {what} with torch {torch.__version__}; rows are padded "
        "for the attention instead, which costs time but changes nothing",
        stacklevel=2,
    )
    return False
