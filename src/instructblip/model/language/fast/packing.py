"""Rows of different lengths as one row without padding: what stands between tokens costs nothing.

Everything that a decoder computes token by token (norms, linear layers, feed-forwards) sees the one
long row; attention alone looks at the samples apart, each with positions of its own. It is called
through transformers' attention interface, so the language models stay as transformers wrote them.
"""

import functools
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from instructblip.model.language.fast import varlen
from instructblip.model.language.fast.llama import speed_up

ATTENTION = "instructblip_packed"
"""Name of the attention below; without ``packing`` it is transformers' "sdpa"."""

ONE_BY_ONE = ("cpu",)
"""Devices that attend to one sample after the other, without padding and without a copy."""

PACKED_TYPES = ("llama", "opt", "gpt2", "qwen2")
"""Decoders whose positions and mask can be given freely. ALiBi, convolutions and the like tie a
token to its neighbours: these keep padded rows."""


@dataclass(frozen=True)
class Packing:
    """Where n packed tokens stand in B rows that are padded on the right to X slots.

    ``index`` [B, X] names the token of each slot (padding: any), ``slots`` [n] the slot of each
    token, ``positions`` [1, n] its place within its own row, ``lengths`` the number of tokens of
    each row. Rows of 2 and 1 tokens: index [[0, 1], [2, 0]], slots [0, 1, 2], positions
    [[0, 1, 0]], lengths [2, 1]. ``read`` [m] are the tokens whose last hidden states are asked for
    (None: all).
    """

    index: Int[Tensor, "B X"]
    slots: Int[Tensor, " n"]
    positions: Int[Tensor, "1 n"]
    lengths: list[int]
    read: Int[Tensor, " m"] | None = None

    @classmethod
    def of(cls, mask: Bool[Tensor, "B X"]) -> "Packing":
        """The packing of rows whose real tokens stand on the left."""
        slots = mask.flatten().nonzero()[:, 0]
        index = torch.zeros_like(mask, dtype=torch.long).flatten()
        index[slots] = torch.arange(len(slots), device=mask.device)
        positions = (slots % mask.shape[1])[None]
        return cls(index.view(mask.shape), slots, positions, mask.sum(1).tolist())

    @functools.cached_property
    def offsets(self) -> Int[Tensor, " B1"]:
        """Where each row begins among the n tokens, and where the last one ends; int32."""
        ends = torch.tensor([0, *accumulate(self.lengths)], dtype=torch.int32)
        return ends.to(self.index.device)

    def unpack(self, states: Tensor) -> Tensor:
        """[1, heads, n, d] -> [B, heads, X, d]."""
        rows = states[0].transpose(0, 1).index_select(0, self.index.flatten())
        return rows.unflatten(0, tuple(self.index.shape)).transpose(1, 2)

    def pack(self, values: Tensor) -> Tensor:
        """[B, X, ...] -> [1, n, ...]."""
        return values.flatten(0, 1).index_select(0, self.slots)[None]

    def arguments(self) -> dict[str, Any]:
        """What a decoder is called with. The mask of four dimensions says that nothing is left for
        transformers to mask; its content is not read."""
        nothing = self.index.new_zeros(1, 1, 1, 1)
        return {"attention_mask": nothing, "position_ids": self.positions, "packing": self}


def one_by_one(states: Tensor) -> bool:
    """Whether samples are attended to one after the other."""
    return states.device.type in ONE_BY_ONE


def attend(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    packing: Packing | None = None,
    memory: Packing | None = None,
    position_bias: Tensor | None = None,
    **settings: Any,
) -> tuple[Tensor, None]:
    """Attention within each packed sample: one by one where a call costs little, by a kernel that
    knows where samples end where there is one (`varlen`), else in padded rows. Padding stands
    behind all tokens of its row, where no causal attention looks, so the rows need no mask.

    ``memory`` says where the encoder's tokens stand, for a decoder's attention that is not causal;
    ``position_bias`` [1 or B, heads or 1, X or 1, X or 1] is added to the scores of each sample
    (`relative`) and then masks what has to be.
    """
    if packing is None:
        own = {} if position_bias is None else {"position_bias": position_bias}
        return sdpa_attention_forward(module, query, key, value, attention_mask, **own, **settings)
    keys = packing if memory is None or module.is_causal else memory
    if one_by_one(query):
        seen = (x.split(keys.lengths, 2) for x in (key, value))
        contexts = []
        for q, k, v in zip(query.split(packing.lengths, 2), *seen, strict=True):
            bias = position_bias
            if bias is not None:
                bias = bias[..., : q.shape[2], : k.shape[2]]
            contexts.append(sdpa_attention_forward(module, q, k, v, bias, **settings)[0])
        return torch.cat(contexts, 1), None
    plain = position_bias is None and module.is_causal and not settings.get("dropout")
    if plain and varlen.works_on(query):
        longest, scale = max(packing.lengths), settings.get("scaling")
        return varlen.attend_causally(query, key, value, packing.offsets, longest, scale), None
    query, key, value = packing.unpack(query), keys.unpack(key), keys.unpack(value)
    context, _ = sdpa_attention_forward(module, query, key, value, position_bias, **settings)
    return packing.pack(context), None


AttentionInterface.register(ATTENTION, attend)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)


def allow_packing(model: Any) -> None:
    """Give a decoder the attention above, and faster layers, where its rows may be packed."""
    config = model.config
    if config.model_type in PACKED_TYPES and not getattr(config, "use_sliding_window", False):
        model.set_attn_implementation(ATTENTION)
        speed_up(model)


def packs(model: Any) -> bool:
    """Whether a model reads packed rows."""
    return model.config._attn_implementation == ATTENTION
