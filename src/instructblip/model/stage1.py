"""BLIP-2's first stage: three losses that teach the Q-Former to see what a text says.

Contrast (queries and text apart), matching (both ways, with hard negatives) and grounded captions
(the text sees the queries and what stands before it; BLIP-2, section 3.2 and figure 2). The three
attention masks are those of ``QFormer.hidden_states``. The heads are thrown away afterwards.
"""

import math
import warnings

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from instructblip.core.batch import IGNORE_INDEX, Batch, LossOutput
from instructblip.model.instructblip import InstructBlip

LABEL_SMOOTHING = 0.1
"""Of the contrast, as in the official code."""


class Stage1(nn.Module):
    """Trains the Q-Former of an instruction-aware model on captions, given as ``qformer_ids``.

    ``loss`` is the sum of the three losses, each a mean. It is given times the response tokens of
    the batch, because the training loop divides by them. Negatives come from the batch of this
    process alone. ValueError for a model without a text branch.
    """

    def __init__(self, model: InstructBlip, embedding: int = 256) -> None:
        super().__init__()
        if not model.config.instruction_aware:
            raise ValueError("stage 1 trains the text branch too: load with instruction_aware=True")
        config = model.config.qformer
        self.model = model.set_trainable(("qformer",))
        model.language_projection.requires_grad_(False)
        model.qformer.requires_grad_(True)  # the last text feed-forward has a reader here
        self.image_head = nn.Linear(config.hidden_size, embedding)
        self.text_head = nn.Linear(config.hidden_size, embedding)
        self.match_head = nn.Linear(config.hidden_size, 2)
        self.word_head = nn.Linear(config.hidden_size, config.vocab_size)
        self.log_temperature = nn.Parameter(torch.tensor(math.log(0.07)))

    def loss(self, batch: Batch) -> LossOutput:
        """All three losses of the captions and the first frames of their pictures."""
        model, pictures = self.model, batch.image_index[:, 0]
        features = model.vision_model.norm(model.features_of(batch))  # [N, P, V]
        similarity = self.similarity(features, batch)
        losses = torch.stack(
            [
                contrast(similarity, pictures),
                self.match(features, batch, similarity.detach()),
                self.tell(features, batch),
            ]
        )
        tokens = batch.response_mask.long().sum(1)
        mean = losses.sum()
        return LossOutput(mean * tokens.sum(), tokens.sum(), mean.detach() * tokens, tokens)

    def similarity(self, features: Float[Tensor, "N P V"], batch: Batch) -> Float[Tensor, "B B"]:
        """Row i: the picture of sample i with the text of every sample; its best query counts."""
        model, pictures = self.model, batch.image_index[:, 0]
        none = batch.qformer_ids[:, :0]
        queries = model.query_tokens.expand(len(batch), -1, -1)
        seen = model.qformer(queries, features, none, none, pictures)
        _, text = model.qformer.hidden_states(None, None, batch.qformer_ids, batch.qformer_mask)
        images = F.normalize(self.image_head(seen), dim=-1)  # [B, Q, E]
        texts = F.normalize(self.text_head(text[:, 0]), dim=-1)  # [B, E]
        scores = torch.einsum("iqe,je->ijq", images, texts).amax(2)
        return scores / self.log_temperature.exp()

    def match(
        self, features: Float[Tensor, "N P V"], batch: Batch, similarity: Float[Tensor, "B B"]
    ) -> Tensor:
        """Does the text fit the picture? Each pair, its text with a picture that is hard to tell
        from its own, and its picture with such a text. 0 where all samples show one picture."""
        pictures = batch.image_index[:, 0]
        others = ~same_picture(pictures)
        if not others.any():
            warnings.warn(
                "a micro batch shows one picture alone and trains no matching, which needs another "
                "one; a larger training.batch_size makes that rare",
                RuntimeWarning,
                stacklevel=2,
            )
            return similarity.new_zeros(())
        weights = similarity.masked_fill(~others, -math.inf)
        hard_text = torch.multinomial(weights.softmax(1), 1)[:, 0]
        hard_picture = torch.multinomial(weights.t().softmax(1), 1)[:, 0]
        own = torch.arange(len(batch), device=pictures.device)
        index = torch.cat([pictures, pictures[hard_picture], pictures])
        text = torch.cat([own, own, hard_text])
        queries, _ = self.model.qformer.hidden_states(
            self.model.query_tokens.expand(len(index), -1, -1),
            features,
            batch.qformer_ids[text],
            batch.qformer_mask[text],
            index,
        )
        assert queries is not None
        fits = (torch.arange(len(index), device=index.device) < len(batch)).long()
        return F.cross_entropy(self.match_head(queries).mean(1), fits)

    def tell(self, features: Float[Tensor, "N P V"], batch: Batch) -> Tensor:
        """The next word of the caption; the first token stands for [DEC]."""
        ids, mask = batch.qformer_ids, batch.qformer_mask
        queries = self.model.query_tokens.expand(len(batch), -1, -1)
        _, text = self.model.qformer.hidden_states(
            queries, features, ids, mask, batch.image_index[:, 0], causal_text=True
        )
        wanted = ids[:, 1:].masked_fill(mask[:, 1:] == 0, IGNORE_INDEX)
        logits = self.word_head(text[:, :-1]).flatten(0, 1).float()
        return F.cross_entropy(logits, wanted.flatten(), ignore_index=IGNORE_INDEX)


def same_picture(pictures: Tensor) -> Bool[Tensor, "B B"]:
    """Which samples show the same picture: they are no negatives of each other."""
    return pictures[:, None] == pictures[None]


def contrast(similarity: Float[Tensor, "B B"], pictures: Tensor) -> Tensor:
    """Cross-entropy both ways; captions of one picture share the target."""
    same = same_picture(pictures).to(similarity.dtype)
    wanted = same / same.sum(1, keepdim=True)
    both = [
        F.cross_entropy(scores, wanted, label_smoothing=LABEL_SMOOTHING)
        for scores in (similarity, similarity.t())
    ]
    return (both[0] + both[1]) / 2
