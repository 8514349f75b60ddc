"""Training from what is better and worse: direct preference optimization and self-critical
sequence training. Both are modules with ``loss(batch)``, as the loop trains them."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from instructblip.core.batch import Batch, LossOutput, send
from instructblip.model.decoding import GREEDY, Decoding
from instructblip.model.inference import generate_responses
from instructblip.model.instructblip import InstructBlip

Reward = Callable[[Batch, Sequence[Sequence[int]]], list[float]]
"""The reward of a response [ids without the end token] to each sample of a batch."""


class _Objective(nn.Module):
    """An InstructBLIP without dropout: the likelihoods are those of the model that answers."""

    def __init__(self, instructblip: InstructBlip) -> None:
        super().__init__()
        self.instructblip = instructblip

    def train(self, mode: bool = True) -> "_Objective":
        return super().train(False)

    def log_likelihoods(self, queries: Float[Tensor, "B K L"], batch: Batch) -> Float[Tensor, " B"]:
        """Log-likelihood in nats of each response, its end token included."""
        losses, rows = self.instructblip.token_losses(queries, batch)
        return -losses.new_zeros(len(batch)).index_add(0, rows, losses)


class DirectPreference(_Objective):
    """DPO (Rafailov and others, 2023) on the pairs of a batch, chosen responses first.

    The loss of a pair is ``-log sigmoid(beta * margin)``, where the margin is by how much more than
    the start the model prefers the chosen response: the difference of log-likelihood ratios to
    ``batch.reference``. ``per_token`` divides each by the tokens of its response. ``rpo`` adds so
    many times the loss per token of the chosen response (Pang and others, 2024), without which its
    likelihood may fall as long as that of the rejected one falls faster.
    """

    def __init__(
        self,
        instructblip: InstructBlip,
        beta: float = 0.1,
        per_token: bool = False,
        rpo: float = 0.0,
    ) -> None:
        super().__init__(instructblip)
        self.beta, self.per_token, self.rpo = beta, per_token, rpo

    def responses(self, batch: Batch) -> Float[Tensor, " B"]:
        """Log-likelihoods of chosen and rejected responses; each pair asks the Q-Former once."""
        features = self.instructblip.features_of(batch)
        batch = replace(batch, pixel_values=None, image_features=features)
        first = torch.arange(len(batch) // 2)
        queries = self.instructblip.encode_queries(select(batch, first))
        return self.log_likelihoods(torch.cat([queries, queries]), batch)

    def loss(self, batch: Batch) -> LossOutput:
        """The loss of each pair, in the place of its chosen response."""
        assert batch.reference is not None
        tokens = batch.response_mask.sum(1)  # [B]
        likelihoods = self.responses(batch)
        ratios = likelihoods - batch.reference
        chosen, rejected = (ratios / tokens if self.per_token else ratios).chunk(2)
        margins = chosen - rejected  # [B / 2]
        losses = -logsigmoid(self.beta * margins)
        nll = -(likelihoods / tokens).chunk(2)[0]
        if self.rpo:
            losses = losses + self.rpo * nll
        terms = {"margin": margins, "preferred": (margins > 0).float(), "chosen": nll}
        return _of_samples(batch, torch.cat([losses, torch.zeros_like(losses)]), terms)


class SelfCritical(_Objective):
    """SCST (Rennie and others, 2017): REINFORCE with the reward of the greedy response as baseline.

    The loss of a sample is the mean over ``num`` sampled responses of their negative log-likelihood
    times the advantage, by how much their reward is above that of the greedy response.
    """

    def __init__(
        self,
        instructblip: InstructBlip,
        reward: Reward,
        end: int,
        sampling: Decoding,
        num: int = 4,
    ) -> None:
        super().__init__(instructblip)
        self.reward, self.end, self.num = reward, end, num
        self.sampling = sampling
        self.greedy = GREEDY.override(max_new_tokens=sampling.max_new_tokens)

    def loss(self, batch: Batch) -> LossOutput:
        queries = self.instructblip.encode_queries(batch)  # [B, K, L]
        best = self.respond(queries, batch, self.greedy)
        baseline = torch.tensor(self.reward(batch, best))
        copies = torch.arange(len(batch)).repeat_interleave(self.num)  # [B * num]
        many = select(batch, copies)
        repeated = queries[send(copies, queries.device)]
        sampled = self.respond(repeated, many, self.sampling)
        rewards = torch.tensor(self.reward(many, sampled))
        advantages = send(rewards - baseline[copies], queries.device)
        ended = [
            [*ids, self.end] if len(ids) < self.sampling.max_new_tokens else ids for ids in sampled
        ]
        likelihoods = self.log_likelihoods(repeated, with_responses(many, ended))
        losses = -(advantages * likelihoods).unflatten(0, (-1, self.num)).mean(1)  # [B]
        return _of_samples(batch, losses, {"reward": rewards, "greedy_reward": baseline})

    def respond(
        self, queries: Float[Tensor, "B K L"], batch: Batch, decoding: Decoding
    ) -> list[list[int]]:
        """Token ids of responses, without their end token."""
        ends = (self.end,)
        return generate_responses(
            self.instructblip, batch, decoding=decoding, ends=ends, queries=queries.detach()
        )


def select(batch: Batch, rows: Int[Tensor, " M"]) -> Batch:
    """The samples ``rows`` of a batch, with the same images; ``rows`` are on the CPU."""
    host = batch.host
    by_sample = (
        *("image_index", "qformer_ids", "qformer_mask", "prompt_ids", "prompt_mask"),
        *("response_ids", "response_mask", "image_places", "reference", "counts"),
    )
    chosen = {name: value[rows] for name in by_sample if (value := getattr(host, name)) is not None}
    numbers = rows.tolist()
    names = {
        "datasets": tuple(batch.datasets[i] for i in numbers) if batch.datasets else (),
        "ids": tuple(batch.ids[i] for i in numbers) if batch.ids else (),
    }
    texts = replace(host, **chosen, **names, pixel_values=None, image_features=None)
    moved = texts.to(batch.image_index.device)
    return replace(moved, pixel_values=batch.pixel_values, image_features=batch.image_features)


def with_responses(batch: Batch, responses: Sequence[Sequence[int]]) -> Batch:
    """The batch with other responses."""
    ids = [torch.tensor(row, dtype=torch.int64) for row in responses]
    masks = [torch.ones_like(row) for row in ids]
    padded, mask = (nn.utils.rnn.pad_sequence(rows, batch_first=True) for rows in (ids, masks))
    device = batch.response_ids.device
    if batch.kept is None:
        return replace(batch, response_ids=padded, response_mask=mask)
    kept = replace(batch.kept, response_ids=padded, response_mask=mask)
    moved = {"response_ids": send(padded, device), "response_mask": send(mask, device)}
    return replace(batch, **moved, kept=kept)


def _of_samples(batch: Batch, losses: Float[Tensor, " B"], terms: dict[str, Tensor]) -> LossOutput:
    counts = send(batch.sample_counts, losses.device)
    means = {name: value.detach().mean() for name, value in terms.items()}
    return LossOutput(losses.sum(), counts.sum(), losses.detach(), counts, means)
