"""Step 3: BLIP-2 pre-training of the starter's Q-Former, on images of the training world.

    python runs/starter/qformer.py match --vision DIR --tokenizers DIR --out OUT
    python runs/starter/qformer.py phrases ... --language DIR --start OUT/last
    python runs/starter/qformer.py captions ... --start OUT/last

``match`` and ``phrases`` are stage 1 (BLIP-2, section 3.2) with the heads of the package's
`Stage1`: matching, with a negative that differs in one word, and grounded captions; then
contrastive learning on phrases, each about one thing. ``captions`` is stage 2 (section 3.3):
captions through the frozen language model, in the form "instruction, then caption" that it knows,
then, as in BLIP-2, of the image alone. The phrases continue beside them: with captions alone the
queries forget where things stand. No instruction reaches the Q-Former here, and no question is
asked: the result describes images and follows instructions poorly, as BLIP-2 does. OUT is a run
directory: it resumes.
"""

import argparse
import random
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from language import build as language_model
from lessons import Lesson, teach
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoTokenizer, LlamaForCausalLM
from vision import CONFIG as VISION
from vision import pixels_of, training_scene

from instructblip.core.batch import Batch, LossOutput
from instructblip.data.templates import TEMPLATES
from instructblip.data.tokens import Tokens
from instructblip.model.config import InstructBlipConfig, QFormerConfig
from instructblip.model.instructblip import InstructBlip
from instructblip.model.stage1 import Stage1
from instructblip.scenes.language import (
    CAPTIONS,
    at,
    detail,
    phrase,
)
from instructblip.scenes.questions import ALL_PLACES
from instructblip.scenes.world import (
    COLOURS,
    HELD_OUT_PAIRS,
    SHAPES,
    SIZES,
    WORDS,
    Scene,
    Thing,
)

IMAGES = 48  # of a step
SHORT_CAPTIONS = CAPTIONS[:3]  # web captions name things, not their size or place
BARE_FROM = 0.75  # share of stage 2 after which captions follow the image alone
PHASES = {"match": (3000, 5e-3), "phrases": (2000, 1.2e-3), "captions": (1200, 1.2e-3)}
"""Steps and highest learning rate of each phase."""


def build(language: dict, qformer_vocab: int, image_token_id: int) -> InstructBlip:
    torch.manual_seed(0)
    config = InstructBlipConfig(
        vision=VISION,
        qformer=QFormerConfig(
            vocab_size=qformer_vocab,
            hidden_size=192,
            num_hidden_layers=4,
            num_attention_heads=6,
            intermediate_size=768,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            max_position_embeddings=160,
            encoder_hidden_size=VISION.hidden_size,
            layer_norm_eps=1e-12,
        ),
        language=language,
        num_query_tokens=16,
        instruction_aware=True,
        image_token_id=image_token_id,
    )
    return InstructBlip(config)


def tell(scene: Scene, rng: random.Random) -> Callable[[Scene], str]:
    """A way to say something about a scene, to be applied to it and to an altered twin."""
    k = rng.randrange(len(scene.things))
    forms: list[Callable[[Scene], str]] = [
        *CAPTIONS,
        lambda s: phrase(s.things[k], size=True, place=True),
        lambda s: phrase(s.things[k]),
        lambda s: f"the {_name(s.things[k])} is {at(s.things[k].place)}",
    ]
    if scene.things[k].kind == "shape":
        forms += [
            lambda s: f"the {s.things[k].name} is {s.things[k].colour}",
            lambda s: f"the {s.things[k].name} is {s.things[k].size}",
        ]
    return rng.choice(forms)


def salient(scene: Scene, rng: random.Random) -> Scene:
    """What a web caption names: the large things, and what is small only where nothing is large.

    In any order: queries that are the words of a caption one after the other would not do, since
    which colour goes with which shape has to show whatever came first.
    """
    named = [t for t in scene.things if t.size == "large"] or scene.things
    return replace(scene, things=tuple(rng.sample(named, len(named))))


def _phrase(thing: Thing) -> str:
    return f"{thing.colour} {thing.name}" if thing.kind == "shape" else f"{thing.kind} {thing.name}"


