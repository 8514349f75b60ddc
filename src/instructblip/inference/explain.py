"""An answer with a map of each of its words: what in the image the word comes from."""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from instructblip.core.batch import Batch
from instructblip.data.tokens import Tokens
from instructblip.model.explain import Method, word_maps
from instructblip.model.instructblip import InstructBlip

_UNSPACED = "\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff"
_WORD = re.compile(f"[{_UNSPACED}]|[^\\s{_UNSPACED}]+")
"""What is between spaces; of Chinese and Japanese, which have none, each character."""


def measured() -> dict[str, Any]:
    """How often the peak of the best ``method`` is on the thing that a question of Scenes asks
    about: ``right`` in percent of right answers, with its ``interval`` over seeds, ``chance`` and
    plain ``attention`` beside it. `runs/trust/explain.py` writes it."""
    return json.loads(Path(__file__).with_suffix(".json").read_text(encoding="utf-8"))


@dataclass(frozen=True)
class Explanation:
    """``maps`` of the words and the map of the ``whole`` answer are over the grid of the image
    encoder, which covers the part of the image that the model sees (`ImageTransform.seen`). What
    they measure depends on ``method`` (`model/explain.py`). ``scores`` are log-probabilities of the
    words in nats, each after the words before it."""

    answer: str
    words: tuple[str, ...]
    scores: tuple[float, ...]
    maps: Float[Tensor, "W G G"]
    whole: Float[Tensor, "G G"]
    method: Method


def explain(
    model: InstructBlip,
    tokens: Tokens,
    batch: Batch,
    method: Method,
    chunk: int,
    on_pass: Callable[[], None],
) -> list[Explanation]:
    """An explanation for each image of the only sample of ``batch``, whose response is the answer
    to explain. Raises ValueError for one without a word."""
    ids = batch.host.response_ids[0].tolist()[:-1]  # without the end token
    answer = tokens.decode(ids)
    words = tuple(_WORD.findall(answer))
    if not words:
        raise ValueError(
            "an empty answer has no words to explain; give the answer to explain, or another "
            "instruction if the model answers with nothing"
        )
    of_words = torch.zeros(len(words) + 1, len(ids) + 1)  # [W+1, R], the whole answer last
    of_words[-1, :-1] = 1
    start, before = 0, ""
    for end in range(1, len(ids) + 1):
        read = tokens.decode(ids[:end])
        if read == before and end < len(ids):
            continue  # a space, which belongs to the word after it
        begun = len(_WORD.findall(read))
        of_words[min(max(begun, 1), len(words)) - 1, start:end] = 1
        start, before = end, read
    scores, maps = word_maps(model, batch, of_words, method, chunk, on_pass)
    return [
        Explanation(answer, words, tuple(scores[:-1].tolist()), each[:-1], each[-1], method)
        for each in maps.unbind(1)
    ]
