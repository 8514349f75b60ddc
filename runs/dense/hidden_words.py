"""Step 2: pre-training of a Q-Former on the dense world.

    python runs/dense/hidden_words.py OUT --vision RUN --steps 2500

A small Q-Former with a tokenizer of its own stands between the image encoder of step 1 and the
language model of the starter. Two losses train beside each other. With a text: queries and a phrase
of which one word is hidden read each other, and the best query has to mean that word rather than
any other, in the words of the language model, which stays frozen. That is the contrast
of a true phrase with all phrases that differ in one word, in one pass. Without a text: for every
thing one query is drawn to its phrase. No question is asked about an image.

Images have from one thing to 25: with 20 and more in every image no query learns to look where a
phrase says, within the same number of steps. A sentence that says nothing comes before half of the
phrases: without one the Q-Former reads a place only at the positions of a short phrase, and not
behind the words of an instruction. Each step trains the first 2, 4, 8 or 16 queries, so that the
start can be cut to any of these. OUT is a run directory: it resumes.
"""

import argparse
import random
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from build_tokenizers import qformer_tokenizer
from encoder import CONFIG, pixels_of
from lessons import Lesson, teach
from qformer import KEPT, contrast_things
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoTokenizer

from instructblip.core.batch import LossOutput
from instructblip.core.files import replacing_directory, write_json
from instructblip.data.templates import TEMPLATES
from instructblip.data.tokens import Tokens
from instructblip.model.checkpoints.directory import model_directory
from instructblip.model.instructblip import InstructBlip
from instructblip.scenes.dense import (
    BY_LOOK,
    BY_PLACE,
    DIGITS,
    NUMBERS,
    DenseScene,
    Item,
    ask_beside,
    ask_number,
    ask_statement,
    captions,
    sample_dense,
)
from instructblip.scenes.world import COLOURS, HELD_OUT_PAIRS, SHAPES, SIZES

IMAGES, PHRASES_OF_EACH = 32, 6
"""Of a step."""
BANK = 6000
"""Images of the whole run, whose features are computed once; each has some 200 phrases."""
THINGS = (1, 2, 3, 5, 8, 14, 25, 25)
"""How many things an image has at most, drawn for each."""
QUERIES = (2, 4, 8, 16)
RATE = 6e-3
TEMPERATURE = 0.05
ALONE = 0.3
"""Weight of the loss without a text."""

HIDDEN = "[MASK]"
Form = Callable[[Item], str]
FORMS: dict[str, tuple[tuple[Form, str], ...]] = {
    "colour at": (
        (lambda i: f"the shape in {i.place} is {HIDDEN}", "colour"),
        (lambda i: f"a {HIDDEN} {i.shape} in {i.place}", "colour"),
    ),
    "shape at": (
        (lambda i: f"a {HIDDEN} in {i.place}", "shape"),
        (lambda i: f"a {i.colour} {HIDDEN} in {i.place}", "shape"),
    ),
    "size at": ((lambda i: f"a {HIDDEN} {i.look} in {i.place}", "size"),),
    "digit at": ((lambda i: f"digit {HIDDEN} in {i.place}", "digit"),),
    "digit on": ((lambda i: f"digit {HIDDEN} on the {i.look}", "digit"),),
    "size of": ((lambda i: f"a {HIDDEN} {i.look}", "size"),),
    "row of": ((lambda i: f"the {i.look} is in row {HIDDEN}", "row"),),
    "column of": ((lambda i: f"the {i.look} is in column {HIDDEN}", "column"),),
}
"""Phrases about one thing, and the property whose word is hidden."""
WORDS = [*COLOURS, *SHAPES, *SIZES, *DIGITS]
KINDS = {"colour": COLOURS, "shape": SHAPES, "size": SIZES, "digit": DIGITS}
KINDS |= {"row": NUMBERS, "column": NUMBERS}
PHRASES = [f"{c} {s}" for c in COLOURS for s in SHAPES if (c, s) not in HELD_OUT_PAIRS]


@dataclass(frozen=True)
class Bank:
    """Images of one to 25 things, and the features that the frozen encoder makes of them."""

    scenes: list[DenseScene]
    features: Tensor
    """[images, P, V] in half precision."""

    @classmethod
    @torch.inference_mode()
    def of(cls, model: InstructBlip, seed: str, number: int, full: bool = False) -> "Bank":
        rng = random.Random(seed)
        scenes = [sample_dense(rng) for _ in range(number)]
        if not full:
            scenes = [thinned(scene, rng.choice(THINGS), rng) for scene in scenes]
        parts = [scenes[i : i + 64] for i in range(0, number, 64)]
        norm = model.vision_model.norm
        return cls(
            scenes, torch.cat([norm(model.encode_image(pixels_of(p))).half() for p in parts])
        )


