"""Step 2: the language model learns to answer about pictures that stand before a question in words.

    python runs/small/reading.py START PACKAGES OUT --steps 400

START is what step 1 wrote. A LoRA adapter of its language model is trained on `described`
samples, whose words stand where the queries of an image will stand, one for each query; the rest
is frozen, and no image is read. OUT is a run directory: it resumes. OUT/last is START with the
adapter.
"""

import argparse
import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path

import torch
from described import described, spelled
from stage import run_stage
from torch import Tensor, nn

from instructblip.core.batch import Batch, LossOutput
from instructblip.data.samples import pad
from instructblip.data.tokens import Tokens
from instructblip.model.config import LoraConfig
from instructblip.model.instructblip import InstructBlip
from instructblip.model.lora import add_lora
from instructblip.scenes.pictures.catalog import read_catalog
from instructblip.scenes.pictures.world import World

SAMPLES = 32  # of a step
RANK = 12
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class Reading(nn.Module):
    """A model that reads the words of what a page shows where its queries will stand.

    ``Batch.qformer_ids`` are the tokens of the words. In half of the samples the words of another
    sample at the same places shine through with up to half of the weight, and every embedding gets
    noise of up to twice the size of a word: so far from words are the queries that `spelling`
    trains (a cosine of 0.5 on images that it has seen, 0.3 on others).
    """

    def __init__(self, model: InstructBlip, end: int) -> None:
        super().__init__()
        self.model, self.end = model, end
        words = model.language_model.get_input_embeddings().weight.detach().float()
        self.spread = (words - words.mean(0)).square().mean().sqrt().item()

    def words(self, ids: Tensor) -> Tensor:
        """[B, Q, L] embeddings of the words [B, Q], as training sees them."""
        words = self.model.language_model.get_input_embeddings()(ids).float()
        if self.training:
            is_word = (ids != self.end)[..., None]
            weight = torch.rand(len(ids), 1, 1) * (torch.rand(len(ids), 1, 1) < 0.5) / 2
            words = torch.lerp(words, words.roll(1, 0), weight * (is_word & is_word.roll(1, 0)))
            size = 2 * self.spread * torch.rand(len(ids), 1, 1).square()
            words = words + size * torch.randn_like(words)
        return words

    def queries(self, batch: Batch) -> Tensor:
        """[B, Q, L], what the language model reads before the prompts."""
        return self.words(batch.qformer_ids)

    def loss(self, batch: Batch) -> LossOutput:
        """The loss of the responses."""
        queries, model = self.queries(batch), self.model
        batch = replace(batch, image_index=torch.zeros_like(batch.image_index))  # all are read
        with model.language_precision():
            joined = model.language.join(queries, batch)
            losses = model.language.loss(joined)
        of_sample = losses.new_zeros(len(batch)).index_add(0, joined.rows, losses.detach())
        tokens = batch.response_mask.long().sum(1)
        return LossOutput(losses.sum(), tokens.sum(), of_sample, tokens)


@dataclass(frozen=True)
class Samples:
    """Batches that nothing but the number of their step decides, so that a run resumes."""

    world: World
    tokens: Tokens
    queries: int

    def iterate(self, step: int) -> Iterator[list[Batch]]:
        return ([self.make(number)] for number in count(step))

    def make(self, step: int) -> Batch:
        rng = random.Random(f"described {step}")
        samples = [described(self.world, rng) for _ in range(SAMPLES)]
        texts = [self.tokens.tokenize(sample.text) for sample in samples]
        words = torch.tensor([spelled(self.tokens, s.names, self.queries) for s in samples])
        prompt_ids, prompt_mask = pad([text.prompt_ids for text in texts])
        response_ids, response_mask = pad([text.response_ids for text in texts])
        return Batch(
            image_index=torch.zeros(SAMPLES, 1, dtype=torch.long),
            qformer_ids=words,
            qformer_mask=torch.ones_like(words),
            prompt_ids=prompt_ids,
            prompt_mask=prompt_mask,
            response_ids=response_ids,
            response_mask=response_mask,
            datasets=("described",) * SAMPLES,
            ids=tuple(f"{step}/{i}" for i in range(SAMPLES)),
        )


def main() -> None:
    parser = argparse.ArgumentParser()
    for name in ("start", "packages", "out"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--steps", type=int, default=400)
    args = parser.parse_args()
    torch.manual_seed(0)
    model = InstructBlip.from_pretrained(args.start)
    add_lora(model.language_model, LoraConfig(rank=RANK, targets=TARGETS))
    model.set_trainable(("lora",)).to_training_dtypes(torch.bfloat16, torch.bfloat16)
    tokens = Tokens.from_pretrained(args.start)  # without a chat format, as tuning will
    batches = Samples(World(read_catalog(args.packages)), tokens, model.config.num_query_tokens)
    export = lambda path: model.save_pretrained(path, whole=False)  # noqa: E731
    reading = Reading(model, tokens.response("a")[-1])
    run_stage(reading, batches, args.out, export, args.steps, 1e-3, warmup=20, weight_decay=0.0)


if __name__ == "__main__":
    main()
