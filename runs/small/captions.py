"""Step 3, stage 2: the queries learn what the language model reads of them.

    python runs/small/captions.py START PACKAGES OUT --features FILE --steps 560

START is the model with the adapter of step 2 merged. Its projection is solved first, so that the
squared distance of queries from the words they spell is least. Q-Former and projection then train
on names of single images and captions of pages, through the frozen language model; the Q-Former
reads no text.
FILE is that of step 1. OUT is a run directory: it resumes. OUT/last is a BLIP-2.
"""

import argparse
import random
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import torch
from described import page_of, spelled
from spelling import Features, augmented, read_features
from stage import run_stage

from instructblip.core.batch import Batch
from instructblip.data.samples import pad
from instructblip.data.tokens import Tokens
from instructblip.experiment.pretrain import save_blip2
from instructblip.model.instructblip import InstructBlip
from instructblip.model.trainable import ALIASES
from instructblip.scenes.pictures.world import named, page_captions

SAMPLES, PAGES_OF_STEP = 64, 12
PROMPTS = (
    "",
    "a picture of",
    "Question: what is this? Short answer:",
    "what is in the picture?",
)


@dataclass(frozen=True)
class Captions:
    """Batches that nothing but the number of their step decides, so that a run resumes."""

    features: Features
    tokens: Tokens

    def iterate(self, step: int) -> Iterator[Batch]:
        return map(self.make, count(step))

    def make(self, step: int) -> Batch:
        rng, generator = random.Random(f"captions {step}"), torch.Generator().manual_seed(step)
        views, number = self.features.singles.shape[:2]
        seen, texts = [], []
        for _ in range(SAMPLES - PAGES_OF_STEP):
            i = rng.randrange(number)
            seen.append(self.features.singles[rng.randrange(views), i])
            prompt, name = rng.choice(PROMPTS), self.features.names[i]
            texts.append((prompt, named(name) if prompt in ("", "a picture of") else name))
        for _ in range(PAGES_OF_STEP):
            i = rng.randrange(len(self.features.shown))
            seen.append(self.features.pages[i])
            texts.append(("", rng.choice(page_captions(page_of(self.features.shown[i])))))
        none = torch.zeros(SAMPLES, 0, dtype=torch.long)
        prompt_ids, prompt_mask = pad([self.tokens.prompt(prompt) for prompt, _ in texts])
        response_ids, response_mask = pad([self.tokens.response(text) for _, text in texts])
        return Batch(
            image_index=torch.arange(SAMPLES)[:, None],
            image_features=augmented(torch.stack(seen), generator),
            qformer_ids=none,
            qformer_mask=none,
            prompt_ids=prompt_ids,
            prompt_mask=prompt_mask,
            response_ids=response_ids,
            response_mask=response_mask,
            datasets=("names",) * (SAMPLES - PAGES_OF_STEP) + ("pages",) * PAGES_OF_STEP,
            ids=tuple(f"{step}/{i}" for i in range(SAMPLES)),
        )


@torch.no_grad()
def solve_projection(model: InstructBlip, features: Features, tokens: Tokens) -> None:
    """Set the projection to the ridge regression of word embeddings on the Q-Former's output."""
    queries, generator = model.config.num_query_tokens, torch.Generator().manual_seed(0)
    words = model.language_model.get_input_embeddings().weight.float()
    singles = torch.tensor([spelled(tokens, (name,), queries) for name in features.names])
    pages = torch.tensor([spelled(tokens, names, queries) for names in features.shown])
    sets = [*((view, singles) for view in features.singles), (features.pages, pages)]
    width = model.language_projection.in_features + 1
    squares = torch.zeros(width, width, dtype=torch.double)
    products = torch.zeros(width, words.shape[1], dtype=torch.double)
    for images, ids in sets:
        for few, meant in zip(images.split(256), ids.split(256), strict=True):
            none = torch.zeros(len(few), 0, dtype=torch.long)
            hidden = model.query_image(augmented(few, generator), none, none).flatten(0, 1)
            hidden = torch.cat([hidden, torch.ones(len(hidden), 1)], 1).double()
            is_end = meant.flatten() == tokens.response("a")[-1]
            weighted = (hidden * torch.where(is_end, 0.1, 1.0)[:, None]).T
            squares += weighted @ hidden
            products += weighted @ words[meant.flatten()].double()
    ridge = 1e-4 * squares.diagonal().mean() * torch.eye(width, dtype=torch.double)
    solved = torch.linalg.solve(squares + ridge, products).float()
    model.language_projection.weight.copy_(solved[:-1].T)
    model.language_projection.bias.copy_(solved[-1])


def main() -> None:
    parser = argparse.ArgumentParser()
    for name in ("start", "packages", "out"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--features", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=560)
    args = parser.parse_args()
    features = read_features(args.start, args.packages, args.features)
    torch.manual_seed(0)
    model = InstructBlip.from_pretrained(args.start, instruction_aware=False)
    model.set_trainable(tuple(p for p in ALIASES["qformer"] if p != "qformer_text_embeddings"))
    tokens = Tokens.from_pretrained(args.start)
    if not (args.out / "checkpoints").is_dir():  # a resumed run has its own
        solve_projection(model, features, tokens)
    model.to_training_dtypes(torch.bfloat16, torch.bfloat16)
    export = lambda path: save_blip2(model, path)  # noqa: E731
    batches = Captions(features, tokens)
    run_stage(model, batches, args.out, export, args.steps, learning_rate=3e-4)


if __name__ == "__main__":
    main()
