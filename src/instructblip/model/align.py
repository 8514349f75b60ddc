"""The stage between BLIP-2's two: queries that speak the language model's word embeddings.

Each projected query is compared with the words of a text in the language model's own embedding
table, which no layer of the language model has to read: a step costs a small part of one of stage
2, and stage 2 then starts from queries that are words. The similarity of an image and a text is
that of its best query, as in stage 1 (`stage1`).
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from instructblip.core.batch import Batch, LossOutput
from instructblip.model.instructblip import InstructBlip
from instructblip.model.stage1 import is_same_image, sum_of_means

LENGTH_WEIGHT = 0.1
"""Of the term that keeps the queries as long as words, which the contrast does not see."""


class Align(nn.Module):
    """Trains query tokens, Q-Former and projection of a model on its responses as texts.

    ``loss`` is a contrast of the images and texts of a batch plus a term for the length of the
    queries. Negatives come from the batch of this process only. The Q-Former reads no instruction.
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
        """Both terms for the responses and the first frame of each sample."""
        model, no_text = self.model, batch.qformer_ids[:, :0]
        features = model.features_of(batch)  # [N, P, V]
        index = batch.image_index[:, 0]
        queries = model.project_queries(model.query_image(features, no_text, no_text, index))
        queries = queries.float() - self.mean  # [B, Q, L]
        lengths = queries.norm(dim=-1) / self.length  # [B, Q]
        best = torch.einsum("iqe,je->ijq", F.normalize(queries, dim=-1), self.phrases(batch)).amax(
            2
        )
        scores = best / self.log_temperature.exp()
        return sum_of_means(
            batch,
            {
                "contrast": contrast(scores, is_same_image(index) | is_same_text(batch)),
                "length": LENGTH_WEIGHT * (lengths - 1).square().mean(),
            },
        )

    @torch.no_grad()
    def phrases(self, batch: Batch) -> Float[Tensor, "B L"]:
        """The direction of the mean word of each response, its end token left out."""
        words = self.embedding(batch.response_ids).float() - self.mean  # [B, R, L]
        mask = batch.response_mask.clone()
        mask[torch.arange(len(batch)), mask.sum(1) - 1] = 0  # rows are padded on the right
        return F.normalize((words * mask[..., None]).sum(1), dim=-1)


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
