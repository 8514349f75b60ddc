"""The Q-Former without padding, and without states that nothing reads.

The plain definition is ``QFormer``, whose parameters and results this one shares. Between its
layers stands a list of tokens: the queries of all rows, then the words of all rows. Attention alone
looks at it row by row. In the last layer ``forward`` computes no text, which nothing reads. On
Scenes 61 % of the text slots of a batch are padding (benchmarks/padding.py).
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from instructblip.model.qformer import Attention, QFormer, QFormerLayer, attention_mask


@dataclass(frozen=True, slots=True)
class Rows:
    """Where n tokens stand in M rows [queries; text] of X slots, the text padded.

    ``index`` [M, X] names the token of each slot (padding: any), ``slots`` [n] the slot of each
    token. One query a row and texts of two words and one: index [[0, 2, 3], [1, 4, 0]], slots
    [0, 3, 1, 2, 4].
    """

    index: Int[Tensor, "M X"]
    slots: Int[Tensor, " n"]

    @classmethod
    def of(
        cls, embeds: Float[Tensor, "M X D"], num_queries: int, text_mask: Int[Tensor, "M I"] | None
    ) -> "Rows":
        """The layout of padded rows; without a mask none of their text is padding."""
        count = embeds.shape[0] * embeds.shape[1]
        places = torch.arange(count, device=embeds.device).unflatten(0, embeds.shape[:2])
        text = places[:, num_queries:]
        text = text.flatten() if text_mask is None else text[text_mask.bool()]
        slots = torch.cat([places[:, :num_queries].flatten(), text])
        index = torch.zeros_like(places).flatten()
        index[slots] = torch.arange(len(slots), device=embeds.device)
        return cls(index.view_as(places), slots)

    def unpack(self, tokens: Float[Tensor, "n D"]) -> Float[Tensor, "M X D"]:
        return tokens.index_select(0, self.index.flatten()).unflatten(0, tuple(self.index.shape))

    def pack(self, rows: Float[Tensor, "M X D"]) -> Float[Tensor, "n D"]:
        return rows.flatten(0, 1).index_select(0, self.slots)


class PackedQFormer(QFormer):
    """``QFormer`` over packed tokens."""

    def forward(
        self,
        query_embeds: Float[Tensor, "M Q D"],
        image_features: Float[Tensor, "N P V"],
        qformer_ids: Int[Tensor, "M I"] | None = None,
        qformer_mask: Int[Tensor, "M I"] | None = None,
        image_index: Int[Tensor, " M"] | None = None,
    ) -> Float[Tensor, "M Q D"]:
        ids, mask = self.check_instruction(qformer_ids, qformer_mask)
        inputs = (query_embeds, image_features, ids, mask, image_index)
        tokens, _ = self._run(*inputs, causal_text=False, keep_text=False)
        return tokens.unflatten(0, (len(query_embeds), -1))

    def hidden_states(
        self,
        query_embeds: Float[Tensor, "M Q D"] | None,
        image_features: Float[Tensor, "N P V"] | None,
        qformer_ids: Int[Tensor, "M I"],
        qformer_mask: Int[Tensor, "M I"],
        image_index: Int[Tensor, " M"] | None = None,
        causal_text: bool = False,
    ) -> tuple[Float[Tensor, "M Q D"] | None, Float[Tensor, "M I D"]]:
        """As ``QFormer.hidden_states``; states of padding are those of any token."""
        self.check_text_branch()
        inputs = (query_embeds, image_features, qformer_ids, qformer_mask, image_index)
        tokens, rows = self._run(*inputs, causal_text, keep_text=True)
        states, num_queries = rows.unpack(tokens), rows.index.shape[1] - qformer_ids.shape[1]
        queries = None if query_embeds is None else states[:, :num_queries]
        return queries, states[:, num_queries:]

    def _run(
        self,
        query_embeds: Float[Tensor, "M Q D"] | None,
        image_features: Float[Tensor, "N P V"] | None,
        ids: Int[Tensor, "M I"] | None,
        mask: Int[Tensor, "M I"] | None,
        image_index: Int[Tensor, " M"] | None,
        causal_text: bool,
        keep_text: bool,
    ) -> tuple[Float[Tensor, "_ D"], Rows]:
        """Tokens behind the last layer, text among them where ``keep_text``, and their layout."""
        hidden = self.embeddings(query_embeds, ids)  # [M, Q+I, D]
        num_queries = 0 if query_embeds is None else query_embeds.shape[1]
        allowed = None if mask is None else attention_mask(mask, num_queries, causal_text)
        rows = Rows.of(hidden, num_queries, mask)
        tokens = rows.pack(hidden)  # [n, D]
        last = len(self.encoder.layer) - 1
        for depth, layer in enumerate(self.encoder.layer):
            assert isinstance(layer, QFormerLayer)
            keep = keep_text or depth < last
            tokens = run_layer(
                layer, tokens, num_queries, rows, allowed, image_features, image_index, keep
            )
        return tokens, rows


def run_layer(
    layer: QFormerLayer,
    tokens: Float[Tensor, "n D"],
    num_queries: int,
    rows: Rows,
    mask: Bool[Tensor, "M 1 _ X"] | None,
    image_features: Float[Tensor, "N P V"] | None,
    image_index: Int[Tensor, " M"] | None,
    keep_text: bool,
) -> Float[Tensor, "_ D"]:
    """All tokens to all tokens, or without ``keep_text`` to those of the M * Q queries: then the
    text gives keys and values alone."""
    count = len(rows.index) * num_queries
    if keep_text:
        attended = _attend(layer.attention, tokens, tokens, rows, mask)  # [n, D]
    else:
        queries = tokens[:count].unflatten(0, (-1, num_queries))  # [M, Q, D]
        if mask is not None and mask.shape[2] > 1:
            mask = mask[:, :, :num_queries]
        attended = _attend(layer.attention, queries, tokens, rows, mask).flatten(0, 1)
    queries, text = attended[:count], attended[count:]
    outputs = []
    if num_queries:
        queries = queries.unflatten(0, (-1, num_queries))
        outputs.append(layer.read_image(queries, image_features, image_index).flatten(0, 1))
    if len(text):
        outputs.append(layer.output(layer.intermediate(text), text))
    return torch.cat(outputs)


def _attend(
    attention: Attention,
    readers: Float[Tensor, "M Q D"] | Float[Tensor, "n D"],
    tokens: Float[Tensor, "n D"],
    rows: Rows,
    mask: Bool[Tensor, "M 1 _ X"] | None,
) -> Float[Tensor, "M Q D"] | Float[Tensor, "n D"]:
    """Self-attention and its residual; ``readers`` are all tokens, or the queries in rows."""
    inner = attention.attention
    query, key, value = inner.query(readers), inner.key(tokens), inner.value(tokens)
    key, value = rows.unpack(key), rows.unpack(value)
    if readers.ndim == 3:
        return attention.output(inner.attend(query, key, value, mask), readers)
    context = inner.attend(rows.unpack(query), key, value, mask)
    return attention.output(rows.pack(context), readers)
