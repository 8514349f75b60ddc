"""Candidates of many samples in one row of chunks, and their likelihoods."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

Candidates = Sequence[Sequence[Sequence[int]]]
"""Token ids of every candidate of every sample, the end token included."""

Normalization = Literal["sum", "mean"]


@dataclass(frozen=True)
class Pairs:
    """All (sample, candidate) pairs of a batch in one row, whatever their number per sample."""

    sample: Tensor  # int64 [pairs]
    ids: Tensor  # int64 [pairs, X], padded on the right
    counted: Tensor  # bool [pairs, X]
    counts: list[int]  # candidates per sample

    @classmethod
    def of(
        cls, candidates: Candidates, include_end: bool, device: torch.device, num_samples: int
    ) -> "Pairs":
        if len(candidates) != num_samples:
            raise ValueError(
                f"candidates must be one list per sample; got {len(candidates)} for {num_samples}"
            )
        flat = [(i, list(ids)) for i, group in enumerate(candidates) for ids in group]
        if not include_end:
            flat = [(i, ids[:-1]) for i, ids in flat]
        empty = [i for i, ids in flat if not ids]
        if empty:
            raise ValueError(
                f"a candidate has no token to score (sample {empty[0]} of the batch); "
                "give at least one token besides the end token"
            )
        tokens = [torch.tensor(ids, dtype=torch.long) for _, ids in flat]
        padded = pad_sequence(tokens, batch_first=True) if tokens else torch.zeros(0, 1).long()
        lengths = torch.tensor([len(ids) for _, ids in flat], dtype=torch.long)
        return cls(
            sample=torch.tensor([i for i, _ in flat], dtype=torch.long, device=device),
            ids=padded.to(device),
            counted=(torch.arange(padded.shape[1])[None] < lengths[:, None]).to(device),
            counts=[len(group) for group in candidates],
        )

    def chunks(self, size: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """(sample, ids, counted) for ``size`` pairs at a time, cut to the longest of the chunk."""
        for start in range(0, len(self.sample), size):
            part = slice(start, start + size)
            counted = self.counted[part]
            width = int(counted.sum(1).max())
            yield self.sample[part], self.ids[part, :width], counted[:, :width]

    def by_sample(self, scores: list[Tensor]) -> list[Tensor]:
        """Scores [C] of each sample from the scores of all chunks."""
        flat = torch.cat(scores) if scores else torch.zeros(0, device=self.sample.device)
        return list(flat.split(self.counts))


def likelihood(
    logits: Float[Tensor, "c X W"],
    ids: Int[Tensor, "c X"],
    counted: Bool[Tensor, "c X"],
    normalization: Normalization,
) -> Float[Tensor, " c"]:
    """Sum or mean over the counted tokens of their log-probabilities."""
    tokens = logits.log_softmax(-1).gather(2, ids[:, :, None])[:, :, 0]
    total = tokens.masked_fill(~counted, 0).sum(1)
    return total / counted.sum(1) if normalization == "mean" else total
