"""AdamW that walks, of a large table of embeddings, over the rows that were ever read.

A batch reads a few hundred of a tokenizer's tens of thousands of words. Gradient and moments of all
other rows are zero, and moving them costs as much as a tenth of the network: their gradients stay
sparse (PyTorch's ``nn.Embedding.sparse``) until they are here.
"""

from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.optim.adamw import adamw

LARGE = 2**20
"""Numbers in a table from which on its gradient is sparse: below, looking up its rows costs more
than it saves."""
TOGETHER = 1024
"""Rows moved at once, so that they stay in the processor's cache."""


def large_tables(model: nn.Module) -> Iterator[nn.Embedding]:
    """The trained tables of ``model`` of at least `LARGE` numbers that no other module shares."""
    owners: Counter[Tensor] = Counter()
    for module in model.modules():
        owners.update(module.parameters(recurse=False))
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            table = module.weight
            if table.requires_grad and table.numel() >= LARGE and owners[table] == 1:
                yield module


class AdamW(torch.optim.AdamW):
    """torch's AdamW, and sparse gradients: of their parameters it moves the rows read so far.

    Those move as torch's would, whether this step read them or not. A row that no step has read
    keeps its value, where torch's would shrink it by the weight decay: a word that no instruction
    had stays as pre-training left it.
    """

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        tables = []
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None and p.grad.is_sparse:
                    tables.append((p, p.grad.coalesce(), group))
                    p.grad = None
        super().step()
        for table, gradient, group in tables:
            self._move(table, gradient.indices()[0], gradient.values(), group)

    def _move(
        self,
        table: Float[Tensor, "V D"],
        ids: Int[Tensor, " k"],
        slopes: Float[Tensor, "k D"],
        group: dict[str, Any],
    ) -> None:
        state = self.state[table]
        if not state:
            state["step"] = torch.zeros((), device=table.device)
            state["exp_avg"] = torch.zeros_like(table)
            state["exp_avg_sq"] = torch.zeros_like(table)
        if "read" not in state:  # begun here, or by torch's AdamW
            state["read"] = (state["exp_avg_sq"] != 0).any(1).to(table.dtype)
        state["read"][ids] = 1
        rows = state["read"].nonzero()[:, 0]
        slope = slopes.new_zeros(len(rows), table.shape[1])
        slope[torch.searchsorted(rows, ids)] = slopes
        whole = (table, state["exp_avg"], state["exp_avg_sq"])
        for own, above in zip(rows.split(TOGETHER), slope.split(TOGETHER), strict=True):
            parts = [tensor.index_select(0, own) for tensor in whole]
            values, mean, square = parts
            adamw(
                [values],
                [above],
                [mean],
                [square],
                [],
                [state["step"].clone()],
                fused=True,
                amsgrad=False,
                beta1=group["betas"][0],
                beta2=group["betas"][1],
                lr=group["lr"],
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                maximize=False,
            )
            for tensor, part in zip(whole, parts, strict=True):
                tensor.index_copy_(0, own, part)
        state["step"] += 1
