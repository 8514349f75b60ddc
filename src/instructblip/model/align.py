"""The stage between BLIP-2's two: queries that spell a text in the language model's words.

Query i is trained to be nearest to the word embedding of token i of the text, and those that are
left to that of the end token. The language model then reads queries much as it reads the text, and
no layer of it has to run: a step costs a small part of one of stage 2.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from instructblip.core.batch import Batch, LossOutput
from instructblip.model.instructblip import InstructBlip
from instructblip.model.stage1 import is_same_image, sum_of_means

CONTRAST_WEIGHT, END_WEIGHT, LENGTH_WEIGHT = 0.2, 0.2, 0.1
"""Of the terms beside the spelling of words."""


class Align(nn.Module):
    """Trains query tokens, Q-Former and projection of a model on its responses as texts.

    Words and negatives come from the batch of this process only: a query tells its token from the
    other tokens of the batch. The Q-Former reads the batch's instructions, where it has any.
    """

    mean: Tensor

    def __init__(self, model: InstructBlip) -> None:
        super().__init__()
        self.model = model
        self.log_temperature = nn.Parameter(torch.tensor(math.log(0.07)))
        with torch.no_grad():  # what all words share distinguishes none of them
            words = self.embedding(torch.arange(self.embedding.num_embeddings)).float()
            mean = words.mean(0)
            self.register_buffer("mean", mean, persistent=False)  # [L]
            self.length = (words - mean).norm(dim=-1).mean().item()

    @property
    def embedding(self) -> Any:
        """The language model's table of words."""
        return self.model.language_model.get_input_embeddings()

    def loss(self, batch: Batch) -> LossOutput:
        """All terms for the responses and the first frame of each sample.

        ``spelling`` is the cross-entropy of the word at each query, ``end`` that of the end token
        at the others, ``contrast`` that of whole texts; ``length`` keeps the queries as long as
        words, which none of them sees.
        """
        model, index = self.model, batch.image_index[:, 0]
        features = model.features_of(batch)  # [N, P, V]
        texts = batch.qformer_ids, batch.qformer_mask
        queries = model.project_queries(model.query_image(features, *texts, index))
        queries = queries.float() - self.mean  # [B, Q, L]
        end = end_token(batch)
        words, targets = self.spelling(batch, queries.shape[1], end)  # [W], [B, Q]
        likelihood = self.scores(queries, words).log_softmax(2)  # [B, Q, W]
        spelled = -likelihood.gather(2, targets[:, :, None])[:, :, 0]  # [B, Q]
        lengths = queries.norm(dim=2) / self.length  # [B, Q]
        is_end = words[targets] == end
        places = torch.arange(targets.shape[1], device=targets.device)
        of_texts = likelihood[:, places, targets].sum(2)  # [B, B], of each text for each image
        same = is_same_image(index) | is_same_text(batch)
        return sum_of_means(
            batch,
            {
                "spelling": spelled[~is_end].sum() / (~is_end).sum().clamp(min=1),
                "end": END_WEIGHT * spelled[is_end].sum() / is_end.sum().clamp(min=1),
                "contrast": CONTRAST_WEIGHT * contrast(of_texts, same),
                "length": LENGTH_WEIGHT * (lengths - 1).square().mean(),
            },
        )

    def scores(
        self, queries: Float[Tensor, "B Q L"], words: Int[Tensor, " W"]
    ) -> Float[Tensor, "B Q W"]:
        """The logits of tokens at each query, whose mean word is taken off."""
        table = F.normalize(self.embedding(words).float() - self.mean, dim=-1)
        return F.normalize(queries, dim=-1) @ table.T / self.log_temperature.exp()

    def spelling(
        self, batch: Batch, queries: int, end: int
    ) -> tuple[Int[Tensor, " W"], Int[Tensor, "B Q"]]:
        """The tokens of the batch's texts, and which of them each query stands for."""
        ids = batch.response_ids.masked_fill(batch.response_mask == 0, end)
        ids = F.pad(ids, (0, queries), value=end)[:, :queries]
        words, targets = ids.unique(return_inverse=True)
        return words, targets


def end_token(batch: Batch) -> int:
    """The token that ends every response."""
    return int(batch.response_ids[0, int(batch.response_mask[0].sum()) - 1])


def is_same_text(batch: Batch) -> Bool[Tensor, "B B"]:
    """Which samples have the same response: they are no negatives of each other."""
    ids = batch.response_ids.masked_fill(batch.response_mask == 0, -1)
    return (ids[:, None] == ids[None]).all(2)


def contrast(scores: Float[Tensor, "B B"], same: Bool[Tensor, "B B"]) -> Float[Tensor, ""]:
    """Cross-entropy from image to text and back, where each sample is the one positive of itself
    and the other samples that are the ``same`` are left out."""
    samples = torch.arange(len(scores), device=scores.device)
    others = same & (samples[:, None] != samples[None])
    scores = scores.masked_fill(others, -math.inf)
    return (F.cross_entropy(scores, samples) + F.cross_entropy(scores.t(), samples)) / 2
