"""A model and its data, small enough to train hundreds of steps in a test."""

from collections.abc import Iterator
from itertools import count
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from instructblip.core.batch import Batch, LossOutput
from instructblip.training.config import TrainingConfig

WIDTH, WORDS = 8, 12


class Toy(nn.Module):
    """Predicts each response token from the prompt token in front of it."""

    def __init__(self, dropout: float = 0.1, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.frozen = nn.Embedding(WORDS, WIDTH).requires_grad_(False)
        self.query_tokens = nn.Parameter(torch.randn(1, 1, WIDTH))
        self.words = nn.Embedding(2 * WORDS, WIDTH, sparse=True)  # half of them in no prompt
        self.hidden = nn.Linear(WIDTH, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(WIDTH, WORDS)

    def loss(self, batch: Batch) -> LossOutput:
        words = self.frozen(batch.prompt_ids) + self.words(batch.prompt_ids)
        hidden = torch.tanh(self.hidden(words + self.query_tokens))
        scores = self.head(self.dropout(self.norm(hidden)))  # [B, R, WORDS]
        each = nn.functional.cross_entropy(
            scores.transpose(1, 2), batch.response_ids, reduction="none"
        )
        each = each * batch.response_mask
        tokens = batch.response_mask.sum(1)
        return LossOutput(each.sum(), tokens.sum(), each.sum(1).detach(), tokens)

    def save_pretrained(self, folder: Path) -> None:
        save_file(self.state_dict(), folder / "model.safetensors")


class ToyBatches:
    """Sample i of the whole run is a function of (seed, i): splits of a step see the same ones."""

    def __init__(
        self, config: TrainingConfig, rank: int = 0, ranks: int = 1, seed: int = 3
    ) -> None:
        self.config, self.rank, self.ranks, self.seed = config, rank, ranks, seed
        self.size = config.micro_batch_size(ranks)

    def iterate(self, step: int) -> Iterator[list[Batch]]:
        return map(self.step, count(step))

    def step(self, step: int) -> list[Batch]:
        micros = (step * self.config.accumulate + i for i in range(self.config.accumulate))
        firsts = [(micro * self.ranks + self.rank) * self.size for micro in micros]
        return [toy_batch(range(first, first + self.size), self.seed) for first in firsts]


def toy_batch(indices: range, seed: int = 3, length: int = 5) -> Batch:
    prompts, responses, masks = [], [], []
    for index in indices:
        generator = torch.Generator().manual_seed(seed * 100_003 + index)
        prompt = torch.randint(WORDS, (length,), generator=generator)
        tokens = int(torch.randint(1, length + 1, (), generator=generator))
        prompts.append(prompt)
        responses.append((prompt * 5 + 1) % WORDS)
        masks.append((torch.arange(length) < tokens).long())
    empty = torch.zeros(len(indices), 0, dtype=torch.long)
    prompt_ids = torch.stack(prompts)
    return Batch(
        image_index=torch.arange(len(indices))[:, None],
        qformer_ids=empty,
        qformer_mask=empty,
        prompt_ids=prompt_ids,
        prompt_mask=torch.ones_like(prompt_ids),
        response_ids=torch.stack(responses),
        response_mask=torch.stack(masks),
        datasets=tuple(("even", "odd")[i % 2] for i in indices),
        ids=tuple(str(i) for i in indices),
    )


def toy_score(model: Toy) -> dict[str, float]:
    """Loss on fixed samples, turned round: higher is better."""
    output = model.loss(toy_batch(range(10**6, 10**6 + 32)))
    loss = float(output.loss_sum / output.num_tokens)
    return {"score": -loss, "held": loss}


def toy_config(**changes: object) -> TrainingConfig:
    values: dict[str, object] = {
        "steps": 24,
        "batch_size": 8,
        "learning_rate": 0.02,
        "warmup_steps": 4,
        "precision": "fp32",
        "device": "cpu",
        "validate_every": 8,
        "save_every": 3,
        "log_every": 5,
    }
    return TrainingConfig.model_validate(values | changes)
