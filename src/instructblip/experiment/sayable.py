"""Whether a frozen language model can say the answers of a data set at all, before any training."""

import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from instructblip.core.batch import Batch
from instructblip.core.example import Example
from instructblip.data.samples import pad
from instructblip.data.templates import render_prompt
from instructblip.inference.engine import Engine

LEAST_KNOWN = 2 / 3
"""Share of words with a token of their own below which the starter cannot say the answers. Its
three worked examples have 0.85 to 1; English descriptions of photos have 0.5, Chinese ones 0."""
MOST_READ = 128
"""Examples whose loss is measured."""
ROWS = 16
_WORD = re.compile(r"[\u3400-\u9fff]|[^\W_\u3400-\u9fff]+")


@dataclass(frozen=True)
class Sayable:
    """What a language model makes of answers without their images."""

    loss: float
    """Mean loss per response token in nats, given the text of the prompt alone."""
    guessing: float
    """The same for a model that guesses among all tokens."""
    known: float
    """Share of the words that are one token each; the others have to be spelled."""
    spelled: tuple[str, ...]
    """The most frequent words that have to be spelled."""

    def describe(self) -> str:
        """One or two sentences for people who know no machine learning."""
        words = f", such as {', '.join(map(repr, self.spelled))}" if self.spelled else ""
        others = f" and has to spell the others{words}" if self.known < 1 else ""
        return (
            f"The language model stays as it is. Without pictures your answers surprise it by "
            f"{self.loss:.1f} nats per token (guessing blindly: {self.guessing:.1f}); it knows "
            f"{self.known:.0%} of their words whole{others}."
        )


def sayable(engine: Engine, examples: Sequence[Example], prompts: Sequence[str | None]) -> Sayable:
    """Measure the answers of ``examples``, each under its template of ``prompts``, None for
    the first of its task."""
    counts: Counter[str] = Counter()
    for example in examples:
        for answer in example.answers:
            counts.update(_WORD.findall(answer))
    spelled = {word: n for word, n in counts.items() if engine.tokens.response_length(word) > 2}
    step = max(1, len(examples) // MOST_READ)
    texts = [
        (render_prompt(example, prompt).prompt, example.answers[0])
        for example, prompt in zip(examples, prompts, strict=True)
    ]
    size = engine.model.language_model.get_input_embeddings().weight.shape[0]
    return Sayable(
        loss=_text_loss(engine, texts[::step]),
        guessing=math.log(size),
        known=1 - sum(spelled.values()) / max(1, counts.total()),
        spelled=tuple(word for word, _ in Counter(spelled).most_common(5)),
    )


def _text_loss(engine: Engine, texts: Sequence[tuple[str, str]]) -> float:
    """Mean loss per response token of (prompt, response) without any query."""
    model, tokens = engine.model, engine.tokens
    weight = model.language_model.get_input_embeddings().weight
    total, count = 0.0, 0
    for start in range(0, len(texts), ROWS):
        part = texts[start : start + ROWS]
        prompt_ids, prompt_mask = pad([tokens.prompt(prompt) for prompt, _ in part])
        response_ids, response_mask = pad([tokens.response(response) for _, response in part])
        nothing = torch.zeros(len(part), 1, dtype=torch.int64)
        batch = Batch(
            image_index=nothing,
            qformer_ids=nothing,
            qformer_mask=nothing,
            prompt_ids=prompt_ids,
            prompt_mask=prompt_mask,
            response_ids=response_ids,
            response_mask=response_mask,
        ).to(weight.device)
        queries = weight.new_zeros(len(part), 0, weight.shape[1])  # [B, 0, L]
        with torch.inference_mode(), model.language_precision():
            losses = model.language.loss(model.language.join(queries, batch))  # [n]
        total += float(losses.sum())
        count += len(losses)
    return total / count
