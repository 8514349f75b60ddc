"""Step 3: BLIP-2 pre-training of the starter's Q-Former, on pictures of the training world.

    python runs/starter/train_blip2.py match --vision DIR --language DIR --out DIR --minutes 35
    python runs/starter/train_blip2.py regions ... --start DIR_OF_MATCH --minutes 16
    python runs/starter/train_blip2.py captions ... --start DIR_OF_REGIONS --minutes 12

``match`` and ``regions`` are stage 1 (BLIP-2, section 3.2): matching, with a negative that differs
in one word, and grounded captions; then contrastive learning on phrases, each about one thing.
``captions`` is stage 2 (section 3.3): captions through the frozen language model, in the form
"instruction, then caption" that it knows, then, as in BLIP-2, of the picture alone. The phrases go
on beside them: captions by themselves let the queries forget where things stand. No instruction
reaches the Q-Former here, and no question is asked: the result describes pictures and follows
instructions poorly, as BLIP-2 does.
"""

import argparse
import random
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from muon import Muon
from safetensors.torch import load_file
from starter_io import save_checkpoint, take_checkpoint
from torch import Tensor, nn
from train_vision import CONFIG as VISION
from train_vision import pixels_of, training_scene
from transformers import AutoTokenizer

from instructblip.core.batch import Batch
from instructblip.data.templates import TEMPLATES
from instructblip.data.tokens import Tokens
from instructblip.model.config import InstructBlipConfig, QFormerConfig
from instructblip.model.instructblip import InstructBlip
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

PICTURES = 48  # a step
SHORT_CAPTIONS = CAPTIONS[:3]  # web captions name things, not their size or place
BARE_FROM = 0.75  # share of stage 2 after which captions follow the picture alone


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


class Heads(nn.Module):
    """What stage 1 needs beside the Q-Former and throws away: matching, and words."""

    def __init__(self, width: int, vocab_size: int) -> None:
        super().__init__()
        self.match = nn.Linear(width, 2)
        self.region = nn.Linear(width, width)
        self.region_text = nn.Linear(width, width)
        self.words = nn.Linear(width, vocab_size)


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
    which colour goes with which shape has to be told whatever was said first.
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