def thinned(scene: DenseScene, number: int, rng: random.Random) -> DenseScene:
    """The scene with at most ``number`` of its things."""
    kept = rng.sample(range(len(scene.items)), min(number, len(scene.items)))
    return replace(scene, items=tuple(scene.items[k] for k in sorted(kept)))


@dataclass(frozen=True)
class Hidden:
    """Phrases of which a word is hidden."""

    kinds: list[str]
    ids: Tensor
    """[M, I]"""
    mask: Tensor
    images: Tensor
    """[M] the image of each."""
    answers: Tensor
    """[M] the hidden word, as its place in WORDS."""
    possible: Tensor
    """[M, words] which words could stand there."""


OPENERS = (
    "a photo:", "look at the image.", "this picture shows the following.", "seen from the front,",
    "here is a drawing with many shapes.", "some shapes have a digit.", "a caption:",
    "the picture was drawn by hand and then scanned for a book.",
)  # fmt: skip


def opened(text: str, rng: random.Random) -> str:
    """The text, in half of the cases behind a sentence that says nothing about the image."""
    return text if rng.random() < 0.5 else f"{rng.choice(OPENERS)} {text}"


def hide(tokens: Tokens, scenes: list[DenseScene], number: int, rng: random.Random) -> Hidden:
    """``number`` phrases about things of each scene."""
    kinds, texts, answers, possible = [], [], [], []
    for scene in scenes:
        for _ in range(number):
            kind, item = rng.choice([*FORMS]), rng.choice(scene.items)
            form, key = rng.choice(FORMS[kind])
            value = getattr(item, key)
            kinds.append(kind)
            texts.append(opened(form(item), rng))
            answers.append(WORDS.index(str(value + 1) if isinstance(value, int) else value))
            possible.append([word in KINDS[key] for word in WORDS])
    read = tokens.qformer(texts, padding=True, return_tensors="pt")  # type: ignore[misc]
    images = torch.arange(len(scenes)).repeat_interleave(number)
    return Hidden(
        kinds, read["input_ids"], read["attention_mask"], images,
        torch.tensor(answers), torch.tensor(possible),
    )  # fmt: skip


class Pretraining(nn.Module):
    """Both losses; queries, Q-Former and projection train."""

    words: Tensor
    phrases: Tensor

    def __init__(self, model: InstructBlip, tokens: Tokens) -> None:
        super().__init__()
        self.model, self.tokens = model, tokens
        model.set_trainable(("qformer",))
        self.register_buffer("words", self.meanings(WORDS), persistent=False)
        self.register_buffer("phrases", self.meanings(PHRASES), persistent=False)

    @torch.no_grad()
    def meanings(self, texts: list[str]) -> Tensor:
        """[texts, L] the words of each text in the language model, summed, of length 1."""
        embed = self.model.language_model.get_input_embeddings()
        ids = [self.tokens.response(text)[:-1] for text in texts]
        return F.normalize(torch.stack([embed(torch.tensor(row)).sum(0) for row in ids]), dim=-1)

    def best(self, queries: Tensor, meanings: Tensor) -> Tensor:
        """[M, meanings] how near the best of the queries [M, Q, D] is to each."""
        seen = F.normalize(self.model.project_queries(queries), dim=-1)
        return (seen @ meanings.T).amax(1) / TEMPERATURE

    def word_scores(self, features: Tensor, hidden: Hidden, queries: int) -> Tensor:
        """[M, words] for the hidden words."""
        tokens = self.model.query_tokens[:, :queries].expand(len(hidden.ids), -1, -1)
        read = self.model.qformer(tokens, features, hidden.ids, hidden.mask, hidden.images)
        return self.best(read, self.words)

    def loss(self, lesson: Lesson) -> LossOutput:
        """Both losses; a lesson's content are scenes, their features, phrases and a number of
        queries."""
        scenes, features, hidden, queries = lesson.content
        word = F.cross_entropy(self.word_scores(features, hidden, queries), hidden.answers)
        alone = self.alone(features, scenes, queries)
        terms = {"hidden word": word.detach(), "alone": alone.detach()}
        return lesson.mean_loss(word + ALONE * alone)._replace(terms=terms)

    def alone(self, features: Tensor, scenes: list[DenseScene], queries: int) -> Tensor:
        """Without a text: the best query for each thing means its colour and shape, and no other.
        With fewer queries than things no model brings this to 0."""
        none = torch.zeros(len(scenes), 0, dtype=torch.long)
        tokens = self.model.query_tokens[:, :queries].expand(len(scenes), -1, -1)
        similarity = self.best(self.model.qformer(tokens, features, none, none), self.phrases)
        rows = torch.tensor([i for i, s in enumerate(scenes) for _ in s.items])
        index = torch.tensor([PHRASES.index(item.look) for s in scenes for item in s.items])
        return contrast_things(similarity, rows, index)

    @torch.inference_mode()
    def accuracy(self, bank: Bank, queries: int) -> dict[str, float]:
        """Hidden words found among those that could stand there, in percent, by kind."""
        hidden = hide(self.tokens, bank.scenes, 8, random.Random("phrases"))
        scores = self.word_scores(bank.features.float(), hidden, queries)
        scores = scores.masked_fill(~hidden.possible, -torch.inf)
        right = (scores.argmax(1) == hidden.answers).tolist()
        found = {
            kind: [r for k, r in zip(hidden.kinds, right, strict=True) if k == kind]
            for kind in FORMS
        }
        return {kind: round(100 * sum(each) / len(each), 1) for kind, each in found.items()}


