"""Step 1: the language model learns to answer about pictures that stand before a question in words.

    python runs/small/reading.py START PACKAGES OUT --steps 400

START is what `combine` wrote. A LoRA adapter of its language model is trained on `described`
samples, whose words stand where the queries of an image will stand; the rest is frozen, and no
image is read. OUT is a run directory: it resumes. OUT/last is START with the adapter, which
`instructblip export` merges.
"""

import argparse
import random
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path

import torch
from described import described
from torch import nn

from instructblip.core.batch import Batch, LossOutput
from instructblip.data.samples import pad
from instructblip.data.tokens import Tokens
from instructblip.model.config import LoraConfig
from instructblip.model.instructblip import InstructBlip
from instructblip.model.language.lora import add_lora
from instructblip.scenes.pictures.catalog import read_catalog
from instructblip.scenes.pictures.world import World
from instructblip.training.config import TrainingConfig
from instructblip.training.train import train

SAMPLES = 32  # of a step


class Reading(nn.Module):
    """A model whose language model reads texts alone."""

    def __init__(self, model: InstructBlip) -> None:
        super().__init__()
        self.model = model

    def loss(self, batch: Batch) -> LossOutput:
        """The loss of the responses behind prompts without queries."""
        model = self.model
        with model.language_precision():
            width = model.language_projection.out_features
            joined = model.language.join(torch.zeros(len(batch), 0, width), batch)
            losses = model.language.loss(joined)
        of_sample = losses.new_zeros(len(batch)).index_add(0, joined.rows, losses.detach())
        tokens = batch.response_mask.long().sum(1)
        return LossOutput(losses.sum(), tokens.sum(), of_sample, tokens)


@dataclass(frozen=True)
class Described:
    """Batches that nothing but the number of their step decides, so that a run resumes."""

    world: World
    tokens: Tokens

    def iterate(self, step: int) -> Iterator[Batch]:
        return map(self.make, count(step))

    def make(self, step: int) -> Batch:
        rng = random.Random(f"described {step}")
        texts = [self.tokens.tokenize(described(self.world, rng)) for _ in range(SAMPLES)]
        none = torch.zeros(SAMPLES, 0, dtype=torch.long)
        prompt_ids, prompt_mask = pad([text.prompt_ids for text in texts])
        response_ids, response_mask = pad([text.response_ids for text in texts])
        return Batch(
            image_index=torch.full((SAMPLES, 1), -1),
            qformer_ids=none,
            qformer_mask=none,
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
    add_lora(model.language_model, LoraConfig())
    model.set_trainable(("lora",)).to_training_dtypes(torch.bfloat16, torch.bfloat16)
    config = TrainingConfig(
        steps=args.steps,
        batch_size=1,  # a batch is that of a step, whatever its size
        learning_rate=1e-3,
        warmup_steps=min(20, args.steps - 1),
        weight_decay=0.0,
        device="cpu",
        workers=0,
        validate_every=None,
        save_every=100,
        keep_last=1,
        log_every=10,
    )
    tokens = Tokens.from_pretrained(args.start)
    tokens = replace(tokens, chat_template=tokens.language.chat_template)  # as tuning will
    batches = Described(World(read_catalog(args.packages)), tokens)
    export = lambda path: model.save_pretrained(path, whole=False)  # noqa: E731
    result = train(Reading(model), batches, None, config, args.out, resume=True, export=export)
    if result.stopped != "finished":
        sys.exit("stopped: run it again to resume")


if __name__ == "__main__":
    main()
