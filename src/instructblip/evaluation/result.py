"""The score of one benchmark with all that it depends on."""

import json
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from statistics import fmean
from types import MappingProxyType
from typing import Any, NamedTuple

from instructblip.core.files import parse_json, write_json, write_text
from instructblip.evaluation.benchmarks import groups_of
from instructblip.evaluation.bootstrap import (
    LEAST_GROUPS,
    Floats,
    Interval,
    exact_interval,
    interval,
    leave_out,
    resample,
)
from instructblip.evaluation.captions import CaptionTokenizer
from instructblip.evaluation.constant import Constant, best_constant
from instructblip.evaluation.predictions import PREDICTIONS, read_predictions
from instructblip.evaluation.scoring import Score, scorer_of

RESULT = "result.json"


@dataclass(frozen=True, kw_only=True)
class Result:
    """One benchmark, one model. ``value`` is 0 to 100 (CIDEr may exceed it), None if undefined.

    ``constants`` has the best constant answer by metric, of a benchmark of the role "own".
    ``wordings`` has the scores of the same samples under other prompts of the same task, by prompt.

    ``settings`` are those of the predictions: benchmark, model, limit, blind seed. ``predictions``
    are in the order of the data set. The bootstrap resamples ``score``, by group where samples
    have one.
    """

    benchmark: str
    title: str
    role: str
    unseen_type: bool
    metric: str
    tokenizer: CaptionTokenizer | None
    value: float | None
    n: int
    others: dict[str, float]
    settings: dict[str, Any]
    image_root: str = ""
    constants: dict[str, Constant] = field(default_factory=dict)
    wordings: dict[str, float | None] = field(default_factory=dict)
    score: Score = field(repr=False)
    predictions: list[dict[str, Any]] = field(repr=False)

    @cached_property
    def resampled(self) -> Floats:
        """Bootstrap values of the score. The seed is that of the benchmark, for every model."""
        seed = zlib.crc32(self.benchmark.encode())
        return resample(self.score.statistic, self.groups or self.n, seed)

    @cached_property
    def left_out(self) -> Floats | None:
        """The score without each group, of few groups (`bootstrap.leave_out`)."""
        return leave_out(self.score.statistic, self.groups or self.n)

    @cached_property
    def groups(self) -> list[str]:
        """The group of each sample: of the data set, such as a patient, or else its images, if
        several samples show the same; empty where each sample stands alone."""
        named = [prediction["extra"].get("group") for prediction in self.predictions]
        if None not in named:
            return named
        # the blind control was shown other images than those that it was asked about
        seen = [p.get("asked_about", p.get("images", ())) for p in self.predictions]
        unknown = self.blind and not all("asked_about" in p for p in self.predictions)
        images = ["\n".join(each) for each in seen]
        return images if not unknown and 1 < len({*images}) < len(images) else []

    @property
    def undefined(self) -> str:
        """What the samples lack where the score is not defined."""
        return scorer_of(self.metric).undefined

    @property
    def too_few(self) -> bool:
        """Whether the groups, or the samples without groups, are too few to show a difference."""
        return (len({*self.groups}) or self.n) < LEAST_GROUPS

    @property
    def interval(self) -> Interval | None:
        """The 95 % bootstrap interval, or the exact one of samples that are all right or all wrong;
        None where the score is not defined, and where all resamples have the same."""
        if self.value is None:
            return None
        if self.value in (0, 100) and scorer_of(self.metric).corpus is None:
            return exact_interval(self.value, len({*self.groups}) or self.n)
        bounds = interval(self.resampled, self.value, self.left_out)
        return None if bounds.high - bounds.low < 1e-9 else bounds  # no width is no knowledge

    @property
    def how(self) -> dict[str, Any]:
        """What the score depends on beside the model and the samples."""
        asked = {name: self.settings["benchmark"][name] for name in ("mode", "decoding", "prompt")}
        name = "groups" if "group" in self.predictions[0]["extra"] else "images"
        groups = {name: len({*self.groups})} if self.groups else {}
        matches = {name: self.settings[name] for name in ("matches",) if name in self.settings}
        return {"metric": self.metric, "tokenizer": self.tokenizer, **asked, **groups, **matches}

    @property
    def blind(self) -> bool:
        """Whether the images were swapped between samples: a control, not a score of the model."""
        return self.settings.get("blind_seed") is not None

    @property
    def constant(self) -> Constant | None:
        """The best constant answer under the metric of the score."""
        return self.constants.get(self.metric)

    @property
    def is_further(self) -> bool:
        """Whether the score is by a further metric of the benchmark."""
        return self.metric != self.settings["benchmark"]["metric"]

    def by_metric(self) -> "list[Result]":
        """The result, then one of the same predictions for each further metric of the benchmark,
        called ``benchmark metric``."""
        views: list[Result] = [self]
        for metric in self.settings["benchmark"].get("others", ()):
            scorer = scorer_of(metric)
            score = scorer.score(self.predictions, self.tokenizer or "python")
            views.append(
                replace(
                    self,
                    benchmark=f"{self.benchmark} {metric}",
                    title=f"{self.title} {metric}",
                    metric=metric,
                    value=score.value,
                    others=score.others,
                    wordings={},
                    score=score,
                )
            )
        return views

    def describe(self) -> str:
        """Return the score and what it was measured with, in one line; for an own benchmark a
        second one compares every metric with the best constant answer."""
        score, bounds = f"not defined ({self.undefined})", self.interval
        if bounds is not None:
            score = f"{self.value:.2f} [{bounds.low:.2f}, {bounds.high:.2f}]"
        elif self.value is not None:
            score = f"{self.value:.2f} (no interval)"
        blind = "; blind control" if self.blind else ""
        line = f"{self.benchmark} {score}  n {self.n}; {describe_how(self.how)}{blind}"
        lines = [_against_constant(each) for each in self.by_metric() if each.constant]
        lines += [spread.describe(self.value)] if (spread := spread_of(self.wordings)) else []
        return "\n  ".join([line, *lines])

    def to_json(self) -> dict[str, Any]:
        """Return everything but the predictions."""
        bounds, constants = self.interval, self.constants
        names = ("benchmark", "title", "role", "unseen_type", "metric", "tokenizer", "value", "n")
        return {
            **{name: getattr(self, name) for name in names},
            "interval_95": None if bounds is None else list(bounds),
            "others": self.others,
            **({"constants": {m: c._asdict() for m, c in constants.items()}} if constants else {}),
            **({"wordings": self.wordings} if self.wordings else {}),
            "settings": self.settings,
            "image_root": self.image_root,
        }

    def save(self, folder: Path) -> None:
        """Write ``result.json`` into ``folder``, beside the predictions."""
        write_json(folder / RESULT, self.to_json(), indent=2)

    def save_with_predictions(self, folder: Path) -> None:
        """Write what `load` reads, of a baseline that was not evaluated as a model."""
        lines = (json.dumps(p, ensure_ascii=False) + "\n" for p in self.predictions)
        write_text(folder / PREDICTIONS, "".join(lines))
        self.save(folder)

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
            stored = parse_json(file.read_text(encoding="utf-8"))
            by_id.sort(key=lambda prediction: prediction["index"])
            if len(by_id) == stored["n"]:
                tokenizer = stored["tokenizer"] or "python"
                known = {m: Constant(**c) for m, c in stored.get("constants", {}).items()}
                root = stored["image_root"]
                result = make_result(stored["settings"], by_id, tokenizer, root, known)
                return replace(result, wordings=stored.get("wordings", {}))
        except (KeyError, TypeError, json.JSONDecodeError) as error:
            raise ValueError(
                f"{folder} is damaged ({type(error).__name__}: {error}); evaluate again"
            ) from None
        raise ValueError(
            f"{folder}: {RESULT} is about {stored['n']} samples, {PREDICTIONS} holds "
            f"{len(by_id)}; evaluate again"
        )


