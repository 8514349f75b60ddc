"""What the language model reads: projected queries among tokens; and where the labels are."""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from instructblip.core.batch import Batch, send
from instructblip.model.language.fast.packing import Packing


@dataclass(frozen=True)
class Joined:
    """One training batch as the language model reads it, with m labelled positions.

    Plain rows are padded on the right. Packed rows are the same tokens as one row [1, n, L]: then
    there is no mask and ``packing`` (for an encoder-decoder ``decoder_packing`` too) states which
    token belongs to which sample.
    """

    inputs_embeds: Float[Tensor, "B X L"]  # queries and tokens
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


def query_mask(queries: Float[Tensor, "B K L"], batch: Batch) -> Bool[Tensor, "B K"]:
    """Which queries have read an image: false where a sample has fewer images than another."""
    present = batch.host.image_index >= 0  # [B, F]
    return present.repeat_interleave(queries.shape[1] // present.shape[1], dim=1)


def insert_queries(
    model: Any,
    queries: Float[Tensor, "B K L"],
    query_mask: Bool[Tensor, "B K"],
    ids: Int[Tensor, "B X"],
    mask: Bool[Tensor, "B X"],
    image_places: Int[Tensor, "B F"] | None = None,
) -> tuple[Float[Tensor, "B Y L"], Int[Tensor, "B Y"]]:
    """[queries; tokens] as embeddings in the precision of the model, padded on the right, and
    their mask, which stays on the device of ``mask``.

    With ``image_places`` the queries of an image come directly before the token of that number.
    With one query per image, two images at the places 1 and 3 of the tokens 5 6 7::

        image_places    [[1, 3]]        row    5  q  6  7  q
    """
    tokens = model.get_input_embeddings()(send(ids, queries.device))  # [B, X, L]
    embeds = torch.cat([queries.to(tokens.dtype), tokens], dim=1)
    joined = torch.cat([query_mask, mask], dim=1).long()
    if image_places is None:
        return (embeds, joined) if query_mask.all() else pad_right(embeds, joined)
    per_image = queries.shape[1] // image_places.shape[1]
    # Half steps: a query sorts between its token and the one before; padding sorts behind all.
    of_queries = 2 * image_places.repeat_interleave(per_image, dim=1)  # [B, K]
    of_tokens = 2 * torch.arange(ids.shape[1], device=ids.device).expand_as(ids) + 1  # [B, X]
    keys = torch.cat([of_queries, of_tokens], dim=1)
    order = keys.masked_fill(joined == 0, 2 * ids.shape[1] + 2).argsort(dim=1, stable=True)
    return _reorder(embeds, joined, order[:, : int(joined.sum(1).max())])


def embed_prefix(
    model: Any, queries: Float[Tensor, "B K L"], batch: Batch
) -> tuple[Float[Tensor, "B X L"], Int[Tensor, "B X"]]:
    """Queries and prompt as embeddings, padded on the right, and their mask on the CPU (with
    ``batch.host``)."""
    host, read = batch.host, query_mask(queries, batch)
    ids, mask = compact(host.prompt_mask.bool(), host.prompt_ids)
    return insert_queries(model, queries, read, ids, mask, host.image_places)


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


def pad_right(
    embeds: Float[Tensor, "B X L"], mask: Int[Tensor, "B X"]
) -> tuple[Float[Tensor, "B Y L"], Int[Tensor, "B Y"]]:
    """`compact` for embeddings: those of padding may be anything."""
    order = mask.argsort(dim=1, descending=True, stable=True)[:, : int(mask.sum(1).max())]
    return _reorder(embeds, mask, order)


def pad_left(
    embeds: Float[Tensor, "B X L"], mask: Int[Tensor, "B X"]
) -> tuple[Float[Tensor, "B X L"], Int[Tensor, "B X"]]:
    """Turn rows padded on the right into rows padded on the left."""
    return _reorder(embeds, mask, mask.argsort(dim=1, stable=True))


def _reorder(
    embeds: Float[Tensor, "B X L"], mask: Int[Tensor, "B X"], order: Int[Tensor, "B Y"]
) -> tuple[Float[Tensor, "B Y L"], Int[Tensor, "B Y"]]:
    """Positions ``order`` of each row."""
    places = send(order, embeds.device)[:, :, None].expand(-1, -1, embeds.shape[2])
    return embeds.gather(1, places), mask.gather(1, order)
