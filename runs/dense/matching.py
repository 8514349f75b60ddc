"""Step 2: BLIP-2 pre-training of a Q-Former on the dense world.

    python runs/dense/matching.py OUT --vision RUN --steps 2000

It starts from the starter that ships, whose image encoder is replaced. Two losses train beside each
other. Stage 1 of BLIP-2, matching: queries and a phrase about one thing read each other, and have
to tell it from the same phrase with one word changed; to do so, the queries have to look where the
phrase says. And without a text: for every thing one query is drawn to its phrase in the words of
the language model, which stays frozen. No question is asked about an image. OUT is a run directory:
it resumes.
"""

import argparse
import random
import sys
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from encoder import CONFIG, pixels_of
from lessons import Lesson, teach
from safetensors.torch import load_file, save_file
from torch import Tensor

from instructblip.core.batch import LossOutput
from instructblip.data.tokens import Tokens
from instructblip.model.checkpoints.directory import model_directory
from instructblip.model.instructblip import InstructBlip
from instructblip.model.stage1 import Stage1
from instructblip.scenes.dense import DIGITS, GRID, DenseScene, Item, sample_dense
from instructblip.scenes.language import a
from instructblip.scenes.world import COLOURS, HELD_OUT_PAIRS, SHAPES, SIZES

IMAGES, TRUE = 24, 3
"""Of a step, and the phrases about each image, which are matched in a true and a false form."""
RATE = 3e-3
TEMPERATURE = 0.05
PHRASES = [f"{c} {s}" for c in COLOURS for s in SHAPES if (c, s) not in HELD_OUT_PAIRS]
FORMS = (
    lambda i: f"{a(i.look)} in {i.place}",
    lambda i: f"a {i.shape} in {i.place}",
    lambda i: f"the shape in {i.place} is {i.colour}",
    lambda i: f"the shape in {i.place} is {i.size}",
    lambda i: f"digit {i.digit} in {i.place}",
    lambda i: f"digit {i.digit} on the {i.look}",
    lambda i: f"a {i.size} {i.look}",
    lambda i: f"the {i.look} is in row {i.row + 1}",
    lambda i: f"the {i.look} is in column {i.column + 1}",
)


def changed(item: Item, rng: random.Random) -> Item:
    """The thing with one property changed."""
    key, options = rng.choice(
        (
            ("colour", tuple(COLOURS)), ("shape", SHAPES), ("size", SIZES), ("digit", DIGITS),
            ("row", range(GRID)), ("column", range(GRID)),
        )
    )  # fmt: skip
    return replace(item, **{key: rng.choice([o for o in options if o != getattr(item, key)])})


def true_and_false(scene: DenseScene, rng: random.Random) -> tuple[str, str]:
    """A true phrase about one thing, and the same with one property changed, which fits none."""
    while True:
        form, item = rng.choice(FORMS), rng.choice(scene.items)
        false = form(changed(item, rng))
        if false not in {form(other) for other in scene.items}:
            return form(item), false


class Pretraining(Stage1):
    """The package's matching head on dense images, and phrases in the language model's words."""

    words: Tensor

    def __init__(self, model: InstructBlip, tokens: Tokens) -> None:
        super().__init__(model, embedding=192)
        self.tokens = tokens
        model.language_projection.requires_grad_(True)
        model.vision_model.requires_grad_(False)
        with torch.no_grad():
            ids = [tokens.response(p)[:-1] for p in PHRASES]
            embed = model.language_model.get_input_embeddings()
            summed = torch.stack([embed(torch.tensor(row)).sum(0) / len(row) ** 0.5 for row in ids])
        self.register_buffer("words", F.normalize(summed, dim=-1), persistent=False)

    def loss(self, lesson: Lesson) -> LossOutput:  # type: ignore[override]
        """Both losses; a lesson's content are the step and its scenes."""
        step, scenes = lesson.content
        with torch.no_grad():
            features = self.model.vision_model.norm(self.model.encode_image(pixels_of(scenes)))
        match = self.true_or_false(features, scenes, random.Random(f"phrases {step}"))
        spelled = self.spelled(features, scenes)
        terms = {"match": match.detach(), "phrases": spelled.detach()}
        return lesson.mean_loss(match + spelled)._replace(terms=terms)

    def true_or_false(self, features: Tensor, scenes: list[DenseScene], rng: random.Random):
        """Matching of each image with true phrases and the same with one word changed."""
        pairs = [true_and_false(scene, rng) for scene in scenes for _ in range(TRUE)]
        texts = [p[0] for p in pairs] + [p[1] for p in pairs]
        encoded = self.tokens.qformer(texts, padding=True, return_tensors="pt")  # type: ignore
        index = torch.arange(len(scenes)).repeat_interleave(TRUE).repeat(2)
        queries = self.model.query_tokens.expand(len(texts), -1, -1)
        hidden, _ = self.model.qformer.hidden_states(
            queries, features, encoded["input_ids"], encoded["attention_mask"], index
        )
        assert hidden is not None
        fits = (torch.arange(len(texts)) < len(pairs)).long()
        return F.cross_entropy(self.match_head(hidden).mean(1), fits)

    def spelled(self, features: Tensor, scenes: list[DenseScene]) -> Tensor:
        """The best query for each thing has to mean its colour and shape, and no other."""
        none = torch.zeros(len(scenes), 0, dtype=torch.long)
        queries = self.model.query_tokens.expand(len(scenes), -1, -1)
        seen = self.model.project_queries(self.model.qformer(queries, features, none, none))
        similarity = (F.normalize(seen, dim=-1) @ self.words.T).amax(1) / TEMPERATURE
        rows = torch.tensor([i for i, s in enumerate(scenes) for _ in s.items])
        index = torch.tensor([PHRASES.index(item.look) for s in scenes for item in s.items])
        here = torch.zeros_like(similarity, dtype=torch.bool)
        here[rows, index] = True
        others = here[rows].scatter(1, index[:, None], False)
        return F.cross_entropy(similarity[rows].masked_fill(others, -1e4), index)


def start(vision: Path) -> tuple[InstructBlip, Tokens]:
    """The starter with the image encoder that step 1 trained, and its tokenizers."""
    model = InstructBlip.from_pretrained("starter", instruction_aware=True)
    config = model.config.model_copy(update={"vision": CONFIG})
    dense = InstructBlip(config, assets=model.assets, generation_settings=model.generation_settings)
    kept = {n: v for n, v in model.state_dict().items() if not n.startswith("vision_model.")}
    dense.load_state_dict(kept, strict=False)
    dense.vision_model.load_state_dict(load_file(vision / "last/vision.safetensors"))
    return dense, Tokens.from_pretrained(model_directory("starter"))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--vision", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=2000)
    args = parser.parse_args()
    torch.manual_seed(0)
    training = Pretraining(*start(args.vision))

    def make(step: int) -> Lesson:
        rng = random.Random(f"dense {step}")
        scenes = [sample_dense(rng) for _ in range(IMAGES)]
        return Lesson.of("dense", step, (step, scenes), torch.ones(IMAGES, 1, dtype=torch.long))

    def export(folder: Path) -> None:
        kept = ("model.query_tokens", "model.qformer.", "model.language_projection.")
        weights = {n: v for n, v in training.state_dict().items() if n.startswith(kept)}
        save_file(weights, folder / "pretraining.safetensors")

    if not teach(training, make, args.out, args.steps, RATE, export):
        sys.exit("stopped: run it again to resume")


if __name__ == "__main__":
    main()
