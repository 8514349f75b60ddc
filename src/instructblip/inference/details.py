"""What is known of an answer beside its text: how likely it was, and how far it may be trusted."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Literal

from instructblip.core.batch import Sample

FinishReason = Literal["stop", "length"]
"""OpenAI's names of what ended an answer: its end token or a stop text, or its largest length."""


@dataclass(frozen=True, slots=True)
class TokenDetail:
    """A token of an answer with its log-probability in nats, and the likeliest tokens in its place
    with theirs. The texts of all tokens joined are the answer; that of the end token is empty."""

    text: str
    log_prob: float
    likeliest: tuple[tuple[str, float], ...] = ()


@dataclass(frozen=True, slots=True)
class DetailedAnswer:
    """An answer with its log-probabilities in nats, at temperature 1 and without penalties.

    ``log_prob`` is the sum over ``tokens``, of which the end token is one if it ended the answer:
    `Engine.rank` gives the same text the same number. ``confidence`` is the probability that the
    answer is right, None without a calibration. ``blind_log_prob`` is that of the same answer about
    other images, averaged over them as probabilities; None where none were given.
    """

    text: str
    tokens: tuple[TokenDetail, ...]
    log_prob: float
    finish_reason: FinishReason
    confidence: float | None = None
    blind_log_prob: float | None = None

    @property
    def num_tokens(self) -> int:
        return len(self.tokens)


@dataclass(frozen=True, slots=True)
class Candidate:
    """A candidate with its log-likelihood in nats, and its probability among the candidates;
    ``calibrated`` says whether that is more than a softmax."""

    text: str
    log_likelihood: float
    probability: float
    calibrated: bool


def complete_texts(decode: Callable[[list[int]], str], ids: Sequence[int]) -> list[str]:
    """The text behind 0, 1, ... all of the tokens, without a character of which tokens are missing.
    Each begins with the one before, also where a tokenizer changes it."""
    texts = [""]
    for end in range(1, len(ids) + 1):
        text, known = decode(list(ids[:end])), texts[-1]
        whole = not text.endswith("\N{REPLACEMENT CHARACTER}")
        texts.append(known + text[len(known) :] if whole else known)
    return texts


def pieces_of(decode: Callable[[list[int]], str], ids: Sequence[int]) -> list[str]:
    """The text that each token adds; of a character in several tokens the last one adds it all."""
    if not ids:
        return []
    texts = complete_texts(decode, ids[:-1])
    texts.append(texts[-1] + decode(list(ids))[len(texts[-1]) :])
    return [after[len(before) :] for before, after in pairwise(texts)]


def about_other(sample: Sample, other: Sample) -> Sample:
    """The same question about the first image of another sample, in place of each of its images.
    Both samples have features."""
    assert other.features is not None
    count = len(sample.image_keys)
    return replace(
        sample, image_keys=other.image_keys[:1] * count, features=other.features[:1] * count
    )
