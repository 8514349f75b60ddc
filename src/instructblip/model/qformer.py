"""The Q-Former: query tokens that read the image, beside the instruction.

Queries come first, then the text; both share the self-attention. In every second layer the queries,
and only they, attend to the image. Queries and text have separate feed-forwards (InstructBLIP,
section 2.3 and figure 3; BLIP-2, section 3.1). Parameter names are those of transformers'
InstructBlipQFormerModel; without a text branch the module is BLIP-2's Q-Former. ``InstructBlip``
runs the faster twin in ``fast.py``.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from instructblip.model.config import QFormerConfig
from instructblip.model.vision import ACTIVATIONS


class MultiHeadAttention(nn.Module):
    """Attention whose keys and values come from states of width ``width``."""

    def __init__(self, config: QFormerConfig, width: int) -> None:
        super().__init__()
        self.num_heads = config.num_attention_heads
        self.dropout = config.attention_probs_dropout_prob
        self.query = nn.Linear(config.hidden_size, config.hidden_size)
        self.key = nn.Linear(width, config.hidden_size)
        self.value = nn.Linear(width, config.hidden_size)

    def forward(
        self,
        hidden: Float[Tensor, "M X D"],
        states: Float[Tensor, "N Y W"],
        mask: Bool[Tensor, "M 1 _ Y"] | None = None,
        index: Int[Tensor, " M"] | None = None,
    ) -> Float[Tensor, "M X D"]:
        """``index`` names which of the N states each row of ``hidden`` reads (None: row i reads
        states i). ``mask`` is True where a row (or each of its X positions) may look."""
        query, key, value = self.query(hidden), self.key(states), self.value(states)
        if index is not None:  # after the projection: an image that M rows share is projected once
            key, value = key.index_select(0, index), value.index_select(0, index)
        return self.attend(query, key, value, mask)

    def attend(
        self,
        query: Float[Tensor, "M X D"],
        key: Float[Tensor, "M Y D"],
        value: Float[Tensor, "M Y D"],
        mask: Bool[Tensor, "M 1 _ Y"] | None,
    ) -> Float[Tensor, "M X D"]:
        """softmax(query key' / sqrt(D / heads)) value, head by head."""
        query, key, value = (
            x.unflatten(2, (self.num_heads, -1)).transpose(1, 2) for x in (query, key, value)
        )  # [M, heads, _, D/heads]
        dropout = self.dropout if self.training else 0.0
        context = F.scaled_dot_product_attention(query, key, value, mask, dropout)
        return context.transpose(1, 2).flatten(2)


class AddNorm(nn.Module):
    """Dense layer, dropout, residual, LayerNorm: the end of each sub-layer (post-norm, as BERT)."""

    def __init__(self, config: QFormerConfig, width: int) -> None:
        super().__init__()
        self.dense = nn.Linear(width, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(
        self, hidden: Float[Tensor, "*rows W"], residual: Float[Tensor, "*rows D"]
    ) -> Float[Tensor, "*rows D"]:
        return self.LayerNorm(self.dropout(self.dense(hidden)) + residual)


class Attention(nn.Module):
    """Attention to states of width ``width``, and its residual."""

    def __init__(self, config: QFormerConfig, width: int) -> None:
        super().__init__()
        self.attention = MultiHeadAttention(config, width)
        self.output = AddNorm(config, config.hidden_size)

    def forward(
        self,
        hidden: Float[Tensor, "M X D"],
        states: Float[Tensor, "N Y W"],
        mask: Bool[Tensor, "M 1 _ Y"] | None = None,
        index: Int[Tensor, " M"] | None = None,
    ) -> Float[Tensor, "M X D"]:
        return self.output(self.attention(hidden, states, mask, index), hidden)


class Intermediate(nn.Module):
    """First half of a feed-forward."""

    def __init__(self, config: QFormerConfig) -> None:
        super().__init__()
        self.activation = ACTIVATIONS[config.hidden_act]
        self.dense = nn.Linear(config.hidden_size, config.intermediate_size)

    def forward(self, hidden: Float[Tensor, "*rows D"]) -> Float[Tensor, "*rows W"]:
        return self.activation(self.dense(hidden))


class QFormerLayer(nn.Module):
    """Self-attention of queries and text, then cross-attention and a feed-forward for the queries
    and another feed-forward for the text."""

    def __init__(self, config: QFormerConfig, depth: int, text: bool) -> None:
        super().__init__()
        self.attention = Attention(config, config.hidden_size)
        self.crossattention = (
            Attention(config, config.encoder_hidden_size)
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
        hidden: Float[Tensor, "M X D"],
        num_queries: int,
        mask: Bool[Tensor, "M 1 _ X"] | None,
        image_features: Float[Tensor, "N P V"] | None,
        image_index: Int[Tensor, " M"] | None,
    ) -> Float[Tensor, "M X D"]:
        hidden = self.attention(hidden, hidden, mask)  # [M, Q+I, D]
        queries, text = hidden[:, :num_queries], hidden[:, num_queries:]
        if queries.shape[1]:
            if self.crossattention is not None:
                queries = self.crossattention(queries, image_features, None, image_index)
            queries = self.output_query(self.intermediate_query(queries), queries)
        if text.shape[1]:
            text = self.output(self.intermediate(text), text)
        return torch.cat([queries, text], dim=1)


class QFormerEmbeddings(nn.Module):
    """Words plus positions for the text, queries as they are, one LayerNorm over both."""

    def __init__(self, config: QFormerConfig, text: bool) -> None:
        super().__init__()
        self.text = text
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
        self, query_embeds: Float[Tensor, "M Q D"] | None, ids: Int[Tensor, "M I"] | None
    ) -> Float[Tensor, "M _ D"]:
        parts = [] if query_embeds is None else [query_embeds]
        if ids is not None:
            if not self.text:
                raise ValueError("this Q-Former has no text branch; load it with instruction_aware")
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
    """The stack of layers; a separate module for the sake of parameter names only."""

    def __init__(self, config: QFormerConfig, text: bool) -> None:
        super().__init__()
        self.layer = nn.ModuleList(
            QFormerLayer(config, depth, text) for depth in range(config.num_hidden_layers)
        )


class QFormer(nn.Module):
    """Query tokens and an instruction in, what the queries read in the image out.

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
        """Last hidden states of the queries. ``image_index`` names the image of each row (None: row
        i reads image i); without a mask no text is padding. Without a text branch the instruction
        is ignored."""
        if not self.text:
            qformer_ids = qformer_mask = None
        elif qformer_ids is None:
            raise ValueError("an instruction-aware Q-Former needs qformer_ids and qformer_mask")
        inputs = (query_embeds, image_features, qformer_ids, qformer_mask, image_index)
        queries, _ = self.hidden_states(*inputs, keep_text=False)
        assert queries is not None
        return queries

    def hidden_states(
        self,
        query_embeds: Float[Tensor, "M Q D"] | None,
        image_features: Float[Tensor, "N P V"] | None,
        qformer_ids: Int[Tensor, "M I"] | None,
        qformer_mask: Int[Tensor, "M I"] | None,
        image_index: Int[Tensor, " M"] | None = None,
        causal_text: bool = False,
        keep_text: bool = True,
    ) -> tuple[Float[Tensor, "M Q D"] | None, Float[Tensor, "M _ D"]]:
        """Last hidden states of queries and text, as BLIP-2's first stage reads them (section 3.1).

        Without queries (None, with no image) text reads text alone, for the contrastive loss. With
        ``causal_text`` text reads all queries and earlier text, and queries read no text, for
        image-grounded captions. Without ``keep_text`` the states of the text are empty [M, 0, D].
        Raises ValueError for an instruction that a Q-Former without a text branch cannot read.
        """
        hidden = self.embeddings(query_embeds, qformer_ids)  # [M, Q+I, D]
        count = 0 if query_embeds is None else query_embeds.shape[1]
        mask = None if qformer_mask is None else attention_mask(qformer_mask, count, causal_text)
        for layer in self.encoder.layer:
            hidden = layer(hidden, count, mask, image_features, image_index)
        queries = None if query_embeds is None else hidden[:, :count]
        return queries, hidden[:, count:] if keep_text else hidden[:, :0]


def attention_mask(
    text_mask: Int[Tensor, "M I"], num_queries: int, causal_text: bool
) -> Bool[Tensor, "M 1 _ X"]:
    """Which columns each row may read. With two queries and three tokens, the last one padding:

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