PHRASES = [f"{c} {n}" for c in COLOURS for n in SHAPES if (c, n) not in HELD_OUT_PAIRS]
PHRASES += [f"word {w}" for w in WORDS] + [f"digit {d}" for d in range(10)]
TEMPERATURE = 0.05
CHANGED = 8  # false phrases for each thing


def _region(thing: Thing) -> str:
    return f"{thing.size} {_phrase(thing)} {thing.place}".strip()


def _changed(thing: Thing, rng: random.Random) -> Thing:
    """The thing with one attribute changed, half of the time its place."""
    if rng.random() < 0.5:
        cell = rng.choice([c for c in range(9) if ALL_PLACES[c] != thing.place])
        return replace(thing, row=cell // 3, column=cell % 3)
    return alter(Scene((thing,), 0), rng).things[0]


def _name(thing: Thing) -> str:
    return thing.name if thing.kind == "shape" else f"{thing.kind} {thing.name}"


def alter(scene: Scene, rng: random.Random) -> Scene:
    """The scene with one attribute of one thing changed (for text only; it is not drawn)."""
    things = list(scene.things)
    k = rng.randrange(len(things))
    thing = things[k]
    key = rng.choice(("colour", "name", "size", "place") if thing.kind == "shape" else ("name",))
    if key == "place":
        cell = rng.choice([c for c in range(9) if ALL_PLACES[c] != thing.place])
        things[k] = replace(thing, row=cell // 3, column=cell % 3)
    else:
        values = {
            "colour": tuple(COLOURS),
            "size": SIZES,
            "name": {"shape": SHAPES, "word": WORDS, "digit": tuple("0123456789")}[thing.kind],
        }[key]
        things[k] = replace(
            thing, **{key: rng.choice([v for v in values if v != getattr(thing, key)])}
        )
        if (things[k].colour, things[k].name) in HELD_OUT_PAIRS:
            return alter(scene, rng)
    return replace(scene, things=tuple(things))


def true_and_false(scene: Scene, rng: random.Random) -> tuple[str, str]:
    """A true text and one that differs by a single altered attribute."""
    form = tell(scene, rng)
    names = [t.name for t in scene.shapes]
    while True:
        true, false = form(scene), form(alter(scene, rng))
        # "the circle is red" is wrong only if no other circle is red.
        if true != false and (len(set(names)) == len(names) or " is " not in false):
            return true, false
        form = tell(scene, rng)


class Pretraining(Stage1):
    """The package's stage 1 on scenes: its heads and grounded captions, with other negatives."""

    def __init__(self, model: InstructBlip, tokens: Tokens, phase: str, steps: int) -> None:
        super().__init__(model, embedding=192)
        self.phrase_head = nn.Linear(model.language_projection.out_features, 192)
        self.tokens, self.phase, self.steps = tokens, phase, steps
        model.language_projection.requires_grad_(phase == "captions")
        model.vision_model.requires_grad_(False)
        self._phrases: Tensor | None = None

    def loss(self, lesson: Lesson) -> LossOutput:  # type: ignore[override]
        """The losses of the phase; a lesson's content are the step and its scenes."""
        step, scenes = lesson.content
        rng = random.Random(f"{self.phase} losses {step}")
        with torch.no_grad():
            features = self.model.vision_model.norm(self.model.encode_image(pixels_of(scenes)))
        if self.phase == "match":
            losses = [self.true_or_false(features, scenes, rng), self.details(features, scenes)]
        elif self.phase == "phrases":
            losses = [self.phrases(self.look(features), scenes, rng)]
        else:
            seen, bare = self.look(features), step > self.steps * BARE_FROM
            losses = [*self.captions(seen, scenes, rng, bare), self.phrases(seen, scenes, rng)]
        return lesson.mean_loss(torch.stack(losses).sum())

    def qformer_text(self, texts: list[str]) -> tuple[Tensor, Tensor]:
        encoded = self.tokens.qformer(texts, padding=True, return_tensors="pt")  # type: ignore
        return encoded["input_ids"], encoded["attention_mask"]

    def true_or_false(self, features: Tensor, scenes: list[Scene], rng: random.Random) -> Tensor:
        """Matching of each image with a true text and one that differs by a single attribute."""
        pairs = [true_and_false(scene, rng) for scene in scenes]
        ids, mask = self.qformer_text([p[0] for p in pairs] + [p[1] for p in pairs])
        index = torch.arange(len(scenes)).repeat(2)
        queries = self.model.query_tokens.expand(len(ids), -1, -1)
        hidden, _ = self.model.qformer.hidden_states(queries, features, ids, mask, index)
        assert hidden is not None
        fits = (torch.arange(len(ids)) < len(scenes)).long()
        return F.cross_entropy(self.match_head(hidden).mean(1), fits)

    def details(self, features: Tensor, scenes: list[Scene]) -> Tensor:
        """Grounded captions that name everything, by stage 1's own loss."""
        ids, mask = self.qformer_text([detail(scene) for scene in scenes])
        return self.caption(features, text_batch(len(scenes), qformer=(ids, mask)))

    def look(self, features: Tensor) -> Tensor:
        """[images, Q, D] the queries behind the Q-Former, which reads no text."""
        none = torch.zeros(len(features), 0, dtype=torch.long)
        queries = self.model.query_tokens.expand(len(features), -1, -1)
        return self.model.qformer(queries, features, none, none)

    def phrases(self, seen: Tensor, scenes: list[Scene], rng: random.Random) -> Tensor:
        """Contrast of the phrase of each thing with the same of one attribute changed and with the
        phrases of other images. As in BLIP-2 the similarity is the greatest over the queries."""
        rows = [i for i, s in enumerate(scenes) for _ in s.things]
        things = [t for s in scenes for t in s.things]
        hidden = F.normalize(self.image_head(seen), dim=-1)
        true = self._embed([_region(t) for t in things])
        logits = (hidden.flatten(0, 1) @ true.T).unflatten(0, hidden.shape[:2]).amax(1)[rows]
        index = torch.tensor(rows)
        same = (index[:, None] == index) & ~torch.eye(len(rows), dtype=torch.bool)
        others = [[_region(_changed(t, rng)) for _ in range(CHANGED)] for t in things]
        wrong = self._embed([text for row in others for text in row]).unflatten(0, (-1, CHANGED))
        hard = (hidden[index] @ wrong.transpose(1, 2)).amax(1)
        logits = torch.cat([logits.masked_fill(same, -1.0), hard], 1) / TEMPERATURE
        return F.cross_entropy(logits, torch.arange(len(rows)))

    def _embed(self, phrases: list[str]) -> Tensor:
        return F.normalize(self.phrase_head(self.summed(phrases)), dim=-1)

    def captions(
        self, seen: Tensor, scenes: list[Scene], rng: random.Random, bare: bool
    ) -> tuple[Tensor, Tensor]:
        """Stage 2: captions through the frozen language model; the Q-Former reads no text."""
        prompts = ["" if bare else rng.choice(TEMPLATES["caption"]) for _ in scenes]
        wanted = [rng.choice(SHORT_CAPTIONS)(salient(scene, rng)) for scene in scenes]
        batch = text_batch(
            len(scenes),
            prompt=pad([self.tokens.prompt(p) for p in prompts]),
            response=pad([self.tokens.response(w) for w in wanted]),
        )
        projected = self.model.project_queries(seen)
        joined = self.model.language.join(projected, batch)
        return self.model.language.loss(joined).mean(), self.align(projected, scenes)

    def align(self, projected: Tensor, scenes: list[Scene]) -> Tensor:
        """Contrast in the language model's own space: the best query for the phrase of a thing has
        to mean it, and no other colour and shape."""
        if self._phrases is None:
            self._phrases = F.normalize(self.summed(PHRASES), dim=-1)
        similarity = (F.normalize(projected, dim=-1) @ self._phrases.T).amax(1) / TEMPERATURE
        rows = torch.tensor([i for i, s in enumerate(scenes) for _ in s.things])
        index = torch.tensor([PHRASES.index(_phrase(t)) for s in scenes for t in s.things])
        return contrast_things(similarity, rows, index)

    @torch.no_grad()
    def summed(self, phrases: list[str]) -> Tensor:
        """[phrases, L] the words of each, summed as in `language.response_logits`."""
        ids = self.tokens.language([f" {p}" for p in phrases], add_special_tokens=False)[
            "input_ids"
        ]
        embed = self.model.language_model.get_input_embeddings()
        return torch.stack([embed(torch.tensor(row)).sum(0) / len(row) ** 0.5 for row in ids])

    def heads(self) -> dict[str, Tensor]:
        """What is trained beside the model and discarded at the end."""
        return {n: p for n, p in self.state_dict().items() if not n.startswith("model.")}


def contrast_things(similarity: Tensor, rows: Tensor, index: Tensor) -> Tensor:
    """Cross-entropy of each thing's phrase, ``index`` [things], in its image, ``rows`` [things],
    from the similarity [images, phrases]; other phrases of the same image are no negatives."""
    here = torch.zeros_like(similarity, dtype=torch.bool)
    here[rows, index] = True
    others = here[rows].scatter(1, index[:, None], False)
    return F.cross_entropy(similarity[rows].masked_fill(others, -1e4), index)


Text = tuple[Tensor, Tensor]


def text_batch(
    number: int,
    qformer: Text | None = None,
    prompt: Text | None = None,
    response: Text | None = None,
) -> Batch:
    """``number`` images, each with its own texts: ids and mask of those that are given."""
    none = torch.zeros(number, 0, dtype=torch.long)
    (ids, mask), (prompt_ids, prompt_mask), (response_ids, response_mask) = (
        text or (none, none) for text in (qformer, prompt, response)
    )
    return Batch(
        image_index=torch.arange(number)[:, None],
        qformer_ids=ids,
        qformer_mask=mask,
        prompt_ids=prompt_ids,
        prompt_mask=prompt_mask,
        response_ids=response_ids,
        response_mask=response_mask,
    )


def pad(rows: list[list[int]]) -> Text:
    width = max(map(len, rows))
    ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    return ids, mask


def load_tokens(folder: Path) -> Tokens:
    """The tokenizers of `build_tokenizers.py`."""
    return Tokens(
        AutoTokenizer.from_pretrained(str(folder)),
        AutoTokenizer.from_pretrained(str(folder / "qformer_tokenizer")),
    )


def assemble(vision: Path, language: Path | None, tokens: Tokens) -> InstructBlip:
    """A fresh Q-Former between the trained image encoder and the trained language model (None: one
    that nobody trained, for a phase that does not read it)."""
    if language is None:
        loaded = language_model(-(-len(tokens.language) // 64) * 64)  # type: ignore[arg-type]
    else:
        loaded = LlamaForCausalLM.from_pretrained(str(language))
    vocab = -(-len(tokens.qformer) // 8) * 8  # type: ignore[arg-type]
    model = build(loaded.config.to_dict(), vocab, image_token_id=len(tokens.language))
    model.language_model.load_state_dict(loaded.state_dict())
    model.vision_model.load_state_dict(load_file(vision / "vision.safetensors"))
    return model


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("phase", choices=PHASES)
    for name in ("vision", "tokenizers", "out"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--language", type=Path, help="not read by match")
    parser.add_argument("--start", type=Path)
    parser.add_argument("--steps", type=int)
    args = parser.parse_args()
    if args.phase != "match" and args.language is None:
        parser.error(f"{args.phase} needs --language")
    steps, rate = PHASES[args.phase]
    steps = args.steps or steps
    tokens = load_tokens(args.tokenizers)
    model = assemble(args.vision, args.language, tokens)
    training = Pretraining(model, tokens, args.phase, steps)
    if args.start:
        training.load_state_dict(load_file(args.start / "pretraining.safetensors"), strict=False)

    def make(step: int) -> Lesson:
        rng = random.Random(f"{args.phase} {step}")
        scenes = [training_scene(rng) for _ in range(IMAGES)]
        return Lesson.of("scenes", step, (step, scenes), torch.ones(IMAGES, 1, dtype=torch.long))

    def export(folder: Path) -> None:
        trained = {n: p for n, p in training.state_dict().items() if n.startswith(KEPT)}
        save_file(trained | training.heads(), folder / "pretraining.safetensors")

    if not teach(training, make, args.out, steps, rate, export):
        sys.exit("stopped: run it again to resume")


KEPT = ("model.query_tokens", "model.qformer.", "model.language_projection.")
"""What pre-training changes in the model."""


if __name__ == "__main__":
    main()
