"""Step 1: the starter's language model, a small Llama, learns the world from text alone.

    python runs/starter/train_language.py OUT --minutes 36
    python runs/starter/train_language.py OUT --term 2 --minutes 36

OUT holds the tokenizers already. The second term starts from the model of the first, with lessons
of its own (`corpus.TERMS`). Matrices are trained with Muon, which gets over the plateau on
which AdamW leaves the binding of colours to shapes; the rest with AdamW. Loss on responses only.
Writes OUT/termN/checkpoint.pt as it goes and resumes from it; the last state is written to OUT as a
transformers directory, text accuracy per kind of question to OUT/termN/text_accuracy.json.
"""

import argparse
import json
import random
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from corpus import TERMS, Document, document, things
from muon import Muon
from starter_io import save_checkpoint, take_checkpoint
from torch import Tensor
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from instructblip.scenes.language import describe
from instructblip.scenes.questions import QUESTIONS
from instructblip.scenes.world import sample_scene

SCENES = 24  # documents a step
LESSON_STEPS = 300
RATES = (1.0, 0.5)  # of the learning rates in each term
SUMMED = (0.5, 0.85)  # share of documents told thing by thing
NOISE = 0.05  # of an embedding's size: soft prompts will not be exact words


def build(vocab_size: int) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=6,
        num_key_value_heads=6,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        rope_parameters={"rope_type": "default", "rope_theta": 1000.0},
    )
    return LlamaForCausalLM(config)


def optimizers(model: LlamaForCausalLM) -> list[torch.optim.Optimizer]:
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    rest = [p for n, p in model.named_parameters() if p.ndim != 2 or "embed" in n]
    return [
        Muon(matrices, lr=0.02, momentum=0.95, weight_decay=0.01),
        torch.optim.AdamW(rest, lr=3e-3, betas=(0.9, 0.98), weight_decay=0.0),
    ]


Row = tuple[list[list[int]], list[bool]]


def rows_of(documents: list[Document], tokenizer, summed: float) -> list[Row]:
    """The tokens of each position, one or a thing's, and where the loss is.

    A share ``summed`` of the documents begins with one position a thing, the others with words.
    Every turn begins with <s>, as a prompt does after the queries.
    """
    few = round(summed * len(documents))
    starts = [one.things for one in documents[:few]]
    starts += [(one.description,) for one in documents[few:]]
    texts = []
    for start, one in zip(starts, documents, strict=True):
        texts += [*start, *(text for turn in one.turns for text in turn)]
    encoded = iter(tokenizer(texts, add_special_tokens=False)["input_ids"])
    rows = []
    for i, (start, one) in enumerate(zip(starts, documents, strict=True)):
        ids = [next(encoded) for _ in start]
        if i >= few:
            ids = [[token] for token in ids[0]]
        loss = [False] * len(ids)
        for _ in one.turns:
            prompt, response = next(encoded), next(encoded)
            ids += [[token] for token in (1, *prompt, *response, 2)]
            loss += [False] * (1 + len(prompt)) + [True] * (len(response) + 1)
        rows.append((ids, loss))
    return rows


def tensors(rows: list[Row]) -> tuple[Tensor, Tensor]:
    """-> ids [rows, positions, tokens of a position], -1 where there is none; loss."""
    width = max(len(ids) for ids, _ in rows)
    depth = max(len(position) for ids, _ in rows for position in ids)
    ids = torch.full((len(rows), width, depth), -1)
    loss = torch.zeros(len(rows), width, dtype=torch.bool)
    for i, (row, marks) in enumerate(rows):
        ids[i, : len(row)] = torch.tensor([p + [-1] * (depth - len(p)) for p in row])
        loss[i, : len(row)] = torch.tensor(marks)
    return ids, loss


