"""The Q-Former: query tokens that read the picture, with the instruction at their side.

Queries come first, then the text; both share the self-attention. Every second layer the queries,
and only they, attend to the picture. Queries and text have feed-forwards of their own
(InstructBLIP, section 2.3 and figure 3; BLIP-2, section 3.1). Names of parameters are those of
transformers' InstructBlipQFormerModel; without a text branch the module is BLIP-2's Q-Former.

Between the layers stands a list of tokens without padding: the queries of all rows, then the words
of all rows. Attention alone looks at it row by row.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from instructblip.model.config import QFormerConfig
from instructblip.model.vision import ACTIVATIONS


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
        """The layout of padded rows; no mask: none of their text is padding."""
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


class MultiHeadAttention(nn.Module):
    """Attention whose keys and values come from ``width`` wide states."""

    def __init__(self, config: QFormerConfig, width: int) -> None:
        super().__init__()
        self.num_heads = config.num_attention_heads
        self.dropout = config.attention_probs_dropout_prob
        self.query = nn.Linear(config.hidden_size, config.hidden_size)
        self.key = nn.Linear(width, config.hidden_size)
        self.value = nn.Linear(width, config.hidden_size)

    def forward(
        self,
        hidden: Float[Tensor, "M X D"] | Float[Tensor, "n D"],
        states: Float[Tensor, "N Y W"] | Float[Tensor, "n W"],
        mask: Bool[Tensor, "#M 1 #X Y"] | None = None,
        index: Int[Tensor, " M"] | None = None,
        rows: Rows | None = None,
    ) -> Float[Tensor, "M X D"] | Float[Tensor, "n D"]:
        """``index`` says which of the N states each row of ``hidden`` reads; None: its own.
        ``rows`` says how ``states``, and ``hidden`` where it has two dimensions, are packed."""
        query, key, value = self.query(hidden), self.key(states), self.value(states)
        if index is not None:  # after the projection: a picture that M rows share is projected once
            key, value = key.index_select(0, index), value.index_select(0, index)
        if rows is not None:
            key, value = rows.unpack(key), rows.unpack(value)
            query = rows.unpack(query) if query.ndim == 2 else query
        query, key, value = (
            x.unflatten(2, (self.num_heads, -1)).transpose(1, 2) for x in (query, key, value)
        )
        dropout = self.dropout if self.training else 0.0
        context = F.scaled_dot_product_attention(query, key, value, mask, dropout)
        context = context.transpose(1, 2).flatten(2)
        return rows.pack(context) if rows is not None and hidden.ndim == 2 else context


class CrossAttention(MultiHeadAttention):
    """Queries that read a picture, in fewer products: a picture has more tokens than queries.

    (x K)(q)' = x (q K')': rather than project every token of the picture to keys and values, each
    head takes its queries to the width of the picture, and what they saw from there into its own.
    With H heads, Q queries, Y tokens of widths D and W that is H Q Y W + Q D W multiplications for
    the scores in place of Y W D + Q Y D, so it pays where queries are fewer than a head is wide
    (32 against 64 in the paper) and no two rows share the keys and values of one picture. In half
    precision it is left alone: fused kernels keep scores in fp32, and a product rounds them.
    """

    def forward(
        self,
        hidden: Float[Tensor, "M Q D"],
        states: Float[Tensor, "N Y W"],
        mask: Bool[Tensor, "#M 1 #Q Y"] | None = None,
        index: Int[Tensor, " M"] | None = None,
        rows: Rows | None = None,
    ) -> Float[Tensor, "M Q D"]:
        count, heads = hidden.shape[1], self.num_heads
        width = hidden.shape[2] // heads
        half = torch.is_autocast_enabled(hidden.device.type) or hidden.dtype.itemsize < 4
        if half or count >= width or index is not None or mask is not None or rows is not None:
            return super().forward(hidden, states, mask, index, rows)
        key, value = (x.weight.unflatten(0, (heads, -1)) for x in (self.key, self.value))
        query = self.query(hidden).unflatten(2, (heads, -1)) * width**-0.5
        query = query.permute(2, 0, 1, 3).flatten(1, 2)  # [heads, M*Q, D/heads]
        query = (query @ key).unflatten(1, (-1, count)).transpose(0, 1)  # [M, heads, Q, W]
        scores = query.flatten(1, 2) @ states.transpose(1, 2)  # [M, heads*Q, Y]
        shares = F.dropout(scores.softmax(-1), self.dropout, self.training)
        context = (shares @ states).unflatten(1, (heads, -1)).transpose(0, 1).flatten(1, 2)
        context = (context @ value.mT).unflatten(1, (-1, count))  # [heads, M, Q, D/heads]
        # Shares sum to one, but for dropout. The key's bias moves all scores of a query alike,
        # which softmax ignores: its slope is zero, yet there.
        total = shares.sum(2).unflatten(1, (heads, -1)).transpose(0, 1)[..., None]
        context = context + total * self.value.bias.view(heads, 1, 1, -1) + 0 * self.key.bias.sum()
        return context.permute(1, 2, 0, 3).flatten(2)


class AddNorm(nn.Module):
    """Dense layer, dropout, residual, LayerNorm: the end of each sub-layer (post-norm, as BERT)."""

    def __init__(self, config: QFormerConfig, width: int) -> None:
        super().__init__()
        self.dense = nn.Linear(width, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, hidden: Tensor, residual: Tensor) -> Tensor:
        return self.LayerNorm(self.dropout(self.dense(hidden)) + residual)


class Attention(nn.Module):
    """Attention and its residual."""

    def __init__(self, config: QFormerConfig, attention: MultiHeadAttention) -> None:
        super().__init__()
        self.attention = attention
        self.output = AddNorm(config, config.hidden_size)

    def forward(
        self,
        hidden: Tensor,
        states: Tensor,
        mask: Tensor | None = None,
        index: Tensor | None = None,
        rows: Rows | None = None,
    ) -> Tensor:
        return self.output(self.attention(hidden, states, mask, index, rows=rows), hidden)


class Intermediate(nn.Module):
    """First half of a feed-forward."""

    def __init__(self, config: QFormerConfig) -> None:
        super().__init__()
        self.activation = ACTIVATIONS[config.hidden_act]
        self.dense = nn.Linear(config.hidden_size, config.intermediate_size)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.activation(self.dense(hidden))


class QFormerLayer(nn.Module):
    """One layer: shared self-attention, then the queries' way and the text's way."""

    def __init__(self, config: QFormerConfig, depth: int, text: bool) -> None:
        super().__init__()
        self.attention = Attention(config, MultiHeadAttention(config, config.hidden_size))
        self.crossattention = (
            Attention(config, CrossAttention(config, config.encoder_hidden_size))
            if depth % config.cross_attention_frequency == 0
            else None
        )
        self.intermediate_query = Intermediate(config)
        self.output_query = AddNorm(config, config.intermediate_size)
        if text:
            self.intermediate = Intermediate(config)
            self.output = AddNorm(config, config.intermediate_size)

    def forward(
        self,
        hidden: Float[Tensor, "n D"],
        num_queries: int,
        rows: Rows,
        mask: Tensor | None,
        image_features: Tensor | None,
        image_index: Tensor | None,
        keep_text: bool = True,
    ) -> Float[Tensor, "_ D"]:
        """All tokens to all tokens, or to those of the M * Q queries when ``keep_text`` is False:
        then the text gives keys and values and nothing is computed that nobody reads."""
        count = len(rows.index) * num_queries
        read = hidden
        if not keep_text:
            read = hidden[:count].unflatten(0, (-1, num_queries))
            if mask is not None and mask.shape[2] > 1:
                mask = mask[:, :, :num_queries]
        attended = self.attention(read, hidden, mask, rows=rows)
        if not keep_text:
            attended = attended.flatten(0, 1)
        queries, text = attended[:count], attended[count:]
        outputs = []
        if num_queries:
            if self.crossattention is not None:
                assert image_features is not None
                queries = queries.unflatten(0, (-1, num_queries))
                queries = self.crossattention(queries, image_features, None, image_index)
                queries = queries.flatten(0, 1)
            outputs.append(self.output_query(self.intermediate_query(queries), queries))
        if len(text):
            outputs.append(self.output(self.intermediate(text), text))
        return torch.cat(outputs)


class QFormerEmbeddings(nn.Module):
    """Words plus positions for the text, nothing for the queries, one LayerNorm over both."""

    def __init__(self, config: QFormerConfig, text: bool) -> None:
        super().__init__()
        if text:
            self.word_embeddings = nn.Embedding(
                config.vocab_size, config.hidden_size, padding_idx=config.pad_token_id
            )
            self.position_embeddings = nn.Embedding(
                config.max_position_embeddings, config.hidden_size
            )
        self.layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(
        self,
        query_embeds: Float[Tensor, "M Q D"] | None,
        ids: Int[Tensor, "M I"] | None,
    ) -> Float[Tensor, "M _ D"]:
        parts = [] if query_embeds is None else [query_embeds]
        if ids is not None:
            longest = self.position_embeddings.num_embeddings
            if ids.shape[1] > longest:
                raise ValueError(
                    f"the instruction has {ids.shape[1]} tokens and the Q-Former reads at most "
                    f"{longest}; shorten it or truncate it when tokenising"
                )
            parts.append(
                self.word_embeddings(ids) + self.position_embeddings.weight[: ids.shape[1]]
            )
        return self.dropout(self.layernorm(torch.cat(parts, dim=1)))


class QFormerEncoder(nn.Module):
    """The stack of layers; a module of its own only for the sake of parameter names."""

    def __init__(self, config: QFormerConfig, text: bool) -> None:
        super().__init__()
        self.layer = nn.ModuleList(
            QFormerLayer(config, depth, text) for depth in range(config.num_hidden_layers)
        )


class QFormer(nn.Module):
    """Query tokens and an instruction in, what the queries saw in the picture out.

    ``text=False`` builds no text branch: the Q-Former of BLIP-2, which ignores the instruction.
    """

    def __init__(self, config: QFormerConfig, text: bool = True) -> None:
        super().__init__()
        self.config = config
        self.text = text
        self.embeddings = QFormerEmbeddings(config, text)
        self.encoder = QFormerEncoder(config, text)
        self.apply(self._init_weights)

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=self.config.initializer_range)
        if isinstance(module, nn.Linear):
            nn.init.zeros_(module.bias)
        if isinstance(module, nn.Embedding) and module.padding_idx is not None:
            with torch.no_grad():
                module.weight[module.padding_idx].zero_()

    def forward(
        self,
        query_embeds: Float[Tensor, "M Q D"],
        image_features: Float[Tensor, "N P V"],
        qformer_ids: Int[Tensor, "M I"] | None = None,
        qformer_mask: Int[Tensor, "M I"] | None = None,
        image_index: Int[Tensor, " M"] | None = None,
    ) -> Float[Tensor, "M Q D"]:
        """What the language model reads. ``image_index`` names the picture of each row (None: row
        i reads picture i); the instruction is ignored where there is no text branch."""
        queries, _ = self._run(
            query_embeds, image_features, qformer_ids, qformer_mask, image_index, False, False
        )
        assert queries is not None
        return queries

    def hidden_states(
        self,
        query_embeds: Float[Tensor, "M Q D"] | None,
        image_features: Float[Tensor, "N P V"] | None,
        qformer_ids: Int[Tensor, "M I"],
        qformer_mask: Int[Tensor, "M I"],
        image_index: Int[Tensor, " M"] | None = None,
        causal_text: bool = False,
    ) -> tuple[Float[Tensor, "M Q D"] | None, Float[Tensor, "M I D"]]:
        """Last hidden states of queries and text, for BLIP-2's first stage (section 3.1).

        No queries (None, with no picture): text alone, for the contrastive loss. ``causal_text``:
        text sees all queries and earlier text, queries see no text, for grounded captioning.
        """
        queries, text = self._run(
            query_embeds, image_features, qformer_ids, qformer_mask, image_index, causal_text, True
        )
        assert text is not None
        return queries, text

    def _run(
        self,
        query_embeds: Tensor | None,
        image_features: Tensor | None,
        ids: Tensor | None,
        mask: Tensor | None,
        image_index: Tensor | None,
        causal_text: bool,
        keep_text: bool,
    ) -> tuple[Tensor | None, Tensor | None]:
        if not self.text:
            if keep_text:
                raise ValueError("this Q-Former has no text branch; load it with instruction_aware")
            ids = mask = None
        elif ids is None:
            raise ValueError("an instruction-aware Q-Former needs qformer_ids and qformer_mask")
        hidden = self.embeddings(query_embeds, ids)  # [M, Q+I, D]
        num_queries = 0 if query_embeds is None else query_embeds.shape[1]
        allowed = None if mask is None else _attention_mask(mask, num_queries, causal_text)
        rows = Rows.of(hidden, num_queries, mask)
        tokens = rows.pack(hidden)
        last = len(self.encoder.layer) - 1
        for depth, layer in enumerate(self.encoder.layer):
            keep = keep_text or depth < last
            tokens = layer(tokens, num_queries, rows, allowed, image_features, image_index, keep)
        queries = None
        if num_queries:
            queries = tokens[: len(hidden) * num_queries].unflatten(0, (-1, num_queries))
        return queries, rows.unpack(tokens)[:, num_queries:] if keep_text else None


def _attention_mask(
    text_mask: Int[Tensor, "M I"], num_queries: int, causal_text: bool
) -> Bool[Tensor, "M 1 _ X"]:
    """Who sees whom; rows look at columns. With two queries and three tokens, the last one padding:

    both ways   q q t t .      causal text   q q . . .   (each query)
                (every row)                  q q t . .   (first token)
                                             q q t t .   (second token)
    """
    rows, length = text_mask.shape
    queries = text_mask.new_ones(rows, num_queries, dtype=torch.bool)
    columns = torch.cat([queries, text_mask.bool()], dim=1)[:, None, None, :]  # [M, 1, 1, Q+I]
    if not causal_text:
        return columns
    total = num_queries + length
    order = torch.ones(total, total, dtype=torch.bool, device=text_mask.device).tril()
    order[:num_queries, :num_queries] = True
    return columns & order
