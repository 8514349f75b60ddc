"""The head of the language model and its loss: logits exist for a moment and a few tokens."""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

LOSS_CHUNK = 1024
"""Response tokens whose logits exist at a time: 131 MB in fp32 with a vocabulary of 32,000."""


def is_frozen_linear(layer: nn.Module) -> bool:
    """Whether a layer is its weights alone, with no adapter beside them, and they do not train."""
    plain = type(layer) is nn.Linear and not layer._forward_hooks
    return plain and not any(p.requires_grad for p in layer.parameters())


class _FrozenHeadLoss(torch.autograd.Function):
    """Losses, and at once the slope of each of them in its own hidden state.

    A token's loss depends on that token's state alone and the head has no gradient of its own, so
    the whole backward pass is this slope, (softmax - one-hot) W, times what comes from above: no
    logits are kept for it, and none are computed twice.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, targets: Tensor, head: nn.Linear) -> Tensor:
        losses, slopes = [], []
        for states, own in zip(hidden.split(LOSS_CHUNK), targets.split(LOSS_CHUNK), strict=True):
            scores = F.linear(states, head.weight, head.bias).float()  # [c, vocabulary]
            scores -= scores.amax(1, keepdim=True)
            right = scores.gather(1, own[:, None])
            total = scores.exp_().sum(1, keepdim=True)
            losses.append((total.log() - right)[:, 0])
            mean = (scores.to(head.weight.dtype) @ head.weight) / total  # softmax @ W
            slopes.append((mean - head.weight[own]).to(hidden.dtype))
        ctx.save_for_backward(torch.cat(slopes))
        return torch.cat(losses)

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor, None, None]:
        (slopes,) = ctx.saved_tensors
        return (outer[0][:, None] * slopes).to(slopes.dtype), None, None


def token_losses(
    head: nn.Module, hidden: Float[Tensor, "n L"], targets: Int[Tensor, " n"]
) -> Float[Tensor, " n"]:
    """Cross-entropy of each token in nats, in fp32; logits are made again in the backward pass of
    a head that trains, where there is more than one chunk of them."""
    if is_frozen_linear(head) and len(targets):
        return _FrozenHeadLoss.apply(hidden, targets, head)

    def loss(states: Tensor, own: Tensor) -> Tensor:
        return F.cross_entropy(head(states).float(), own, reduction="none")

    if len(targets) <= LOSS_CHUNK:
        return loss(hidden, targets)
    pairs = zip(hidden.split(LOSS_CHUNK), targets.split(LOSS_CHUNK), strict=True)
    return torch.cat([checkpoint(loss, *pair, use_reentrant=False) for pair in pairs])
