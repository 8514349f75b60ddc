"""The head of the language model and its loss: logits exist for a moment and a few tokens."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

LOSS_CHUNK = 1024
"""Response tokens whose logits exist at a time: 131 MB in fp32 with a vocabulary of 32,000."""

Logits = Callable[[Tensor], Tensor]


class _FrozenHeadLoss(torch.autograd.Function):
    """Losses, and at once the slope of each of them in its own hidden state.

    The head has no gradient of its own, and a token's loss depends on that token's state alone, so
    the whole backward pass is the slope times what comes from above: no logits are kept for it, and
    none are computed twice.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, targets: Tensor, logits: Logits) -> Tensor:
        losses, slopes = [], []
        for states, own in zip(hidden.split(LOSS_CHUNK), targets.split(LOSS_CHUNK), strict=True):
            states = states.detach().requires_grad_()
            with torch.enable_grad():
                loss = F.cross_entropy(logits(states), own, reduction="none")
                slopes.append(torch.autograd.grad(loss.sum(), states)[0])
            losses.append(loss.detach())
        ctx.save_for_backward(torch.cat(slopes))
        return torch.cat(losses)

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor, None, None]:
        (slopes,) = ctx.saved_tensors
        return (outer[0][:, None] * slopes).to(slopes.dtype), None, None


def token_losses(
    logits: Logits, hidden: Float[Tensor, "n L"], targets: Int[Tensor, " n"], frozen: bool
) -> Float[Tensor, " n"]:
    """Cross-entropy of each token in nats. ``frozen``: no parameter behind ``logits`` trains."""
    if frozen and hidden.requires_grad and torch.is_grad_enabled() and len(targets):
        return _FrozenHeadLoss.apply(hidden, targets, logits)
    pairs = zip(hidden.split(LOSS_CHUNK), targets.split(LOSS_CHUNK), strict=True)
    chunks = [F.cross_entropy(logits(own), ids, reduction="none") for own, ids in pairs]
    return torch.cat(chunks)
