"""Rows of tokens without holes: what the language model reads has its padding at one end."""

from jaxtyping import Bool, Float, Int
from torch import Tensor


def compact(
    mask: Bool[Tensor, "B X"], *values: Int[Tensor, "B X"] | Bool[Tensor, "B X"]
) -> tuple[Tensor, ...]:
    """Move the real positions of each row to the left, in order, and cut the common padding;
    returns the values and then the mask.

    ids [[5, 6, 0, 7], [8, 0, 0, 9]] -> [[5, 6, 7], [8, 9, 0]] with mask [[1, 1, 1], [1, 1, 0]].
    """
    width = int(mask.sum(1).max()) if mask.numel() else 0
    order = mask.long().argsort(dim=1, descending=True, stable=True)[:, :width]
    mask = mask.gather(1, order)
    # A padding id may lie outside the vocabulary; nothing reads it, but the embedding looks it up.
    moved = [value.gather(1, order).masked_fill(~mask, 0) for value in values]
    return *moved, mask


def pad_left(
    embeds: Float[Tensor, "B X L"], mask: Int[Tensor, "B X"]
) -> tuple[Float[Tensor, "B X L"], Int[Tensor, "B X"]]:
    """Turn rows padded on the right into rows padded on the left."""
    order = mask.argsort(dim=1, stable=True)
    embeds = embeds.gather(1, order[:, :, None].expand(-1, -1, embeds.shape[2]))
    return embeds, mask.gather(1, order)
