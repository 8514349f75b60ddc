"""Step 3, stage 2: queries and language model learn from each other.

    python runs/small/captions.py START PACKAGES OUT --features FILE --steps 700

START is what step 2 wrote. Its projection is solved first, so that the squared distance of queries
from the words they spell is least. Query tokens, Q-Former, projection and the adapter then train on
names of single images and captions of pages. The Q-Former reads what it reads in step 1: a question
beside the point, or nothing. Part of each step are samples of step 2, without an image, so that the
adapter continues to answer questions.
FILE is that of step 1. OUT is a run directory: it resumes.
"""

import argparse
import random
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import torch
from described import described, page_of, spelled
from reading import Reading
from spelling import Features, Questions, augmented, read_features
from stage import run_stage
from torch import Tensor

from instructblip.core.batch import Batch
from instructblip.data.samples import pad
from instructblip.data.tokens import Tokens
from instructblip.model.instructblip import InstructBlip
from instructblip.model.trainable import ALIASES
from instructblip.scenes.pictures.catalog import read_catalog
from instructblip.scenes.pictures.world import World, named, page_captions

SINGLES, PAGES, DESCRIBED = 28, 12, 24  # of a step
PROMPTS = (
    "",
    "a picture of",
    "Question: what is this? Short answer:",
    "what is in the picture?",
)


class Captioning(Reading):
    """A model that reads the queries of an image, or where there is none, words in their place."""

    def queries(self, batch: Batch) -> Tensor:
        shown = self.model.encode_queries(batch)  # [B, Q, L], zeros without an image
        images = len(batch) - DESCRIBED
        words = self.words(batch.qformer_ids[images:, : shown.shape[1]])
        return torch.cat([shown[:images].float(), words])


@dataclass(frozen=True)
class Captions:
    """Batches that nothing but the number of their step decides, so that a run resumes."""

    features: Features
    questions: Questions
    queries: int

    def iterate(self, step: int) -> Iterator[list[Batch]]:
        return ([self.make(number)] for number in count(step))

    def make(self, step: int) -> Batch:
        rng, generator = random.Random(f"captions {step}"), torch.Generator().manual_seed(step)
        views, number = self.features.singles.shape[:2]
        seen, texts, tokens = [], [], self.questions.tokens
        for _ in range(SINGLES):
            i = rng.randrange(number)
            seen.append(self.features.singles[rng.randrange(views), i])
            prompt, name = rng.choice(PROMPTS), self.features.names[i]
            texts.append((prompt, named(name) if prompt in ("", "a picture of") else name))
        for _ in range(PAGES):
            i = rng.randrange(len(self.features.shown))
            seen.append(self.features.pages[i])
            texts.append(("", rng.choice(page_captions(page_of(self.features.shown[i])))))
        read = [self.questions.beside(rng) for _ in texts]
        for _ in range(DESCRIBED):
            sample = described(self.questions.world, rng)
            texts.append((sample.text.prompt, sample.text.response))
            read.append(spelled(tokens, sample.names, self.queries))
        prompt_ids, prompt_mask = pad([tokens.prompt(prompt) for prompt, _ in texts])
        response_ids, response_mask = pad([tokens.response(text) for _, text in texts])
        qformer_ids, qformer_mask = pad(read)
        without = torch.full((DESCRIBED,), -1)
        return Batch(
            image_index=torch.cat([torch.arange(len(seen)), without])[:, None],
            image_features=augmented(torch.stack(seen), generator),
            qformer_ids=qformer_ids,
            qformer_mask=qformer_mask,
            prompt_ids=prompt_ids,
            prompt_mask=prompt_mask,
            response_ids=response_ids,
            response_mask=response_mask,
            datasets=("names",) * SINGLES + ("pages",) * PAGES + ("described",) * DESCRIBED,
            ids=tuple(f"{step}/{i}" for i in range(len(texts))),
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
    parser.add_argument("--steps", type=int, default=700)
    args = parser.parse_args()
    features = read_features(args.start, args.packages, args.features)
    torch.manual_seed(0)
    model = InstructBlip.from_pretrained(args.start)
    tokens, queries = Tokens.from_pretrained(args.start), model.config.num_query_tokens
    if not (args.out / "checkpoints").is_dir():  # a resumed run has its own
        solve_projection(model, features, tokens)
    parts = tuple(p for p in ALIASES["qformer"] if p != "qformer_text_embeddings")
    model.set_trainable((*parts, "lora")).to_training_dtypes(torch.bfloat16, torch.bfloat16)
    captioning = Captioning(model, tokens.response("a")[-1])
    questions = Questions(World(read_catalog(args.packages)), tokens)
    batches = Captions(features, questions, queries)
    export = lambda path: model.save_pretrained(path, whole=False)  # noqa: E731
    run_stage(captioning, batches, args.out, export, args.steps, learning_rate=6e-4)


if __name__ == "__main__":
    main()
