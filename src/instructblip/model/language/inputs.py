"""What the language model reads: projected queries, then tokens; and where the labels are."""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from instructblip.core.batch import Batch
from instructblip.model.language.fast.packing import Packing


@dataclass(frozen=True)
class Joined:
    """One training batch as the language model reads it, with m labelled positions.

    Plain rows are padded on the right. Packed rows are the same tokens as one row [1, n, L]: then
    there is no mask and ``packing`` (for an encoder-decoder ``decoder_packing`` too) states which
    token belongs to which sample.
    """

    inputs_embeds: Float[Tensor, "B X L"]  # [queries; tokens]
    attention_mask: Int[Tensor, "B X"] | None  # None: no padding
    rows: Int[Tensor, " m"]  # sample of each label, in ascending order
    places: Int[Tensor, " m"]  # position that predicts it, counted over all rows: row * X + column
    targets: Int[Tensor, " m"]  # its token
    decoder_ids: Int[Tensor, "B R"] | None = None  # of an encoder-decoder; `places` refer to these
    packing: Packing | None = None
    decoder_packing: Packing | None = None

    def labelled(self, hidden: Float[Tensor, "B X L"]) -> Float[Tensor, "m L"]:
        """The last hidden states at the labelled positions."""
        if self.packing is not None and self.packing.read is not None:
            return hidden[0]  # the last layer has computed no others
        return hidden.flatten(0, 1).index_select(0, self.places)


def prepend_queries(
    model: Any, queries: Float[Tensor, "B K L"], ids: Int[Tensor, "B X"], mask: Bool[Tensor, "B X"]
) -> tuple[Float[Tensor, "B K+X L"], Int[Tensor, "B K+X"]]:
    """[queries; tokens] as embeddings in the precision of the model, and their mask."""
    tokens = model.get_input_embeddings()(ids)  # [B, X, L]
    ones = torch.ones(queries.shape[:2], dtype=torch.long, device=ids.device)
    embeds = torch.cat([queries.to(tokens.dtype), tokens], dim=1)
    return embeds, torch.cat([ones, mask.long()], dim=1)


def embed_prefix(
    model: Any, queries: Float[Tensor, "B K L"], batch: Batch
) -> tuple[Float[Tensor, "B X L"], Int[Tensor, "B X"]]:
    """[queries; prompt] as embeddings, padded on the right, and their mask."""
    ids, mask = compact(batch.prompt_mask.bool(), batch.prompt_ids)
    return prepend_queries(model, queries, ids, mask)


def compact(
    mask: Bool[Tensor, "B X"], *values: Int[Tensor, "B X"] | Bool[Tensor, "B X"]
) -> tuple[Tensor, ...]:
    """Move the real positions of each row to the left, in order, and cut the common padding.

    Returns the values [B, Y] and then their mask [B, Y]: ids [[5, 6, 0, 7], [8, 0, 0, 9]] with
    mask [[1, 1, 0, 1], [1, 0, 0, 1]] -> [[5, 6, 7], [8, 9, 0]] with mask [[1, 1, 1], [1, 1, 0]].
    """
    width = int(mask.sum(1).max()) if mask.numel() else 0
    order = mask.long().argsort(dim=1, descending=True, stable=True)[:, :width]
    mask = mask.gather(1, order)
    # A padding id may lie outside the vocabulary, and the embedding looks it up all the same.
    moved = [value.gather(1, order).masked_fill(~mask, 0) for value in values]
    return *moved, mask


def pad_left(
    embeds: Float[Tensor, "B X L"], mask: Int[Tensor, "B X"]
) -> tuple[Float[Tensor, "B X L"], Int[Tensor, "B X"]]:
    """Turn rows padded on the right into rows padded on the left."""
    order = mask.argsort(dim=1, stable=True)
    embeds = embeds.gather(1, order[:, :, None].expand(-1, -1, embeds.shape[2]))
    return embeds, mask.gather(1, order)
