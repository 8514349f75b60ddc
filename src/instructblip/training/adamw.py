"""AdamW that updates only those rows of a large embedding table that some batch has read.

A batch reads a few hundred of a tokenizer's tens of thousands of words. Gradient and moments of all
other rows are zero, and on a CPU an update of all rows costs as much as a tenth of the network:
there gradients of large tables are sparse (PyTorch's ``nn.Embedding.sparse``). A GPU updates all
rows in less time than the CPU waits for their numbers.
"""

from collections import Counter
from collections.abc import Iterable, Iterator
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
    """torch's AdamW; of ``tables`` and of parameters with sparse gradients it updates the rows that
    some step has read.

    They are updated as torch's AdamW would, whether or not this step read them. A row that no step
    has read keeps its value, where torch's would shrink it by the weight decay: a word that occurs
    in no instruction stays as pre-training left it.

    Where ``found_inf`` is 1, a tensor on the device of the parameters, a fused AdamW without sparse
    gradients leaves parameters and moments as they are.
    """

    found_inf: Tensor | None = None

    def __init__(self, params: Any, tables: Iterable[Tensor] = (), **settings: Any) -> None:
        super().__init__(params, **settings)
        self.tables = set(tables)

    def skip(self, count: Tensor) -> None:
        """Leave out this step and all later ones if ``count`` is not zero."""
        found = count.clamp(max=1)
        self.found_inf = found if self.found_inf is None else torch.maximum(found, self.found_inf)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        tables = []
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None and (p.grad.is_sparse or p in self.tables):
                    tables.append((p, p.grad, group))
                    p.grad = None
        super().step()
        for table, gradient, group in tables:
            if gradient.is_sparse:
                gradient = gradient.coalesce()
                self._update_rows(table, gradient.indices()[0], gradient.values(), group)
            else:
                self._update_all(table, gradient, group)

    def _update_rows(
        self,
        table: Float[Tensor, "V D"],
        ids: Int[Tensor, " k"],
        gradients: Float[Tensor, "k D"],
        group: dict[str, Any],
    ) -> None:
        state = self._state_of(table)
        state["read"][ids] = 1
        rows = state["read"].nonzero()[:, 0]
        gradient = gradients.new_zeros(len(rows), table.shape[1])  # zero for rows not in this batch
        gradient[torch.searchsorted(rows, ids)] = gradients
        whole = (table, state["exp_avg"], state["exp_avg_sq"])
        for chunk, its_gradient in zip(rows.split(TOGETHER), gradient.split(TOGETHER), strict=True):
            parts = [tensor.index_select(0, chunk) for tensor in whole]
            self._adamw(parts, its_gradient, state["step"].clone(), group, group["weight_decay"])
            for tensor, part in zip(whole, parts, strict=True):
                tensor.index_copy_(0, chunk, part)
        state["step"] += 1

    def _update_all(
        self, table: Float[Tensor, "V D"], gradient: Float[Tensor, "V D"], group: dict[str, Any]
    ) -> None:
        """The same on all rows: where none was read, gradient and moments are zero."""
        state, decay = self._state_of(table), group["lr"] * group["weight_decay"]
        torch.maximum(state["read"], (gradient != 0).any(1).to(table.dtype), out=state["read"])
        decayed = state["read"] if self.found_inf is None else state["read"] * (1 - self.found_inf)
        table.addcmul_(table, decayed[:, None], value=-decay)
        whole = [table, state["exp_avg"], state["exp_avg_sq"]]
        self._adamw(whole, gradient, state["step"], group, 0.0)

    def _state_of(self, table: Tensor) -> dict[str, Tensor]:
        state = self.state[table]
        if not state:
            state["step"] = torch.zeros((), device=table.device)
            state["exp_avg"] = torch.zeros_like(table)
            state["exp_avg_sq"] = torch.zeros_like(table)
        if "read" not in state:  # new, or from a checkpoint of torch's AdamW
            state["read"] = (state["exp_avg_sq"] != 0).any(1).to(table.dtype)
        return state

    def _adamw(
        self,
        parts: list[Tensor],
        gradient: Tensor,
        step: Tensor,
        group: dict[str, Any],
        decay: float,
    ) -> None:
        """torch's kernel on values and their two moments."""
        values, mean, square = parts
        adamw(
            [values],
            [gradient],
            [mean],
            [square],
            [],
            [step],
            fused=True,
            found_inf=self.found_inf,
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=decay,
            eps=group["eps"],
            maximize=False,
        )
