"""Rows that a language model reads: projected queries, then tokens; and where they are labelled."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from instructblip.core.batch import Batch
from instructblip.core.regions import part
from instructblip.model.language.fast.head import token_losses
from instructblip.model.language.fast.packing import Packing
from instructblip.model.language.rows import compact


@dataclass(frozen=True)
class Joined:
    """What the language model reads for one training batch, and where it is held to account.

    ``inputs_embeds`` [B, X, L] with ``attention_mask`` [B, X] (None: no padding), or [1, n, L] with
    ``packing``; for an encoder-decoder ``decoder_ids`` [B, R], or [1, m] with ``decoder_packing``,
    else None. ``places`` [m] are the positions, counted over all rows, whose output predicts
    ``targets`` [m]; ``rows`` [m] are their samples, in order.
    """

    inputs_embeds: Tensor
    attention_mask: Tensor | None
    rows: Tensor
    places: Tensor
    targets: Tensor
    decoder_ids: Tensor | None = None
    packing: Packing | None = None
    decoder_packing: Packing | None = None


def response_losses(model: Any, states: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy in nats [m] of the last hidden states [m, L] at the labelled places."""
    with part("head"):
        return token_losses(model.get_output_embeddings(), states, targets)


def behind_queries(model: Any, queries: Tensor, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """[queries; tokens] as embeddings [B, K+X, L] in the model's precision, and their mask."""
    tokens = model.get_input_embeddings()(ids)
    ones = torch.ones(queries.shape[:2], dtype=torch.long, device=ids.device)
    embeds = torch.cat([queries.to(tokens.dtype), tokens], dim=1)
    return embeds, torch.cat([ones, mask.long()], dim=1)


def prefix_of(model: Any, queries: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
    """[queries; prompt], padded on the right."""
    ids, mask = compact(batch.prompt_mask.bool(), batch.prompt_ids)
    return behind_queries(model, queries, ids, mask)
