"""Step 1: the starter's language model, a small Llama, learns the world from text alone.

    python runs/starter/train_language.py OUT --minutes 40

OUT holds the tokenizers already. Matrices are trained with Muon, which gets over the plateau on
which AdamW leaves the binding of colours to shapes; the rest with AdamW. Loss on responses only.
Writes OUT/checkpoint.pt as it goes and resumes from it; the last state is written as a
transformers directory, text accuracy per kind of question in OUT/text_accuracy.json.
"""

import argparse
import json
import random
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from corpus import LESSONS, Lesson, document
from muon import Muon
from starter_io import save_checkpoint, take_checkpoint
from torch import nn
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from instructblip.data.scenes.language import QUESTIONS, describe
from instructblip.data.scenes.world import sample_scene

LAYERS, FIRST_LAYERS = 4, 2  # the first lesson is learned by the first layers alone
SCENES = 24  # documents a step
NOISE = 0.05  # of an embedding's size: soft prompts will not be exact words


def build(vocab_size: int) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=LAYERS,
        num_attention_heads=6,
        num_key_value_heads=6,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        rope_parameters={"rope_type": "default", "rope_theta": 1000.0},
    )
    model = LlamaForCausalLM(config)
    for layer in model.model.layers[FIRST_LAYERS:]:  # identity until they have learned something
        torch.nn.init.zeros_(layer.self_attn.o_proj.weight)
        torch.nn.init.zeros_(layer.mlp.down_proj.weight)
    return model


class Scaffold(nn.Module):
    """A short causal convolution in front of each attention's projections, taken away at the end.

    Binding ("which colour has the circle") needs the previous words at a thing's position and a
    match with the question; plain attention stays for thousands of steps on the plateau where it
    has learned neither. With the words before mixed in, one layer can do it. ``strength`` then
    goes to 0 while training goes on, and attention takes the work over: what remains is a Llama.
    """

    def __init__(self, model: LlamaForCausalLM, kernel: int = 4) -> None:
        super().__init__()
        width, self.kernel, self.strength = model.config.hidden_size, kernel, 1.0
        layers = model.model.layers
        self.weights = nn.ParameterList(torch.randn(width, 1, kernel) * 0.3 for _ in layers)
        for layer, weight in zip(layers, self.weights, strict=True):
            layer.self_attn.register_forward_pre_hook(self._hook(weight), with_kwargs=True)

    def _hook(self, weight: nn.Parameter):
        def mix(_module, args, kwargs):
            if not self.strength:
                return args, kwargs
            hidden = kwargs["hidden_states"]
            before = F.pad(hidden.transpose(1, 2), (self.kernel - 1, 0))
            mixed = F.conv1d(before, weight, groups=hidden.shape[2]).transpose(1, 2)
            return args, {**kwargs, "hidden_states": hidden + self.strength * mixed}

        return mix


@dataclass
class Progress:
    """Which lesson it is: the next one comes when 90 % of the tokens are right."""

    number: int = 0
    hits: float = 0.0
    lessons_took: float = 0.0

    @property
    def finished(self) -> bool:
        return self.number >= len(LESSONS)

    @property
    def lesson(self) -> Lesson | None:
        return None if self.finished else LESSONS[self.number]

    def note(self, hits: float, elapsed: float, step: int) -> None:
        self.hits = 0.95 * self.hits + 0.05 * hits
        if not self.finished and self.hits > 0.9:
            self.number, self.hits, self.lessons_took = self.number + 1, 0.0, elapsed
            print(f"{step} {elapsed:.0f}s lesson {self.number}", flush=True)

    def save(self, out: Path) -> None:
        (out / "progress.json").write_text(json.dumps(asdict(self)))

    @classmethod
    def load(cls, out: Path) -> "Progress":
        path = out / "progress.json"
        return cls(**json.loads(path.read_text())) if path.exists() else cls()


def optimizers(model: LlamaForCausalLM, scaffold: Scaffold) -> list[torch.optim.Optimizer]:
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    rest = [p for n, p in model.named_parameters() if p.ndim != 2 or "embed" in n]
    rest += list(scaffold.parameters())
    return [
        Muon(matrices, lr=0.02, momentum=0.95, weight_decay=0.01),
        torch.optim.AdamW(rest, lr=3e-3, betas=(0.9, 0.98), weight_decay=0.0),
    ]


def rows_of(documents, tokenizer) -> list[tuple[list[int], list[bool]]]:
    """Ids and where the loss is; every turn begins with <s>, as a prompt does after the queries."""
    texts = []
    for description, turns in documents:
        texts.append(description)
        for prompt, response in turns:
            texts += [prompt, response]
    encoded = iter(tokenizer(texts, add_special_tokens=False)["input_ids"])
    rows = []
    for _, turns in documents:
        ids = list(next(encoded))
        loss = [False] * len(ids)
        for _ in turns:
            prompt, response = next(encoded), next(encoded)
            ids += [1, *prompt, *response, 2]
            loss += [False] * (1 + len(prompt)) + [True] * (len(response) + 1)
        rows.append((ids, loss))
    return rows


