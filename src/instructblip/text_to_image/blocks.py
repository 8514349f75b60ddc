"""Attention and feed-forward: the halves of a layer of the connector and of the native decoder."""

import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn


class Attention(nn.Module):
    """Self-attention, or cross-attention to ``states`` of width ``states_width``."""

    def __init__(self, width: int, num_heads: int, states_width: int | None = None) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(states_width or width, width)
        self.value = nn.Linear(states_width or width, width)
        self.output = nn.Linear(width, width)

    def forward(
        self,
        hidden: Float[Tensor, "B X W"],
        states: Float[Tensor, "B Y _"] | None = None,
        mask: Bool[Tensor, "B Y"] | None = None,
    ) -> Float[Tensor, "B X W"]:
        """``mask`` is True where a token of the states takes part."""
        states = hidden if states is None else states
        query, key, value = (
            x.unflatten(2, (self.num_heads, -1)).transpose(1, 2)  # [B, H, X or Y, W / H]
            for x in (self.query(hidden), self.key(states), self.value(states))
        )
        allowed = None if mask is None else mask[:, None, None, :]
        context = F.scaled_dot_product_attention(query, key, value, allowed)
        return self.output(context.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """The feed-forward half, four times as wide inside."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, hidden: Float[Tensor, "*B W"]) -> Float[Tensor, "*B W"]:
        return self.down(F.gelu(self.up(hidden)))
