"""BLIP-2's first stage: three losses that align the queries of the Q-Former with text.

Image-text contrast (queries and text read apart), image-text matching (both read each other, with
hard negatives) and image-grounded captions (text reads the queries and earlier text); BLIP-2,
section 3.1 and figure 2. ``QFormer.hidden_states`` has the three attention masks. The heads stay
beside the model (`retrieval.py`). ``RetrievalStage`` trains them for a model that stays as it is.
"""

import math
import warnings
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from instructblip.core.batch import IGNORE_INDEX, Batch, LossOutput
from instructblip.model.instructblip import InstructBlip
from instructblip.model.retrieval import Heads, similarity

LABEL_SMOOTHING = 0.1
"""Of the contrastive loss, as in the official code."""


class Stage1(Heads):
    """Trains the Q-Former of an instruction-aware model on captions, given as ``qformer_ids``.

    ``loss`` is the sum of the three losses. Negatives come from the batch of this process only.
    Raises ValueError for a model without a text branch.
    """

    def __init__(self, model: InstructBlip, embedding: int = 256) -> None:
        if not model.config.instruction_aware:
            raise ValueError("stage 1 trains the text branch too: load with instruction_aware=True")
        config = model.config.qformer
        super().__init__(config.hidden_size, embedding)
        self.model = model.set_trainable(("qformer",))
        model.language_projection.requires_grad_(False)
        model.qformer.requires_grad_(True)  # the last text feed-forward has a reader here
        self.word_head = nn.Linear(config.hidden_size, config.vocab_size)

    def loss(self, batch: Batch) -> LossOutput:
        """All three losses of the captions and the first frame of each sample."""
        model = self.model
        features = model.vision_model.norm(model.features_of(batch))  # [N, P, V]
        return sum_of_means(batch, self.terms(features, batch))

    def terms(self, features: Float[Tensor, "N P V"], batch: Batch) -> dict[str, Tensor]:
        """The losses by name, means over the samples."""
        same = is_same_image(batch.image_index[:, 0])
        scores = self.similarity(features, batch)
        return {
            "contrast": contrast(scores, same),
            "match": self.match(features, batch, scores.detach(), same),
            "caption": self.caption(features, batch),
        }

    def similarity(self, features: Float[Tensor, "N P V"], batch: Batch) -> Float[Tensor, "B B"]:
        """Row i: the image of sample i with the text of every sample, by the image's best query."""
        model, no_text = self.model, batch.qformer_ids[:, :0]
        queries = model.query_tokens.expand(len(batch), -1, -1)
        queries = model.qformer(queries, features, no_text, no_text, batch.image_index[:, 0])
        _, text = model.qformer.hidden_states(None, None, batch.qformer_ids, batch.qformer_mask)
        scores = similarity(self.embed_queries(queries), self.embed_text(text))
        return scores / self.log_temperature.exp()

    def match(
        self,
        features: Float[Tensor, "N P V"],
        batch: Batch,
        scores: Float[Tensor, "B B"],
        same: Bool[Tensor, "B B"],
    ) -> Float[Tensor, ""]:
        """Whether a text fits an image: each pair of the batch, its text with a similar other image
        and its image with a similar other text, drawn by their scores. 0 where all samples show
        one image."""
        images, others = batch.image_index[:, 0], ~same
        if not others.any():
            warnings.warn(
                "all samples of a micro batch show one image: it trains no matching, which needs "
                "a second one; a larger training.batch_size makes that rare",
                RuntimeWarning,
                stacklevel=2,
            )
            return scores.new_zeros(())
        weights = scores.masked_fill(~others, -math.inf)
        hard_text = torch.multinomial(weights.softmax(1), 1)[:, 0]
        hard_image = torch.multinomial(weights.t().softmax(1), 1)[:, 0]
        samples = torch.arange(len(batch), device=images.device)
        index = torch.cat([images, images[hard_image], images])
        text = torch.cat([samples, samples, hard_text])
        queries, _ = self.model.qformer.hidden_states(
            self.model.query_tokens.expand(len(index), -1, -1),
            features,
            batch.qformer_ids[text],
            batch.qformer_mask[text],
            index,
        )
        assert queries is not None
        fits = (torch.arange(len(index), device=index.device) < len(batch)).long()
        return F.cross_entropy(self.fit(queries), fits)

    def caption(self, features: Float[Tensor, "N P V"], batch: Batch) -> Float[Tensor, ""]:
        """The next token of the caption; its first token stands in for [DEC]."""
        ids, mask = batch.qformer_ids, batch.qformer_mask
        queries = self.model.query_tokens.expand(len(batch), -1, -1)
        _, text = self.model.qformer.hidden_states(
            queries, features, ids, mask, batch.image_index[:, 0], causal_text=True
        )
        labels = ids[:, 1:].masked_fill(mask[:, 1:] == 0, IGNORE_INDEX)
        logits = self.word_head(text[:, :-1]).flatten(0, 1).float()
        return F.cross_entropy(logits, labels.flatten(), ignore_index=IGNORE_INDEX)


class RetrievalStage(Stage1):
    """Trains the contrast alone, for a search engine beside a model: its Q-Former becomes a copy,
    and the model that it is stored beside answers as before.
    """

    def __init__(self, model: InstructBlip, embedding: int = 256) -> None:
        super().__init__(model, embedding)
        del self.word_head, self.match_head
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name == "query_tokens" or name.startswith("qformer."))

    def terms(self, features: Float[Tensor, "N P V"], batch: Batch) -> dict[str, Tensor]:
        """The contrast, where samples are no negatives of each other that show the same image or
        have the same caption, which then fits both."""
        ids = batch.qformer_ids.masked_fill(batch.qformer_mask == 0, -1)
        same = is_same_image(batch.image_index[:, 0]) | (ids[:, None] == ids[None]).all(2)
        return {"contrast": contrast(self.similarity(features, batch), same)}


def sum_of_means(batch: Batch, terms: Mapping[str, Tensor]) -> LossOutput:
    """The sum of losses that are means over samples, times the response tokens of the batch,
    because the training loop divides by them."""
    tokens = batch.response_mask.long().sum(1)
    mean = torch.stack([*terms.values()]).sum()
    kept = {name: value.detach() for name, value in terms.items()}
    return LossOutput(mean * tokens.sum(), tokens.sum(), mean.detach() * tokens, tokens, kept)


def is_same_image(images: Int[Tensor, " B"]) -> Bool[Tensor, "B B"]:
    """Which samples show the same image."""
    return images[:, None] == images[None]


def contrast(scores: Float[Tensor, "B B"], same: Bool[Tensor, "B B"]) -> Float[Tensor, ""]:
    """Cross-entropy from image to text and back; samples that are the ``same`` share the target."""
    target = same.to(scores.dtype)
    target = target / target.sum(1, keepdim=True)
    both = [
        F.cross_entropy(logits, target, label_smoothing=LABEL_SMOOTHING)
        for logits in (scores, scores.t())
    ]
    return (both[0] + both[1]) / 2