def lines() -> list[str]:
    """Texts of the dense world and the templates, for the vocabulary of the Q-Former."""
    rng, found = random.Random(0), []
    kinds = [*BY_PLACE.values(), *BY_LOOK.values(), ask_beside, ask_number, ask_statement]
    for _ in range(300):
        scene = sample_dense(rng, "any")
        found += captions(scene, rng)
        for item in scene.items[:8]:
            found += [form(item) for forms in FORMS.values() for form, _ in forms]
            found += [q.text for ask in kinds if (q := ask(scene, item, rng))]
    found += [text for text in OPENERS for _ in range(3)]
    return found + [text for texts in TEMPLATES.values() for text in texts for _ in range(3)]


def start(vision: Path, words: Path) -> tuple[InstructBlip, Tokens]:
    """A new small Q-Former between the image encoder of step 1 and the starter's language model.

    Its tokenizer is in ``words``, the run of step 2, and is built there once: building breaks ties
    at random, so that the next process would number some words otherwise.
    """
    torch.manual_seed(0)
    folder = words / "qformer_tokenizer"
    if not folder.is_dir():
        with replacing_directory(folder) as new:
            qformer_tokenizer(lines()).save_pretrained(str(new))
    starter = InstructBlip.from_pretrained("starter", instruction_aware=True)
    tokens = Tokens.from_pretrained(model_directory("starter"))
    tokens = replace(tokens, qformer=AutoTokenizer.from_pretrained(str(folder)))
    config = starter.config
    qformer = config.qformer.model_copy(
        update={
            "vocab_size": -(-len(tokens.qformer) // 8) * 8,  # type: ignore[arg-type]
            "hidden_size": 128,
            "num_attention_heads": 4,
            "intermediate_size": 512,
            "encoder_hidden_size": CONFIG.hidden_size,
        }
    )
    config = config.model_copy(
        update={"vision": CONFIG, "qformer": qformer, "num_query_tokens": max(QUERIES)}
    )
    model = InstructBlip(
        config, assets=starter.assets, generation_settings=starter.generation_settings
    )
    model.language_model.load_state_dict(starter.language_model.state_dict())
    model.vision_model.load_state_dict(load_file(vision / "last/vision.safetensors"))
    return model, tokens


def save_trained(training: nn.Module, folder: Path) -> None:
    """Write what pre-training changes in the model."""
    weights = {n: v for n, v in training.state_dict().items() if n.startswith(KEPT)}
    save_file(weights, folder / "pretraining.safetensors")


def load_trained(model: InstructBlip, run: Path) -> None:
    """Read what a step's run has changed in the model."""
    trained = load_file(run / "last/pretraining.safetensors")
    weights = {name.removeprefix("model."): value for name, value in trained.items()}
    model.load_state_dict(weights, strict=False)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--vision", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=2500)
    args = parser.parse_args()
    training = Pretraining(*start(args.vision, args.out))
    bank = Bank.of(training.model, "training", BANK)

    def make(step: int) -> Lesson:
        rng = random.Random(f"dense {step}")
        drawn = rng.sample(range(BANK), IMAGES)
        scenes = [bank.scenes[i] for i in drawn]
        hidden = hide(training.tokens, scenes, PHRASES_OF_EACH, rng)
        content = (scenes, bank.features[drawn].float(), hidden, rng.choice(QUERIES))
        return Lesson.of("dense", step, content, torch.ones(IMAGES, 1, dtype=torch.long))

    if not teach(training, make, args.out, args.steps, RATE, partial(save_trained, training)):
        sys.exit("stopped: run it again to resume")
    fresh = Bank.of(training.model, "fresh", 256, full=True)
    scores = {queries: training.accuracy(fresh, queries) for queries in QUERIES}
    write_json(args.out / "accuracy.json", scores)
    for queries, found in scores.items():
        print(f"{queries} queries, hidden words in full images:", found)


if __name__ == "__main__":
    main()
