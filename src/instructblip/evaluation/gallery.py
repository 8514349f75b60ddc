"""The report's gallery: some samples of each benchmark, with what every model made of them."""

import base64
import hashlib
import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from instructblip.data.images import load_image
from instructblip.evaluation.result import Result

THUMBNAIL = 288
RIGHT_FROM = 0.5
"""A score from here on counts as right: full marks of accuracies, a close caption."""
RANKS = ("mrr",)
"""Metrics whose score is one over a rank: right is the first alone."""
MAX_FRAMES = 4
MAX_CANDIDATES = 5


@dataclass(frozen=True, slots=True)
class Option:
    """A ranked candidate; ``probability`` among the candidates of its sample."""

    text: str
    probability: float
    chosen: bool
    expected: bool


@dataclass(frozen=True, slots=True)
class Answer:
    """What one model said. ``options`` are the most probable candidates, if it ranked."""

    model: str
    colour: int
    text: str
    score: float
    right: bool
    options: tuple[Option, ...]


@dataclass(frozen=True, slots=True)
class Card:
    """One sample. ``change`` compares the last model with the baseline, the first one of all:
    gained, lost or same; None where the baseline has no answer or is the last model itself.
    ``pictures`` are data addresses, None for a picture that could not be read."""

    benchmark: str
    title: str
    id: str
    pictures: tuple[str | None, ...]
    prompt: str
    references: tuple[tuple[str, int], ...]
    answers: tuple[Answer, ...]
    change: str | None

    @property
    def right(self) -> bool:
        """Whether the last model, the one the report is about, is right."""
        return self.answers[-1].right


def make_cards(models: Mapping[str, Sequence[Result]], per_set: int) -> list[Card]:
    """Up to ``per_set`` samples of each benchmark, half of them wrong where there are as many.

    Models of a blind control are left out: they saw other pictures.
    """
    seeing = {
        model: {r.benchmark: r for r in results}
        for model, results in models.items()
        if not any(r.blind for r in results)
    }
    if not seeing:
        return []
    colours = {model: place for place, model in enumerate(models)}
    baseline = next(iter(models))
    cards = []
    for name, result in next(reversed(seeing.values())).items():
        own = {model: results[name] for model, results in seeing.items() if name in results}
        for index in _choose(result, per_set):
            cards.append(_card(result, index, own, colours, baseline))
    return cards


def _choose(result: Result, count: int) -> list[int]:
    """Indices of samples, right and wrong in turn, the same ones every time."""

    def key(index: int) -> str:
        return hashlib.sha256(str(result.predictions[index]["id"]).encode()).hexdigest()

    order = sorted(range(result.n), key=key)
    marks = [_is_right(prediction, result.metric) for prediction in result.predictions]
    right = [i for i in order if marks[i]]
    wrong = [i for i in order if not marks[i]]
    half = count // 2
    few_wrong = min(len(wrong), max(half, count - len(right)))
    return sorted(right[: count - few_wrong] + wrong[:few_wrong])


def _is_right(prediction: Mapping[str, Any], metric: str) -> bool:
    return prediction["score"] >= (1.0 if metric in RANKS else RIGHT_FROM)


def _card(
    result: Result,
    index: int,
    own: Mapping[str, Result],
    colours: Mapping[str, int],
    baseline: str,
) -> Card:
    sample = result.predictions[index]
    answers = tuple(
        _answer(model, colours[model], one.predictions[index], result.metric)
        for model, one in own.items()
    )
    change = None
    if answers[0].model == baseline and len(answers) > 1:
        before, after = answers[0].right, answers[-1].right
        change = "same" if before == after else "gained" if after else "lost"
    names = sample["images"]
    if len(names) > MAX_FRAMES:
        names = [names[i * len(names) // MAX_FRAMES] for i in range(MAX_FRAMES)]
    return Card(
        benchmark=result.benchmark,
        title=result.title,
        id=str(sample["id"]),
        pictures=tuple(_picture(name, Path(result.image_root)) for name in names),
        prompt=sample["prompt"],
        references=tuple(_count(sample["answers"])),
        answers=answers,
        change=change,
    )


def _answer(model: str, colour: int, prediction: Mapping[str, Any], metric: str) -> Answer:
    options: list[Option] = []
    if "candidates" in prediction:
        expected = set(prediction["answers"])
        ranked = zip(prediction["candidates"], prediction["probabilities"], strict=True)
        options = [
            Option(text, p, text == prediction["prediction"], text in expected)
            for text, p in sorted(ranked, key=lambda pair: -pair[1])[:MAX_CANDIDATES]
        ]
    return Answer(
        model,
        colour,
        prediction["prediction"],
        prediction["score"],
        _is_right(prediction, metric),
        tuple(options),
    )


def _count(answers: Sequence[str]) -> Iterator[tuple[str, int]]:
    """Distinct answers with their numbers, the most frequent first."""
    counted: dict[str, int] = {}
    for answer in answers:
        counted[answer] = counted.get(answer, 0) + 1
    yield from sorted(counted.items(), key=lambda pair: -pair[1])


def _picture(name: str, root: Path) -> str | None:
    """Results may have left the machine with the pictures: their figures are shown all the same."""
    try:
        return thumbnail(name, root)
    except (OSError, ValueError):
        return None


def thumbnail(name: str, root: Path) -> str:
    """A picture as a data address: small ones as PNG without loss, others as a small JPEG."""
    image = load_image(name, root)
    small = max(image.size) <= THUMBNAIL // 2
    if not small:
        image.thumbnail((THUMBNAIL, THUMBNAIL))
    data = io.BytesIO()
    image.save(data, "PNG" if small else "JPEG", quality=82, optimize=True)
    kind = "png" if small else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(data.getvalue()).decode()}"