def tensors(rows) -> tuple[torch.Tensor, torch.Tensor]:
    width = max(len(ids) for ids, _ in rows)
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    loss = torch.zeros(len(rows), width, dtype=torch.bool)
    for i, (row, marks) in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row)
        loss[i, : len(row)] = torch.tensor(marks)
    return ids, loss


def equal_lengths(rows, parts: int = 3) -> list[list]:
    """The rows in ``parts`` groups of similar length: padding is work for nothing."""
    rows = sorted(rows, key=lambda row: len(row[0]))
    size = -(-len(rows) // parts)
    return [rows[i : i + size] for i in range(0, len(rows), size)]


def response_logits(model, ids, loss, noise: float = 0.0) -> tuple[torch.Tensor, torch.Tensor]:
    embeds = model.model.embed_tokens(ids)
    if noise:
        embeds = embeds + noise * embeds.detach().std() * torch.randn_like(embeds)
    hidden = model.model(inputs_embeds=embeds, use_cache=False).last_hidden_state
    return model.lm_head(hidden[:, :-1][loss[:, 1:]]), ids[:, 1:][loss[:, 1:]]


@torch.no_grad()
def accuracy(model, tokenizer, number: int = 150) -> dict[str, float]:
    """Exact match per kind of question, the scene told in words, in percent."""
    rng, found = random.Random(99), {}
    for kind, ask in QUESTIONS.items():
        documents = []
        while len(documents) < number:
            words = {"word": 1, "word at": 2}.get(kind, 0)
            scene = sample_scene(rng, (1, 3), words, int(kind == "digit"), pairs="any")
            if question := ask(scene, rng):
                text = {
                    "statement": f"Based on the image, is this statement true or false? "
                    f'"{question.text}" Answer:',
                    "label": f'This is an image with: "{question.text}" written on it. '
                    "Is it correct? Answer:",
                    "science": f"Context: {question.context} Question: {question.text} Options: "
                    f"(a) {question.answer} (b) {question.others[0]}. Answer:",
                }.get(kind, f"Question: {question.text} Short answer:")
                documents.append((describe(scene, rng), [(text, question.answer)]))
        ids, loss = tensors(rows_of(documents, tokenizer))
        logits, targets = response_logits(model, ids, loss)
        right = torch.ones(len(ids), dtype=torch.bool)
        row = loss[:, 1:].nonzero()[:, 0]
        right[row[logits.argmax(-1) != targets]] = False
        found[kind] = round(100 * right.float().mean().item(), 1)
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--minutes", type=float, default=40)
    args = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(str(args.out))
    model = build(-(-len(tokenizer) // 64) * 64)
    scaffold = Scaffold(model)
    both = nn.ModuleList([model, scaffold])
    opts = optimizers(model, scaffold)
    base = [o.param_groups[0]["lr"] for o in opts]
    step, spent = take_checkpoint(args.out, both, opts)
    progress = Progress.load(args.out)
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters, step {step}")
    start = last = time.monotonic() - spent
    running: list[float] = []
    while (elapsed := time.monotonic() - start) < 60 * args.minutes:
        # What is left after the lessons: constant, then linearly down over the last 40 %; the
        # scaffold goes in the middle.
        rest = 60 * args.minutes - progress.lessons_took
        done = (elapsed - progress.lessons_took) / rest if progress.finished else 0.0
        factor = min(1.0, (step + 1) / 50, (1 - done) / 0.4)
        scaffold.strength = min(1.0, max(0.0, (0.6 - done) / 0.35))
        # What a thing's name brings has to be there early for later layers to carry it on.
        model.config.num_hidden_layers = FIRST_LAYERS if progress.number == 0 else LAYERS
        rng = random.Random(step)
        rows = rows_of([document(rng, lesson=progress.lesson) for _ in range(SCENES)], tokenizer)
        total, right = 0.0, []
        tokens = sum(sum(marks) for _, marks in rows)
        for part in equal_lengths(rows):
            logits, targets = response_logits(model, *tensors(part), noise=NOISE)
            loss = F.cross_entropy(logits, targets, reduction="sum") / tokens
            loss.backward()
            total += loss.item()
            right.append((logits.argmax(-1) == targets)[targets != tokenizer.eos_token_id])
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, lr in zip(opts, base, strict=True):
            optimizer.param_groups[0]["lr"] = lr * factor
            optimizer.step()
            optimizer.zero_grad()
        running.append(total)
        step += 1
        progress.note(torch.cat(right).float().mean().item(), elapsed, step)
        if step % 200 == 0:
            scores = accuracy(model, tokenizer)
            mean = sum(running) / len(running)
            print(
                f"{step} {elapsed:.0f}s lesson {progress.number} loss {mean:.4f} "
                f"hits {progress.hits:.3f} scaffold {scaffold.strength:.2f} {scores}",
                flush=True,
            )
            running = []
        if time.monotonic() - last > 120:
            progress.save(args.out)
            save_checkpoint(args.out, both, opts, step, elapsed)
            last = time.monotonic()
    scaffold.strength = 0.0
    model.generation_config.eos_token_id = 2
    model.save_pretrained(str(args.out))
    scores = accuracy(model, tokenizer, 400)
    (args.out / "text_accuracy.json").write_text(json.dumps({"steps": step, **scores}, indent=1))
    print(scores)


if __name__ == "__main__":
    main()