class Stage:
    """Losses of the pre-training over pictures drawn for each step."""

    def __init__(self, model: InstructBlip, heads: Heads, tokens: Tokens) -> None:
        self.model, self.heads, self.tokens = model, heads, tokens
        self._phrases: Tensor | None = None

    def features(self, scenes: list[Scene]) -> Tensor:
        return self.model.vision_model.norm(self.model.encode_image(pixels_of(scenes)))

    def text(self, texts: list[str]) -> tuple[Tensor, Tensor]:
        encoded = self.tokens.qformer(texts, padding=True, return_tensors="pt")  # type: ignore
        return encoded["input_ids"], encoded["attention_mask"]

    def match(
        self, features: Tensor, scenes: list[Scene], rng: random.Random
    ) -> tuple[Tensor, float]:
        pairs = [true_and_false(scene, rng) for scene in scenes]
        ids, mask = self.text([p[0] for p in pairs] + [p[1] for p in pairs])
        index = torch.arange(len(scenes)).repeat(2)
        queries = self.model.query_tokens.expand(len(ids), -1, -1)
        hidden, _ = self.model.qformer.hidden_states(queries, features, ids, mask, index)
        assert hidden is not None
        logits = self.heads.match(hidden).mean(1)
        wanted = (torch.arange(len(ids)) < len(scenes)).long()
        hits = (logits.argmax(-1) == wanted).float().mean().item()
        return F.cross_entropy(logits, wanted), hits

    def tell_grounded(self, features: Tensor, scenes: list[Scene]) -> Tensor:
        ids, mask = self.text([detail(scene) for scene in scenes])
        queries = self.model.query_tokens.expand(len(ids), -1, -1)
        _, hidden = self.model.qformer.hidden_states(queries, features, ids, mask, causal_text=True)
        wanted = ids[:, 1:].masked_fill(mask[:, 1:] == 0, -100)
        return F.cross_entropy(self.heads.words(hidden[:, :-1]).flatten(0, 1), wanted.flatten())

    def look(self, features: Tensor) -> Tensor:
        """[pictures, Q, D] the queries behind the Q-Former, which reads no text."""
        none = torch.zeros(len(features), 0, dtype=torch.long)
        queries = self.model.query_tokens.expand(len(features), -1, -1)
        return self.model.qformer(queries, features, none, none)

    def regions(self, looked: Tensor, scenes: list[Scene], rng: random.Random) -> Tensor:
        """Contrastive: for the phrase of each thing, against the same with one attribute changed
        and against the phrases of other pictures. As in BLIP-2 the similarity is the greatest over
        the queries."""
        rows = [i for i, s in enumerate(scenes) for _ in s.things]
        things = [t for s in scenes for t in s.things]
        hidden = F.normalize(self.heads.region(looked), dim=-1)
        own = self._text([_region(t) for t in things])
        logits = (hidden.flatten(0, 1) @ own.T).unflatten(0, hidden.shape[:2]).amax(1)[rows]
        index = torch.tensor(rows)
        same = (index[:, None] == index) & ~torch.eye(len(rows), dtype=torch.bool)
        others = [[_region(_changed(t, rng)) for _ in range(CHANGED)] for t in things]
        wrong = self._text([text for row in others for text in row]).unflatten(0, (-1, CHANGED))
        hard = (hidden[index] @ wrong.transpose(1, 2)).amax(1)
        logits = torch.cat([logits.masked_fill(same, -1.0), hard], 1) / TEMPERATURE
        return F.cross_entropy(logits, torch.arange(len(rows)))

    def _text(self, phrases: list[str]) -> Tensor:
        return F.normalize(self.heads.region_text(self.summed(phrases)), dim=-1)

    def align(self, projected: Tensor, scenes: list[Scene]) -> Tensor:
        """The same in the language model's own space: the best query for a phrase has to mean it,
        and no other colour and shape."""
        if self._phrases is None:
            self._phrases = F.normalize(self.summed(PHRASES), dim=-1)
        similarity = (F.normalize(projected, dim=-1) @ self._phrases.T).amax(1) / TEMPERATURE
        rows = torch.tensor([i for i, s in enumerate(scenes) for _ in s.things])
        index = torch.tensor([PHRASES.index(_phrase(t)) for s in scenes for t in s.things])
        here = torch.zeros_like(similarity, dtype=torch.bool)
        here[rows, index] = True
        others = here[rows].scatter(1, index[:, None], False)
        return F.cross_entropy(similarity[rows].masked_fill(others, -1e4), index)

    @torch.no_grad()
    def summed(self, phrases: list[str]) -> Tensor:
        """[phrases, D] the words of each, summed as in `train_language.response_logits`."""
        ids = self.tokens.language([f" {p}" for p in phrases], add_special_tokens=False)[
            "input_ids"
        ]
        embed = self.model.language_model.get_input_embeddings()
        return torch.stack([embed(torch.tensor(row)).sum(0) / len(row) ** 0.5 for row in ids])

    def caption(
        self, looked: Tensor, scenes: list[Scene], rng: random.Random, bare: bool
    ) -> tuple[Tensor, Tensor]:
        """Stage 2: the frozen language model tells the caption; the Q-Former reads no text."""
        prompts = ["" if bare else rng.choice(TEMPLATES["caption"]) for _ in scenes]
        wanted = [rng.choice(SHORT_CAPTIONS)(salient(scene, rng)) for scene in scenes]
        none = torch.zeros(len(scenes), 0, dtype=torch.long)
        prompt_ids, prompt_mask = _pad([self.tokens.prompt(p) for p in prompts])
        response_ids, response_mask = _pad([self.tokens.response(w) for w in wanted])
        batch = Batch(
            image_index=torch.arange(len(scenes))[:, None],
            qformer_ids=none,
            qformer_mask=none,
            prompt_ids=prompt_ids,
            prompt_mask=prompt_mask,
            response_ids=response_ids,
            response_mask=response_mask,
        )
        projected = self.model.project_queries(looked)
        joined = self.model.language.join(projected, batch)
        return self.model.language.loss(joined).mean(), self.align(projected, scenes)


def _pad(rows: list[list[int]]) -> tuple[Tensor, Tensor]:
    width = max(map(len, rows))
    ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    return ids, mask


