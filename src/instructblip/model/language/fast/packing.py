"""Rows of different lengths as one row without padding.

What a language model computes token by token (norms, linear layers, feed-forwards) reads the one
long row, so padding costs nothing there; only attention separates the samples
(`fast.attention`). A step of cpu-t5 with 27 % padding takes 877 instead of 1,064 ms in the language
model (benchmarks/train_step_t5_cpu_2026-11-23.md); on Scenes 61 % of the text slots are padding.
"""

import functools
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from instructblip.core.batch import send


@dataclass(frozen=True)
class Packing:
    """Where n packed tokens stand in B rows that are padded on the right to X slots.

    Two rows of 2 and 3 tokens::

        slots   0 a  1 b  2 .        packed   a  b  c  d  e
                3 c  4 d  5 e        token    0  1  2  3  4

        slots      [0, 1, 3, 4, 5]           slot of each token
        index      [[0, 1, 0], [2, 3, 4]]    token of each slot; at padding any token
        positions  [[0, 1, 0, 1, 2]]         place of each token within its row
        lengths    [2, 3]                    tokens of each row
        offsets    [0, 2, 5]                 where each row begins, and where the last one ends

    ``read`` are the tokens whose last hidden states are needed (None: all).
    """

    index: Int[Tensor, "B X"]
    slots: Int[Tensor, " n"]
    positions: Int[Tensor, "1 n"]
    lengths: list[int]
    read: Int[Tensor, " m"] | None = None

    @classmethod
    def of(cls, mask: Bool[Tensor, "B X"]) -> "Packing":
        """The packing of rows whose real tokens are on the left."""
        slots = mask.flatten().nonzero()[:, 0]
        index = torch.zeros_like(mask, dtype=torch.long).flatten()
        index[slots] = torch.arange(len(slots), device=mask.device)
        positions = (slots % mask.shape[1])[None]
        return cls(index.view(mask.shape), slots, positions, mask.sum(1).tolist())

    @functools.cached_property
    def offsets(self) -> Int[Tensor, " B1"]:
        """Where each row begins among the n tokens, and where the last one ends: B + 1 int32."""
        ends = torch.tensor([0, *accumulate(self.lengths)], dtype=torch.int32)
        return send(ends, self.index.device)

    def to(self, device: torch.device) -> "Packing":
        """The same packing with its tensors on ``device``."""
        read = None if self.read is None else send(self.read, device)
        index, slots, positions = (
            send(x, device) for x in (self.index, self.slots, self.positions)
        )
        return replace(self, index=index, slots=slots, positions=positions, read=read)

    @property
    def device(self) -> torch.device:
        return self.index.device

    def pack(self, values: Tensor) -> Tensor:
        """[B, X, ...] -> [1, n, ...]."""
        return values.flatten(0, 1).index_select(0, self.slots)[None]

    def unpack(self, states: Tensor) -> Tensor:
        """[1, heads, n, d] -> [B, heads, X, d]."""
        rows = states[0].transpose(0, 1).index_select(0, self.index.flatten())
        return rows.unflatten(0, tuple(self.index.shape)).transpose(1, 2)

    def arguments(self) -> dict[str, Any]:
        """Keyword arguments of a decoder that reads the packed row.

        transformers adds no mask of its own to a mask of four dimensions. The attention does not
        read the content of this one.
        """
        mask = self.index.new_zeros(1, 1, 1, 1)
        return {"attention_mask": mask, "position_ids": self.positions, "packing": self}
