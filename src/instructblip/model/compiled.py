"""Layers compiled by torch.compile, one layer at a time.

The compiler turns the element-wise work of a layer into few passes over memory and few launches.
Lengths are symbols, and layers of one kind share their code: it is compiled in the first step and
then serves every batch. Only work with gradients is compiled, and the frozen image encoder:
generation and ranking, whose caches grow, run the plain layers. Attention over packed rows reads
Python lists of lengths and runs as it is (`language.fast.attention`).
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.fx.experimental import _config as shapes


def _compile(run: Callable[..., Any]) -> Callable[..., Any]:
    # Otherwise lengths that are equal by chance in the first batch have to be equal in all.
    shapes.use_duck_shape = False
    return torch.compile(run, dynamic=True)


@functools.cache
def compiled(run: Callable[..., Any]) -> Callable[..., Any]:
    """The compiled twin of a function of a module, which all layers share; nothing is compiled
    before its first call."""
    return _compile(run)


def compile_forward(layer: nn.Module) -> None:
    """Compile ``layer.forward`` where gradients are computed."""
    plain = layer.forward
    twin = _compile(plain)  # not kept: it would keep the layer

    def forward(*inputs: Any, **settings: Any) -> Any:
        return (twin if torch.is_grad_enabled() else plain)(*inputs, **settings)

    layer.forward = forward


def why_not_compiled(device: torch.device) -> str | None:
    """What keeps torch.compile from working on a device, on one line; None if it works.

    A compiler may be missing, or be there without the headers of Python: only trying can tell.
    """
    one = torch.ones(2, device=device)
    try:
        torch.compile(lambda x: x + 1, options={"force_disable_caches": True})(one)
    except Exception as error:  # whatever a compiler may raise
        return f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
    return None