class Spread(NamedTuple):
    """Scores under several wordings of a prompt: their number, mean and ends."""

    number: int
    mean: float
    low: float
    high: float

    def describe(self, frozen: float | None) -> str:
        """The spread in words, with the score of the benchmark's prompt."""
        beside = "" if frozen is None else f"; under the prompt of the benchmark {frozen:.2f}"
        return (
            f"under {self.number} other wordings: mean {self.mean:.2f}, from {self.low:.2f} to "
            f"{self.high:.2f}{beside}"
        )


def spread_of(wordings: Mapping[str, float | None]) -> Spread | None:
    """The spread of the scores that are defined; None without any."""
    scores = [score for score in wordings.values() if score is not None]
    return Spread(len(scores), fmean(scores), min(scores), max(scores)) if scores else None


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
    """Return ``Result.how`` in words: metric, tokenizer, decoding, prompt, groups."""
    tokens = f"; tokenizer {how['tokenizer']}" if how["tokenizer"] else ""
    decoding = ", ".join(f"{k} {v}" for k, v in how["decoding"].items())
    default = "greedy" if how["mode"] == "generate" else "argmax of candidates"
    kinds = [f"; intervals over {how[kind]} {kind}" for kind in ("groups", "images") if kind in how]
    groups = "".join(kinds)
    if how["mode"] == "retrieve":
        matching = ", then matching of the most similar" if how.get("matches", True) else ""
        return f"{how['metric']}; contrast{matching}{groups}"
    return (
        f"{how['metric']}{tokens}; {how['mode']} ({decoding or default}); "
        f"prompt {how['prompt'] or 'of each task'!r}{groups}"
    )


def make_result(
    settings: dict[str, Any],
    predictions: list[dict[str, Any]],
    tokenizer: CaptionTokenizer = "python",
    image_root: str = "",
    constants: Mapping[str, Constant] = MappingProxyType({}),
) -> Result:
    """Score predictions as ``settings["benchmark"]`` specifies."""
    asked = settings["benchmark"]
    metrics = (asked["metric"], *asked.get("others", ()))
    score = scorer_of(asked["metric"]).score(predictions, tokenizer)
    return Result(
        benchmark=asked["name"],
        title=asked["title"],
        role=asked["role"],
        unseen_type=asked["unseen_type"],
        metric=asked["metric"],
        tokenizer=tokenizer if any(scorer_of(m).uses_tokenizer for m in metrics) else None,
        value=score.value,
        n=len(predictions),
        others=score.others,
        settings=settings,
        image_root=image_root,
        constants=dict(constants),
        score=score,
        predictions=predictions,
    )


def constants_of(result: Result) -> dict[str, Constant]:
    """The best constant answer to the samples of a result, for each metric of its benchmark but
    ``mrr``, which has none."""
    asked = result.settings["benchmark"]
    references = [prediction["answers"] for prediction in result.predictions]
    return {
        metric: best_constant(
            references, metric, result.tokenizer or "python", asked["candidates"] or ()
        )
        for metric in (asked["metric"], *asked.get("others", ()))
        if metric != "mrr"
    }


def _against_constant(result: Result) -> str:
    constant = result.constant
    assert constant is not None
    always = f"always {constant.answer[:60]!r} would score {constant.score:.2f}"
    if result.value is None:
        return f"{result.metric} not defined; {always}"
    low = result.value if result.interval is None else result.interval.low
    above = low > constant.score
    verdict = "" if above else "; NOT BETTER than this constant answer beyond chance"
    return f"{result.metric} {result.value:.2f}; {always}{verdict}"


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