def equal_lengths(rows, parts: int = 3) -> list[list]:
    """The rows in ``parts`` groups of similar length: padding is work for nothing."""
    rows = sorted(rows, key=lambda row: len(row[0]))
    size = -(-len(rows) // parts)
    return [rows[i : i + size] for i in range(0, len(rows), size)]


def response_logits(model, ids: Tensor, loss: Tensor, noise: float = 0.0) -> tuple[Tensor, Tensor]:
    there = ids >= 0
    embeds = (model.model.embed_tokens(ids.clamp(min=0)) * there[..., None]).sum(2)
    embeds = embeds / there.sum(2, keepdim=True).clamp(min=1).sqrt()
    if noise:
        embeds = embeds + noise * embeds.detach().std() * torch.randn_like(embeds)
    hidden = model.model(inputs_embeds=embeds, use_cache=False).last_hidden_state
    return model.lm_head(hidden[:, :-1][loss[:, 1:]]), ids[:, 1:, 0][loss[:, 1:]]


@torch.no_grad()
def accuracy(model, tokenizer, number: int = 150, summed: float = 0.0) -> dict[str, float]:
    """Exact match per kind of question, in percent; the scene told in words, or ``summed``."""
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
                turns = [(text, question.answer)]
                documents.append(Document(describe(scene, rng), things(scene, rng), turns))
        ids, loss = tensors(rows_of(documents, tokenizer, summed))
        logits, targets = response_logits(model, ids, loss)
        right = torch.ones(len(ids), dtype=torch.bool)
        row = loss[:, 1:].nonzero()[:, 0]
        right[row[logits.argmax(-1) != targets]] = False
        found[kind] = round(100 * right.float().mean().item(), 1)
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--minutes", type=float, default=36)
    parser.add_argument("--term", type=int, choices=(1, 2), default=1)
    args = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(str(args.out))
    model = build(-(-len(tokenizer) // 64) * 64)
    if args.term == 2:
        model.load_state_dict(LlamaForCausalLM.from_pretrained(str(args.out)).state_dict())
    opts = optimizers(model)
    base = [o.param_groups[0]["lr"] * RATES[args.term - 1] for o in opts]
    lessons, checkpoints = TERMS[args.term - 1], args.out / f"term{args.term}"
    step, spent = take_checkpoint(checkpoints, model, opts)
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters, step {step}")
    start = last = time.monotonic() - spent
    hits, running = 0.0, []
    while (elapsed := time.monotonic() - start) < 60 * args.minutes:
        factor = min((step + 1) / 50, 1 - elapsed / (60 * args.minutes))
        rng = random.Random(step + 1_000_000 * (args.term - 1))
        number = step // LESSON_STEPS
        given = lessons[number] if number < len(lessons) else None
        # Some of everything from the start: tokens that are only ever wrong would become alike.
        mixed = [given, given, given, None] * (SCENES // 4)
        documents = [document(rng, lesson=one) for one in mixed]
        rng.shuffle(documents)
        rows = rows_of(documents, tokenizer, SUMMED[args.term - 1])
        right = []
        total, tokens = 0.0, sum(sum(marks) for _, marks in rows)
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
        hits = 0.95 * hits + 0.05 * torch.cat(right).float().mean().item()
        if step % 100 == 0:
            mean, running = sum(running) / len(running), []
            print(f"{step} {elapsed:.0f}s loss {mean:.4f} hits {hits:.3f}", flush=True)
        if step % 400 == 0:
            for summed in (0.0, 1.0):
                print(
                    f"  summed {summed:.0f}: {accuracy(model, tokenizer, 100, summed)}", flush=True
                )
        if time.monotonic() - last > 120:
            save_checkpoint(checkpoints, model, opts, step, elapsed)
            last = time.monotonic()
    model.generation_config.eos_token_id = 2
    model.save_pretrained(str(args.out))
    told = {how: accuracy(model, tokenizer, 400, share) for how, share in TOLD.items()}
    (checkpoints / "text_accuracy.json").write_text(json.dumps({"steps": step, **told}, indent=1))
    print(told)


TOLD = {"words": 0.0, "things": 1.0}
"""A scene told word by word, and with one position for each thing."""


if __name__ == "__main__":
    main()
