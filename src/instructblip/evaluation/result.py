"""The score of one benchmark with all that it depends on."""

import json
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from instructblip.core.files import write_json
from instructblip.evaluation.benchmarks import groups_of
from instructblip.evaluation.bootstrap import Floats, Interval, interval, resample
from instructblip.evaluation.captions import CaptionTokenizer
from instructblip.evaluation.predictions import PREDICTIONS, read_predictions
from instructblip.evaluation.scoring import Score, scorer_of

RESULT = "result.json"


@dataclass(frozen=True, kw_only=True)
class Result:
    """One benchmark, one model. ``value`` is 0 to 100 (CIDEr may exceed it), None if undefined.

    ``settings`` are those of the predictions: benchmark, model, limit, blind seed. ``predictions``
    are in the order of the data set. The bootstrap resamples ``score``.
    """

    benchmark: str
    title: str
    role: str
    unseen_type: bool
    metric: str
    tokenizer: str | None
    value: float | None
    n: int
    others: dict[str, float]
    settings: dict[str, Any]
    image_root: str = ""
    score: Score = field(repr=False)
    predictions: list[dict[str, Any]] = field(repr=False)

    @cached_property
    def resampled(self) -> Floats:
        """Bootstrap values of the score. The seed is that of the benchmark, for every model."""
        return resample(self.score.samples, self.score.labels, zlib.crc32(self.benchmark.encode()))

    @property
    def interval(self) -> Interval | None:
        """The 95 % bootstrap interval; None where the score is not defined."""
        return None if self.value is None else interval(self.resampled)

    @property
    def how(self) -> dict[str, Any]:
        """What the score depends on beside the model and the samples."""
        asked = {name: self.settings["benchmark"][name] for name in ("mode", "decoding", "prompt")}
        return {"metric": self.metric, "tokenizer": self.tokenizer, **asked}

    @property
    def blind(self) -> bool:
        """Whether the images were swapped between samples: a control, not a score of the model."""
        return self.settings.get("blind_seed") is not None

    def describe(self) -> str:
        """Return the score and what it was measured with, in one line."""
        score, bounds = "not defined (one class only)", self.interval
        if bounds is not None:
            score = f"{self.value:.2f} [{bounds.low:.2f}, {bounds.high:.2f}]"
        blind = "; blind control" if self.blind else ""
        return f"{self.benchmark} {score}  n {self.n}; {describe_how(self.how)}{blind}"

    def to_json(self) -> dict[str, Any]:
        """Return everything but the predictions."""
        bounds = self.interval
        names = ("benchmark", "title", "role", "unseen_type", "metric", "tokenizer", "value", "n")
        return {
            **{name: getattr(self, name) for name in names},
            "interval_95": None if bounds is None else list(bounds),
            "others": self.others,
            "settings": self.settings,
            "image_root": self.image_root,
        }

    def save(self, folder: Path) -> None:
        """Write ``result.json`` into ``folder``, beside the predictions."""
        write_json(folder / RESULT, self.to_json(), indent=2)

    @classmethod
    def load(cls, folder: Path | str) -> "Result":
        """Read a folder that ``evaluate(..., out=folder)`` finished, and score it again."""
        folder = Path(folder)
        file = folder / RESULT
        if not file.is_file():
            raise FileNotFoundError(
                f"{folder} holds no {RESULT}: the evaluation has not finished; run it again with "
                "the same settings, and it resumes"
            )
        by_id = read_predictions(folder / PREDICTIONS)
        try:
            stored = json.loads(file.read_text(encoding="utf-8"))
            by_id.sort(key=lambda prediction: prediction["index"])
            if len(by_id) == stored["n"]:
                tokenizer = stored["tokenizer"] or "python"
                return make_result(stored["settings"], by_id, tokenizer, stored["image_root"])
        except (KeyError, TypeError, json.JSONDecodeError) as error:
            raise ValueError(
                f"{folder} is damaged ({type(error).__name__}: {error}); evaluate again"
            ) from None
        raise ValueError(
            f"{folder}: {RESULT} is about {stored['n']} samples, {PREDICTIONS} holds "
            f"{len(by_id)}; evaluate again"
        )


def load_results(folders: Sequence[Path]) -> dict[str, list[Result]]:
    """Read the results in folders that ``evaluate`` wrote, one subfolder for each benchmark.

    Returns them by the name of the folder, or by its path where two have the same name. Raises
    FileNotFoundError for a folder without results.
    """
    models = {}
    names = [folder.name for folder in folders]
    for folder in folders:
        paths = sorted(folder.glob(f"*/{RESULT}"))
        if not paths:
            raise FileNotFoundError(f"{folder} holds no results: run `instructblip evaluate` first")
        name = folder.name if names.count(folder.name) == 1 else str(folder)
        models[name] = [Result.load(path.parent) for path in paths]
    return models


def describe_how(how: Mapping[str, Any]) -> str:
    """Return ``Result.how`` in words: metric, tokenizer, decoding, prompt."""
    tokens = f"; tokenizer {how['tokenizer']}" if how["tokenizer"] else ""
    decoding = ", ".join(f"{k} {v}" for k, v in how["decoding"].items())
    return (
        f"{how['metric']}{tokens}; {how['mode']} ({decoding or 'argmax of candidates'}); "
        f"prompt {how['prompt']!r}"
    )


def make_result(
    settings: dict[str, Any],
    predictions: list[dict[str, Any]],
    tokenizer: CaptionTokenizer = "python",
    image_root: str = "",
) -> Result:
    """Score predictions as ``settings["benchmark"]`` specifies."""
    asked = settings["benchmark"]
    scorer = scorer_of(asked["metric"])
    score = scorer.score(predictions, tokenizer)
    return Result(
        benchmark=asked["name"],
        title=asked["title"],
        role=asked["role"],
        unseen_type=asked["unseen_type"],
        metric=asked["metric"],
        tokenizer=tokenizer if scorer.uses_tokenizer else None,
        value=score.value,
        n=len(predictions),
        others=score.others,
        settings=settings,
        image_root=image_root,
        score=score,
        predictions=predictions,
    )


def select_results(
    results: Mapping[str, Sequence[Result]], benchmarks: Sequence[str]
) -> dict[str, list[Result]]:
    """The results of the benchmarks, or groups of them, called ``benchmarks``. Raises ValueError
    for a name without results."""
    names = {
        result.benchmark: {result.benchmark, *groups_of(result.benchmark, result.role)}
        for each in results.values()
        for result in each
    }
    absent = set(benchmarks).difference(*names.values())
    if absent:
        raise ValueError(
            f"no results of {', '.join(sorted(absent))}: there are {', '.join(sorted(names))}"
        )
    return {
        model: [result for result in each if names[result.benchmark].intersection(benchmarks)]
        for model, each in results.items()
    }