def optimizers(model: InstructBlip, heads: Heads, lr: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the Q-Former, AdamW for the rest of what trains."""
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    matrices = [p for n, p in named if p.ndim == 2 and "embeddings" not in n and "qformer" in n]
    chosen = {id(p) for p in matrices}
    rest = [p for _, p in named if id(p) not in chosen] + list(heads.parameters())
    return [
        Muon(matrices, lr=lr, momentum=0.95, weight_decay=0.01),
        torch.optim.AdamW(rest, lr=lr / 10, betas=(0.9, 0.98), weight_decay=0.01),
    ]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("stage", choices=("match", "regions", "captions"))
    parser.add_argument("--vision", type=Path, required=True)
    parser.add_argument("--language", type=Path, required=True)
    parser.add_argument("--start", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=20)
    args = parser.parse_args()
    tokens = Tokens(
        AutoTokenizer.from_pretrained(str(args.language)),
        AutoTokenizer.from_pretrained(str(args.language / "qformer_tokenizer")),
    )
    model = assemble(args.language, tokens)
    model.vision_model.load_state_dict(load_file(args.vision / "vision.safetensors"))
    heads = Heads(192, model.config.qformer.vocab_size)
    model.set_trainable(("qformer",)).train()
    for parameter in model.qformer.parameters():  # the last text feed-forward is read here
        parameter.requires_grad_(True)
    model.vision_model.requires_grad_(False)
    if args.start:
        state = torch.load(args.start / "qformer.pt", weights_only=True)
        model.load_state_dict(state["model"], strict=False)
        heads.load_state_dict(state["heads"], strict=False)
    run(args, Stage(model, heads, tokens))
    kept = {n: p for n, p in model.state_dict().items() if n.split(".")[0] in KEPT}
    torch.save({"model": kept, "heads": heads.state_dict()}, args.out / "qformer.pt")


KEPT = ("query_tokens", "qformer", "language_projection")


def assemble(language: Path, tokens: Tokens) -> InstructBlip:
    """The model around a trained language model."""
    from transformers import LlamaForCausalLM

    loaded = LlamaForCausalLM.from_pretrained(str(language))
    vocab = -(-len(tokens.qformer) // 8) * 8  # type: ignore[arg-type]
    model = build(loaded.config.to_dict(), vocab, image_token_id=len(tokens.language))
    model.language_model.load_state_dict(loaded.state_dict())
    return model


def run(args: argparse.Namespace, stage: Stage) -> None:
    model, heads = stage.model, stage.heads
    state = nn.ModuleDict(
        {"qformer": model.qformer, "heads": heads, "p": model.language_projection}
    )
    state.register_parameter("query_tokens", model.query_tokens)
    opts = optimizers(model, heads, 0.02 if args.stage == "match" else 0.004)
    base = [o.param_groups[0]["lr"] for o in opts]
    args.out.mkdir(parents=True, exist_ok=True)
    step, spent = take_checkpoint(args.out, state, opts)
    start = last = time.monotonic() - spent
    recent: list[dict[str, float]] = []
    hits = 0.0
    while (elapsed := time.monotonic() - start) < 60 * args.minutes:
        factor = min(1.0, (step + 1) / 50, (1 - elapsed / (60 * args.minutes)) / 0.6)
        rng = random.Random(f"{args.stage} {step}")
        scenes = [training_scene(rng) for _ in range(PICTURES)]
        features = stage.features(scenes)
        losses = {}
        if args.stage == "match":
            losses["match"], hits = stage.match(features, scenes, rng)
            losses["told"] = stage.tell_grounded(features, scenes)
        elif args.stage == "regions":
            losses["regions"] = stage.regions(stage.look(features), scenes, rng)
        else:
            looked, bare = stage.look(features), elapsed > 60 * args.minutes * BARE_FROM
            losses["caption"], losses["align"] = stage.caption(looked, scenes, rng, bare)
            losses["regions"] = stage.regions(looked, scenes, rng)
        torch.stack(list(losses.values())).sum().backward()
        torch.nn.utils.clip_grad_norm_([p for o in opts for p in o.param_groups[0]["params"]], 1.0)
        for optimizer, lr in zip(opts, base, strict=True):
            optimizer.param_groups[0]["lr"] = lr * factor
            optimizer.step()
            optimizer.zero_grad()
        step += 1
        figures = {name: loss.item() for name, loss in losses.items()}
        recent.append(figures | {"hits": hits} if args.stage == "match" else figures)
        if step % 50 == 0:
            means = {n: round(sum(r[n] for r in recent) / len(recent), 4) for n in recent[0]}
            print(f"{step} {elapsed:.0f}s {means}", flush=True)
            recent.clear()
        if time.monotonic() - last > 120:
            save_checkpoint(args.out, state, opts, step, elapsed)
            last = time.monotonic()


if __name__ == "__main__":
    main()
