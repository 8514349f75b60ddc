"""Loss of the response tokens, with the logits of a few tokens at a time."""

import functools
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

LOSS_CHUNK = 1024
"""Response tokens whose logits exist at a time: 131 MB in fp32 with a vocabulary of 32,000."""


def token_losses(
    head: nn.Module, hidden: Float[Tensor, "m L"], targets: Int[Tensor, " m"]
) -> Float[Tensor, " m"]:
    """Cross-entropy in nats of each token, computed in fp32: -log softmax(head(hidden))[target].

    At most ``LOSS_CHUNK`` tokens have logits at a time. A frozen head computes its gradient in the
    forward pass (`_FrozenHeadLoss`); a trainable one computes the logits of its chunks, where there
    are several, again in the backward pass.
    """
    if is_frozen_linear(head) and len(targets):
        return _FrozenHeadLoss.apply(hidden, targets, head)
    if len(targets) <= LOSS_CHUNK:
        return _plain_losses(head, hidden, targets)
    pairs = zip(hidden.split(LOSS_CHUNK), targets.split(LOSS_CHUNK), strict=True)
    again = functools.partial(checkpoint, use_reentrant=False, preserve_rng_state=False)
    chunks = [again(_plain_losses, head, *pair) for pair in pairs]
    return torch.cat(chunks)


def _plain_losses(head: nn.Module, hidden: Tensor, targets: Tensor) -> Tensor:
    """The definition, with the logits [m, W] of all tokens."""
    return F.cross_entropy(head(hidden).float(), targets, reduction="none")


class _FrozenHeadLoss(torch.autograd.Function):
    """The losses of a frozen head W, and in the same pass the gradient of each in its state.

    The loss of a token depends on the state h of this token alone, and W has no gradient, so the
    backward pass is a product with d loss / dh = (softmax(W h) - one_hot(target)) W. It needs no
    logits: none are kept, and none are computed twice.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, targets: Tensor, head: nn.Linear) -> Tensor:
        losses, gradients = [], []
        for states, labels in zip(hidden.split(LOSS_CHUNK), targets.split(LOSS_CHUNK), strict=True):
            logits = F.linear(states, head.weight, head.bias).float()  # [c, W]
            logits -= logits.amax(1, keepdim=True)
            chosen = logits.gather(1, labels[:, None])
            total = logits.exp_().sum(1, keepdim=True)  # from here on `logits` are exponentials
            losses.append((total.log() - chosen)[:, 0])
            mean = (logits.to(head.weight.dtype) @ head.weight) / total  # softmax @ W
            gradients.append((mean - head.weight[labels]).to(hidden.dtype))
        ctx.save_for_backward(torch.cat(gradients))
        return torch.cat(losses)

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor, None, None]:
        (gradients,) = ctx.saved_tensors
        return (outer[0][:, None] * gradients).to(gradients.dtype), None, None


def is_frozen_linear(layer: nn.Module) -> bool:
    """Whether a layer is a plain linear one, without an adapter, and no parameter of it trains."""
    plain = type(layer) is nn.Linear and not layer._forward_hooks
    return plain and not any(p.requires_grad for p in layer.parameters())
