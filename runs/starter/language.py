"""Step 1: the starter's language model, a small Llama, learns the world from text alone.

    python runs/starter/language.py TOKENIZERS OUT --steps 3900
    python runs/starter/language.py TOKENIZERS OUT2 --term 2 --start OUT/last --steps 3550

The second term starts from the model of the first, with lessons of its own (`corpus.TERMS`).
Matrices are trained with Muon: with AdamW the binding of colours to shapes stays on a plateau. Loss
on responses only. OUT is a run directory: it resumes, OUT/last is a transformers directory, and
OUT/text_accuracy.json has the accuracy of each kind of question.
"""

import argparse
import json
import random
import sys
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from corpus import TERMS, Document, document, things
from lessons import Lesson, teach
from torch import Tensor, nn
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from instructblip.core.batch import LossOutput
from instructblip.scenes.language import describe
from instructblip.scenes.questions import QUESTIONS
from instructblip.scenes.world import sample_scene

SCENES = 24  # documents a step
LESSON_SHARE = 1 / 13  # of the steps of a term
RATES = (5e-3, 2.5e-3)  # highest learning rate of each term
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


def equal_lengths(rows: list[tuple[int, Row]], parts: int = 3) -> list[list[tuple[int, Row]]]:
    """The rows in ``parts`` groups of similar length: padding is work for nothing."""
    rows = sorted(rows, key=lambda row: len(row[1][0]))
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


class TextModel(nn.Module):
    """The language model under the training loop. A lesson's content are ids and loss marks."""

    def __init__(self, model: LlamaForCausalLM) -> None:
        super().__init__()
        self.model = model

    def loss(self, lesson: Lesson) -> LossOutput:
        total = torch.zeros(())
        sums = torch.zeros(len(lesson))
        for rows in equal_lengths(lesson.content):
            ids, loss = tensors([row for _, row in rows])
            logits, targets = response_logits(self.model, ids, loss, noise=NOISE)
            losses = F.cross_entropy(logits, targets, reduction="none")
            total = total + losses.sum()
            places = torch.tensor([place for place, _ in rows])[loss[:, 1:].nonzero()[:, 0]]
            sums.index_add_(0, places, losses.detach())
        tokens = lesson.response_mask.sum(1)
        return LossOutput(total, tokens.sum(), sums, tokens)


def lesson_of(step: int, steps: int, term: int, tokenizer: Any) -> Lesson:
    """The documents of one of ``steps`` steps: three quarters on the lesson, the rest on all."""
    rng = random.Random(step + 1_000_000 * (term - 1))
    lessons, number = TERMS[term - 1], int(step / (steps * LESSON_SHARE))
    given = lessons[number] if number < len(lessons) else None
    # Some of everything from the start: tokens that are only ever wrong would become alike.
    documents = [document(rng, lesson=one) for one in [given, given, given, None] * (SCENES // 4)]
    rng.shuffle(documents)
    rows = rows_of(documents, tokenizer, SUMMED[term - 1])
    _, loss = tensors(rows)
    return Lesson.of("text", step, list(enumerate(rows)), loss[:, 1:].long())


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("tokenizers", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--term", type=int, choices=(1, 2), default=1)
    parser.add_argument("--start", type=Path)
    parser.add_argument("--steps", type=int, default=3900)
    args = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(str(args.tokenizers))
    model = build(-(-len(tokenizer) // 64) * 64)
    if args.start:
        model = LlamaForCausalLM.from_pretrained(str(args.start))
    model.generation_config.eos_token_id = 2

    def make(step: int) -> Lesson:
        return lesson_of(step, args.steps, args.term, tokenizer)

    rate = RATES[args.term - 1]
    if not teach(TextModel(model), make, args.out, args.steps, rate, model.save_pretrained):
        sys.exit("stopped: run it again to resume")
    model.eval()
    scores = {how: accuracy(model, tokenizer, 400, share) for how, share in FORMS.items()}
    text = json.dumps({"steps": args.steps, **scores}, indent=1)
    (args.out / "text_accuracy.json").write_text(text)
    print(scores)


FORMS = {"words": 0.0, "things": 1.0}
"""A scene described word by word, and with one position for each thing."""


if __name__ == "__main__":
    main()
