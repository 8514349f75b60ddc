"""Muon for the matrices inside a network, AdamW for the rest, at one learning rate.

Muon (Jordan et al. 2024) takes Nesterov momentum, then five Newton-Schulz iterations that bring the
update close to the nearest semi-orthogonal matrix. The update is scaled to a root mean square of
0.2, about that of AdamW's updates, so that one schedule serves both (Liu et al. 2025, "Muon is
scalable for LLM training"). It runs in fp32 and on all matrices of one shape at once;
torch.optim.Muon iterates in bfloat16, for which many CPUs have no instructions.
"""

import re
from collections import defaultdict
from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor, nn

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
MOMENTUM = 0.95
UPDATE_RMS = 0.2
TABLES = re.compile(r"embed|(^|\.)(shared|wte|wpe|lm_head|word_head|relative_attention_bias)\.")
"""In the names of embeddings and of output heads: T5 has ``shared``, GPT-2 ``wte`` and ``wpe``."""


class Muon(torch.optim.Optimizer):
    """Muon on parameters of two dimensions, AdamW on all others and on embeddings and output heads
    (`TABLES`)."""

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        weight_decay: float = 0.0,
    ) -> None:
        matrices, tables, vectors = [], [], []
        for name, p in parameters.items():
            if p.ndim == 2 and not TABLES.search(name) and not name.endswith("bias"):
                matrices.append(p)
            else:
                (tables if p.ndim >= 2 and not name.endswith("bias") else vectors).append(p)
        groups = [
            {"params": matrices, "muon": True},
            {"params": tables, "muon": False},
            {"params": vectors, "muon": False, "weight_decay": 0.0},
        ]
        defaults = {"lr": lr, "betas": betas, "weight_decay": weight_decay, "eps": 1e-8}
        super().__init__([g for g in groups if g["params"]], defaults)

    @torch.no_grad()
    def step(self, closure=None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            present = [p for p in group["params"] if p.grad is not None]
            for p in present:
                p.mul_(1 - group["lr"] * group["weight_decay"])
            (self._orthogonal if group["muon"] else self._adam)(present, group)

    def _orthogonal(self, parameters: list[Tensor], group: dict) -> None:
        by_shape = defaultdict(list)
        for p in parameters:
            by_shape[p.shape].append(p)
        for shape, same in by_shape.items():
            updates = []
            for p in same:
                momentum = self.state[p].setdefault("momentum", torch.zeros_like(p))
                momentum.lerp_(p.grad, 1 - MOMENTUM)  # type: ignore[arg-type]
                updates.append(p.grad.lerp(momentum, MOMENTUM))  # type: ignore[union-attr]
            scale = UPDATE_RMS * max(shape) ** 0.5
            for p, update in zip(same, orthogonalise(torch.stack(updates)), strict=True):
                p.add_(update, alpha=-group["lr"] * scale)

    def _adam(self, parameters: list[Tensor], group: dict) -> None:
        beta1, beta2 = group["betas"]
        for p in parameters:
            state = self.state[p]
            if not state:
                zeros = torch.zeros_like(p)
                state.update(step=torch.zeros(()), mean=zeros, square=zeros.clone())
            state["step"] += 1
            step = float(state["step"])
            state["mean"].lerp_(p.grad, 1 - beta1)
            state["square"].lerp_(p.grad.square(), 1 - beta2)  # type: ignore[union-attr]
            root = (state["square"] / (1 - beta2**step)).sqrt().add_(group["eps"])
            p.addcdiv_(state["mean"], root, value=-group["lr"] / (1 - beta1**step))


def orthogonalise(
    update: Float[Tensor, "K rows columns"], iterations: int = 5
) -> Float[Tensor, "K rows columns"]:
    """Bring each of K matrices close to its nearest semi-orthogonal one.

    A Newton-Schulz iteration maps each singular value s to a s + b s^3 + c s^5, which drives all of
    them towards 1 and leaves the singular vectors as they are; no decomposition is computed.
    """
    tall = update.shape[1] > update.shape[2]
    x = update.mT if tall else update
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    a, b, c = COEFFICIENTS
    for _ in range(iterations):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x
