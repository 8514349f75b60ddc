"""From (instruction, image or none) to the tokens that a decoder attends to.

The generation queries go through the SAME Q-Former as the query tokens of the language model:
they read the instruction and, in every second layer, the image. Without an image they read a
learned null image. A connector then gives the tokens the width and the scale that the decoder was
built for (compare BLIP-Diffusion, section 3.2; MetaQuery, section 3).

The connector reads two kinds of tokens, each in the form that carries most (docs/log.md has the
figures). Of the queries, the change that instruction and image cause: 99 % of the energy of their
states is the same for every prompt. Of the instruction, the embeddings that enter the Q-Former: its
last layer mixes the words so far that their mean gives place and colour in only 60 % of the cases.
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from instructblip.model.qformer import QFormer
from instructblip.text_to_image.blocks import MLP, Attention
from instructblip.text_to_image.config import ConditionerConfig

KERNEL = 7
"""Tokens that a convolution spans: "red circle at the top left" has six words."""


class ConnectorLayer(nn.Module):
    """A depthwise convolution, then a pre-norm transformer layer without a causal mask.

    Which colour belongs to which shape depends on neighbours: a short convolution gives each word
    its phrase, which attention alone needs thousands of steps to learn (docs/log.md).
    """

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.norm0 = nn.LayerNorm(width)
        self.convolution = nn.Conv1d(width, width, KERNEL, padding=KERNEL // 2, groups=width)
        nn.init.zeros_(self.convolution.weight)
        self.norm1, self.attention = nn.LayerNorm(width), Attention(width, num_heads)
        self.norm2, self.mlp = nn.LayerNorm(width), MLP(width)

    def forward(
        self, hidden: Float[Tensor, "B K W"], mask: Bool[Tensor, "B K"]
    ) -> Float[Tensor, "B K W"]:
        words = self.norm0(hidden) * mask[:, :, None]
        hidden = hidden + self.convolution(words.mT).mT
        hidden = hidden + self.attention(self.norm1(hidden), mask=mask)
        return hidden + self.mlp(self.norm2(hidden))


class Connector(nn.Module):
    """Tokens of the Q-Former -> tokens of width C whose root mean square is ``config.gain``."""

    def __init__(self, config: ConditionerConfig, qformer_width: int, out_width: int) -> None:
        super().__init__()
        self.query_input = nn.Linear(qformer_width, config.width)
        self.text_input = nn.Linear(qformer_width, config.width)
        self.query_embedding = nn.Parameter(torch.randn(1, config.num_queries, config.width) / 2)
        self.layers = nn.ModuleList(
            ConnectorLayer(config.width, config.num_heads) for _ in range(config.num_layers)
        )
        self.hidden = nn.Linear(config.width, config.width)
        self.output = nn.Linear(config.width, out_width)
        self.norm = nn.RMSNorm(out_width, eps=1e-6)
        nn.init.constant_(self.norm.weight, config.gain)

    def forward(
        self,
        queries: Float[Tensor, "B Q D"],
        text: Float[Tensor, "B I D"],
        mask: Bool[Tensor, "B K"],
    ) -> Float[Tensor, "B K C"]:
        """Normalizes both inputs to a root mean square of 1. Either may be empty; K = Q + I."""
        queries, text = (nn.functional.rms_norm(x, x.shape[-1:], eps=1e-6) for x in (queries, text))
        queries = self.query_input(queries) + self.query_embedding[:, : queries.shape[1]]
        hidden = torch.cat([queries, self.text_input(text)], dim=1)
        for layer in self.layers:
            hidden = layer(hidden, mask)
        return self.norm(self.output(nn.functional.gelu(self.hidden(hidden))))


class Conditioner(nn.Module):
    """What is learned around the Q-Former. The Q-Former itself is an argument, not a submodule.

    The generation queries start as the language model's ``query_tokens``, repeated as needed.
    """

    def __init__(
        self,
        config: ConditionerConfig,
        qformer: QFormer,
        query_tokens: Float[Tensor, "1 _ D"],
        out_width: int,
    ) -> None:
        super().__init__()
        self.config = config
        sizes = qformer.config
        self.generation_queries = nn.Parameter(
            torch.randn(1, config.num_queries, sizes.hidden_size) * sizes.initializer_range
        )
        self.null_image = nn.Parameter(torch.randn(1, 1, sizes.encoder_hidden_size))
        self.connector = Connector(config, sizes.hidden_size, out_width)
        repeats = -(-config.num_queries // query_tokens.shape[1])
        start = query_tokens.detach().repeat(1, repeats, 1)
        with torch.no_grad():
            self.generation_queries.copy_(start[:, : config.num_queries])

    def forward(
        self,
        qformer: QFormer,
        features: Float[Tensor, "N P V"] | None,
        image_index: Int[Tensor, " B"],
        qformer_ids: Int[Tensor, "B I"],
        qformer_mask: Int[Tensor, "B I"],
    ) -> tuple[Float[Tensor, "B K C"], Bool[Tensor, "B K"]]:
        """Condition and mask. A row with ``image_index`` -1 reads the null image; a row whose
        ``qformer_mask`` is all zero reads no instruction."""
        if features is None:
            features, index = self.null_image, torch.zeros_like(image_index)
        else:  # attention over equal keys is attention over one: repeat the null image P times
            null = self.null_image.to(features).expand(-1, features.shape[1], -1)
            index = torch.where(image_index < 0, len(features), image_index)
            features = torch.cat([features, null])
        text = qformer.embeddings(None, qformer_ids)
        queries = self._queries(qformer, features, index, qformer_ids, qformer_mask)
        if self.config.tokens == "queries":
            text, qformer_mask = text[:, :0], qformer_mask[:, :0]
        present = torch.ones(queries.shape[:2], dtype=torch.bool, device=queries.device)
        mask = torch.cat([present, qformer_mask.bool()], dim=1)
        if self.config.tokens == "text":  # attention over no key is undefined: keep [CLS]
            mask = mask | (torch.arange(mask.shape[1], device=mask.device) == 0)
        return self.connector(queries, text, mask), mask

    def _queries(
        self,
        qformer: QFormer,
        features: Float[Tensor, "M P V"],
        index: Int[Tensor, " B"],
        qformer_ids: Int[Tensor, "B I"],
        qformer_mask: Int[Tensor, "B I"],
    ) -> Float[Tensor, "B Q D"]:
        """The queries' states minus their states without instruction and image."""
        if self.config.tokens == "text":
            return self.generation_queries[:, :0].expand(len(index), -1, -1)
        queries = self.generation_queries.expand(len(index), -1, -1)
        states = qformer(queries, features, qformer_ids, qformer_mask, index)
        no_text = torch.zeros_like(qformer_mask[:1])
        return states - qformer(self.generation_queries, self.null_image, qformer_ids[:1], no_text)
