"""AdamW that updates only those rows of a large embedding table that some batch has read.

A batch reads a few hundred of a tokenizer's tens of thousands of words. Gradient and moments of all
other rows are zero, and an update of all rows costs as much as a tenth of the network. Gradients of
large tables are therefore sparse (PyTorch's ``nn.Embedding.sparse``).
"""

from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.optim.adamw import adamw

LARGE = 2**20
"""Elements of a table from which on its gradient is sparse: for a smaller one, the search for its
rows costs more than it saves."""
TOGETHER = 1024
"""Rows updated at once, so that they stay in the processor's cache."""


def large_tables(model: nn.Module) -> Iterator[nn.Embedding]:
    """Yield the trainable tables of at least `LARGE` elements that no other module shares."""
    owners: Counter[Tensor] = Counter()
    for module in model.modules():
        owners.update(module.parameters(recurse=False))
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            table = module.weight
            if table.requires_grad and table.numel() >= LARGE and owners[table] == 1:
                yield module


class AdamW(torch.optim.AdamW):
    """torch's AdamW; of parameters with sparse gradients it updates the rows read so far.

    They are updated as torch's AdamW would, whether or not this step read them. A row that no step
    has read keeps its value, where torch's would shrink it by the weight decay: a word that occurs
    in no instruction stays as pre-training left it.
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
            self._update_rows(table, gradient.indices()[0], gradient.values(), group)

    def _update_rows(
        self,
        table: Float[Tensor, "V D"],
        ids: Int[Tensor, " k"],
        gradients: Float[Tensor, "k D"],
        group: dict[str, Any],
    ) -> None:
        state = self.state[table]
        if not state:
            state["step"] = torch.zeros((), device=table.device)
            state["exp_avg"] = torch.zeros_like(table)
            state["exp_avg_sq"] = torch.zeros_like(table)
        if "read" not in state:  # new, or from a checkpoint of torch's AdamW
            state["read"] = (state["exp_avg_sq"] != 0).any(1).to(table.dtype)
        state["read"][ids] = 1
        rows = state["read"].nonzero()[:, 0]
        gradient = gradients.new_zeros(len(rows), table.shape[1])  # zero for rows not in this batch
        gradient[torch.searchsorted(rows, ids)] = gradients
        whole = (table, state["exp_avg"], state["exp_avg_sq"])
        for chunk, its_gradient in zip(rows.split(TOGETHER), gradient.split(TOGETHER), strict=True):
            parts = [tensor.index_select(0, chunk) for tensor in whole]
            values, mean, square = parts
            adamw(
                [values],
                [its_gradient],
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
                tensor.index_copy_(0, chunk, part)
        state["step"] += 1
