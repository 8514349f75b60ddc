"""From (instruction, picture or none) to the tokens that a decoder attends to.

The generation queries go through the SAME Q-Former as the query tokens of the language model:
they read the instruction and, in every second layer, the picture. Where there is no picture they
read a learned null image. A connector then gives the tokens the width and the scale of what the
decoder was built for (compare BLIP-Diffusion, section 3.2; MetaQuery, section 3).

Two things are taken as they are best read (docs/log.md has the figures). Of the queries, what
instruction and picture change: 99 % of the energy of their states is the same for every prompt. Of
the instruction, the embeddings that the Q-Former reads: its last layer has mixed the words until
place and colour can be told from their mean in 60 % of the cases only.
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from instructblip.model.qformer import QFormer
from instructblip.text_to_image.blocks import MLP, Attention
from instructblip.text_to_image.config import ConditionerConfig

REACH = 7
"""Tokens that a convolution spans: "red circle at the top left" has six words."""


class ConnectorLayer(nn.Module):
    """A pre-norm transformer layer in which all tokens see each other, behind a convolution.

    Which colour belongs to which shape is a matter of neighbours: a short convolution tells each
    word its phrase, where attention needs thousands of steps to find it (docs/log.md).
    """

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.norm0 = nn.LayerNorm(width)
        self.convolution = nn.Conv1d(width, width, REACH, padding=REACH // 2, groups=width)
        nn.init.zeros_(self.convolution.weight)
        self.norm1, self.attention = nn.LayerNorm(width), Attention(width, num_heads)
        self.norm2, self.mlp = nn.LayerNorm(width), MLP(width)

    def forward(self, hidden: Tensor, mask: Tensor) -> Tensor:
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
        """Either may have no tokens; K is Q + I. Both are brought to a root mean square of 1."""
        seen = self.query_input(_even(queries)) + self.query_embedding[:, : queries.shape[1]]
        hidden = torch.cat([seen, self.text_input(_even(text))], dim=1)
        for layer in self.layers:
            hidden = layer(hidden, mask)
        return self.norm(self.output(nn.functional.gelu(self.hidden(hidden))))


def _even(tokens: Tensor) -> Tensor:
    """Every token at a root mean square of 1; what is zero stays so."""
    return nn.functional.rms_norm(tokens, tokens.shape[-1:], eps=1e-6)


class Conditioner(nn.Module):
    """What is learned around the Q-Former, which is passed in and never owned."""

    def __init__(self, config: ConditionerConfig, qformer: QFormer, out_width: int) -> None:
        super().__init__()
        self.config = config
        sizes = qformer.config
        self.generation_queries = nn.Parameter(
            torch.randn(1, config.num_queries, sizes.hidden_size) * sizes.initializer_range
        )
        self.null_image = nn.Parameter(torch.randn(1, 1, sizes.encoder_hidden_size))
        self.connector = Connector(config, sizes.hidden_size, out_width)

    def start_from(self, query_tokens: Float[Tensor, "1 Q D"]) -> None:
        """Begin as the query tokens of the language model, repeated where there are fewer."""
        repeats = -(-self.config.num_queries // query_tokens.shape[1])
        start = query_tokens.detach().repeat(1, repeats, 1)
        with torch.no_grad():
            self.generation_queries.copy_(start[:, : self.config.num_queries])

    def forward(
        self,
        qformer: QFormer,
        features: Float[Tensor, "N P V"] | None,
        image_index: Int[Tensor, " B"],
        qformer_ids: Int[Tensor, "B I"],
        qformer_mask: Int[Tensor, "B I"],
    ) -> tuple[Float[Tensor, "B K C"], Bool[Tensor, "B K"]]:
        """Condition and mask. ``image_index`` -1 reads the null image; a row of ``qformer_mask``
        that is all zero reads no instruction."""
        if features is None:
            features, index = self.null_image, torch.zeros_like(image_index)
        else:  # keys that are all the same weigh as one: the null image fills a picture's place
            null = self.null_image.to(features).expand(-1, features.shape[1], -1)
            index = torch.where(image_index < 0, len(features), image_index)
            features = torch.cat([features, null])
        text = qformer.embeddings(None, qformer_ids)
        seen = self._seen(qformer, features, index, qformer_ids, qformer_mask)
        if self.config.tokens == "queries":
            text, qformer_mask = text[:, :0], qformer_mask[:, :0]
        present = torch.ones(seen.shape[:2], dtype=torch.bool, device=seen.device)
        mask = torch.cat([present, qformer_mask.bool()], dim=1)
        if self.config.tokens == "text":  # attention over nothing has no value: keep [CLS]
            mask = mask | (torch.arange(mask.shape[1], device=mask.device) == 0)
        return self.connector(seen, text, mask), mask

    def _seen(
        self,
        qformer: QFormer,
        features: Float[Tensor, "N P V"],
        index: Int[Tensor, " B"],
        qformer_ids: Int[Tensor, "B I"],
        qformer_mask: Int[Tensor, "B I"],
    ) -> Float[Tensor, "B Q D"]:
        """How far instruction and picture move the queries from where nothing leaves them."""
        if self.config.tokens == "text":
            return self.generation_queries[:, :0].expand(len(index), -1, -1)
        queries = self.generation_queries.expand(len(index), -1, -1)
        moved = qformer(queries, features, qformer_ids, qformer_mask, index)
        silent = torch.zeros_like(qformer_mask[:1])
        rest = qformer(self.generation_queries, self.null_image, qformer_ids[:1], silent)
        return moved - rest
