"""Step 3: stage 2 of BLIP-2 on the dense world, as prefix language modelling.

    python runs/dense/completions.py OUT --vision RUN --start RUN --steps 800

The frozen language model reads the queries and the beginning of a phrase about one thing, and has
to write its end (BLIP-2, section 3.2). In half of the samples the Q-Former reads the beginning,
too, and in the other half nothing, so that the start is that of both kinds of Q-Former. No question
is asked. OUT is a run directory: it resumes.
"""

import argparse
import random
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from hidden_words import BANK, QUERIES, Bank, load_trained, opened, save_trained, start
from lessons import Lesson, teach
from qformer import Text, pad, text_batch
from torch import Tensor, nn

from instructblip.core.batch import LossOutput
from instructblip.core.files import write_json
from instructblip.data.tokens import Tokens
from instructblip.model.instructblip import InstructBlip
from instructblip.scenes.dense import DenseScene, Item
from instructblip.scenes.language import a

IMAGES, PHRASES_OF_EACH = 32, 3
"""Of a step."""
RATE = 2e-3


def endings(item: Item) -> list[tuple[str, str]]:
    """Beginnings and ends of phrases about a thing."""
    return [
        (f"the shape in {item.place} is", item.colour),
        (f"in {item.place} there is a {item.colour}", item.shape),
        (f"in {item.place} there is", a(item.look)),
        (f"the size in {item.place} is", item.size),
        (f"the digit in {item.place} is", item.digit),
        (f"the digit on the {item.look} is", item.digit),
        (f"the size of the {item.look} is", item.size),
        (f"the {item.look} is in row", str(item.row + 1)),
        (f"the {item.look} is in column", str(item.column + 1)),
    ]


@dataclass(frozen=True)
class Completions:
    """Beginnings, for both readers, and ends."""

    read: Text
    """[M, I] what the Q-Former reads; all padding where it reads nothing."""
    prompt: Text
    response: Text
    images: Tensor
    """[M] the image of each."""


def complete(
    tokens: Tokens, scenes: list[DenseScene], number: int, rng: random.Random, read: float
) -> Completions:
    """``number`` phrases about things of each scene, a share ``read`` of them for the Q-Former."""
    pairs = [
        rng.choice(endings(rng.choice(scene.items))) for scene in scenes for _ in range(number)
    ]
    begun = [opened(beginning, rng) for beginning, _ in pairs]
    begun = tokens.qformer(begun, padding=True, return_tensors="pt")  # type: ignore[misc]
    reads = torch.tensor([rng.random() < read for _ in pairs])[:, None]
    return Completions(
        (begun["input_ids"], begun["attention_mask"] * reads),
        pad([tokens.prompt(p[0]) for p in pairs]),
        pad([tokens.response(p[1]) for p in pairs]),
        torch.arange(len(scenes)).repeat_interleave(number),
    )


class Completing(nn.Module):
    """The language model's loss on the ends; queries, Q-Former and projection train."""

    def __init__(self, model: InstructBlip) -> None:
        super().__init__()
        self.model = model.set_trainable(("qformer",))

    def losses(self, features: Tensor, texts: Completions, queries: int) -> tuple[Tensor, Tensor]:
        """-> the loss of each token [m], and whether the Q-Former read its beginning [m]."""
        tokens = self.model.query_tokens[:, :queries].expand(len(texts.images), -1, -1)
        seen = self.model.qformer(tokens, features, *texts.read, texts.images)
        batch = text_batch(len(tokens), prompt=texts.prompt, response=texts.response)
        joined = self.model.language.join(self.model.project_queries(seen), batch)
        rows = texts.response[1].nonzero()[:, 0]
        return self.model.language.loss(joined), texts.read[1].any(1)[rows]

    def loss(self, lesson: Lesson) -> LossOutput:
        """A lesson's content are features, texts and a number of queries."""
        losses, reads = self.losses(*lesson.content)
        terms = {"read": losses[reads].detach().mean(), "not read": losses[~reads].detach().mean()}
        return lesson.mean_loss(losses.mean())._replace(terms=terms)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--vision", type=Path, required=True)
    parser.add_argument("--start", type=Path, required=True, help="the run of step 2")
    parser.add_argument("--steps", type=int, default=800)
    args = parser.parse_args()
    model, tokens = start(args.vision, args.start)
    load_trained(model, args.start)
    training = Completing(model)
    bank = Bank.of(model, "training", BANK)

    def make(step: int) -> Lesson:
        rng = random.Random(f"completions {step}")
        drawn = rng.sample(range(BANK), IMAGES)
        texts = complete(tokens, [bank.scenes[i] for i in drawn], PHRASES_OF_EACH, rng, 0.5)
        content = (bank.features[drawn].float(), texts, rng.choice(QUERIES))
        return Lesson.of("dense", step, content, torch.ones(IMAGES, 1, dtype=torch.long))

    if not teach(training, make, args.out, args.steps, RATE, partial(save_trained, training)):
        sys.exit("stopped: run it again to resume")
    fresh = Bank.of(model, "fresh", 256, full=True)
    scores = {}
    with torch.inference_mode():
        for queries in QUERIES:
            texts = complete(tokens, fresh.scenes, 4, random.Random("completions"), 1.0)
            losses, _ = training.losses(fresh.features.float(), texts, queries)
            scores[queries] = round(losses.mean().item(), 3)
    write_json(args.out / "losses.json", scores)
    print("nats of an end in full images, by queries:", scores)


if __name__ == "__main__":
    main()
