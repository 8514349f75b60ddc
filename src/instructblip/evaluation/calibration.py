"""What turns the log-likelihoods of one model into confidences, and its file beside the model."""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from jaxtyping import Bool
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from instructblip.core.files import write_text
from instructblip.core.problems import problems
from instructblip.core.version import __version__
from instructblip.evaluation.bootstrap import Floats
from instructblip.evaluation.confidence import (
    abstention_threshold,
    conformal_quantile,
    ece,
    fit_isotonic,
    fit_temperature,
    in_set,
    log_scaled,
)
from instructblip.evaluation.result import Result
from instructblip.evaluation.scoring import CAPTION_METRICS, is_right, right_option

CALIBRATION_FILE = "calibration.json"
FEWEST = 100
"""Samples below which nothing is fitted."""
ACCURACY = 0.9
"""Share of the answers above the abstention threshold that are right."""


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class AnswerMap(_Part):
    """From the log-probability of a generated answer to the probability that it is right: the knots
    of an isotonic regression."""

    samples: int
    scores: tuple[float, ...] = Field(min_length=1)
    chances: tuple[float, ...] = Field(min_length=1)
    abstain_below: float | None

    def confidence(self, log_prob: float) -> float:
        """The probability that the answer is right."""
        return float(np.interp(log_prob, self.scores, self.chances))


class CandidateMap(_Part):
    """From the log-likelihoods of candidates to probabilities: a temperature. ``misfits`` are
    -log p of the right candidate of each sample of the calibration, ascending."""

    samples: int
    temperature: float = Field(gt=0)
    misfits: tuple[float, ...] = Field(min_length=1)
    abstain_below: float | None

    def probabilities(self, log_likelihoods: Sequence[float]) -> list[float]:
        """The probability of each candidate."""
        return np.exp(log_scaled(log_likelihoods, self.temperature)).tolist()

    def answer_set(self, log_likelihoods: Sequence[float], coverage: float) -> list[int]:
        """The candidates of the conformal set, the likeliest first and never none. ValueError for a
        coverage that is not between 0 and 1."""
        quantile = conformal_quantile(np.array(self.misfits), coverage)
        chances = log_scaled(log_likelihoods, self.temperature)
        return in_set(chances, quantile) or [int(chances.argmax())]


class Calibration(_Part):
    """What is fitted to one model: for generated answers, for candidates, or for both.

    ``model`` is the fingerprint of the model. ``sets`` are the samples of each set and split that
    it was fitted to; with ``chose_step`` they also chose the step of the training that was kept, so
    that the model is a little better on them than on others.
    """

    version: Literal[1] = 1
    written_by: str = __version__
    model: str
    sets: dict[str, int]
    chose_step: bool = False
    answers: AnswerMap | None = None
    candidates: CandidateMap | None = None

    @property
    def id(self) -> str:
        """Changes with everything that confidences depend on."""
        text = self.model_dump_json(include={"answers", "candidates"})
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def confidence(self, prediction: Mapping[str, Any]) -> float | None:
        """The probability that a prediction of an evaluation is right; None where nothing of its
        kind was fitted."""
        if "candidates" in prediction and self.candidates is not None:
            return max(self.candidates.probabilities(prediction["log_likelihoods"]))
        if "log_prob" in prediction and self.answers is not None:
            return self.answers.confidence(prediction["log_prob"])
        return None

    def save(self, directory: Path) -> Path:
        """Write the file into a model directory."""
        path = directory / CALIBRATION_FILE
        write_text(path, self.model_dump_json(indent=1) + "\n")
        return path

    @classmethod
    def load(cls, directory: Path) -> "Calibration | None":
        """The calibration in a model directory, if there is one. ValueError for a damaged file."""
        path = directory / CALIBRATION_FILE
        if not path.is_file():
            return None
        try:
            return cls.model_validate_json(path.read_text(encoding="utf-8"))
        except ValidationError as error:
            raise ValueError(
                f"{path}: {problems(error)}; delete the file and run `instructblip calibrate` again"
            ) from None


class Fitted(NamedTuple):
    """A calibration and what to print about it."""

    calibration: Calibration
    report: str


def fit(results: Sequence[Result], model: str, chose_step: bool = False) -> Fitted:
    """Fit a calibration to results of the model with this fingerprint, whose generated predictions
    have ``log_prob``.

    Captions take part only where there are no short answers: theirs are other log-probabilities.
    Raises ValueError where neither part has at least 100 samples, right and wrong ones, and of more
    than one right answer.
    """
    generated = [r for r in results if r.settings["benchmark"]["mode"] == "generate"]
    short = [r for r in generated if r.metric not in CAPTION_METRICS]
    ranked = [r for r in results if r.settings["benchmark"]["mode"] == "rank"]
    lines, parts, used = [], dict[str, Any](), list[Result]()
    for name, chosen, fit_part in (
        ("answers", short or generated, _fit_answers),
        ("candidates", ranked, _fit_candidates),
    ):
        rows = [(p, is_right(p, r.metric)) for r in chosen for p in r.predictions]
        if problem := _problem(rows):
            lines.append(f"{name}: not calibrated, {problem}")
            continue
        parts[name], raw, calibrated = fit_part(rows)
        marks = np.array([right for _, right in rows], dtype=np.float64)
        threshold = parts[name].abstain_below
        lines.append(
            f"{name}: {len(rows)} samples, {100 * marks.mean():.0f} % right; expected calibration "
            f"error {ece(raw, marks):.3f} before, {ece(calibrated, marks):.3f} after (each half by "
            "the map of the other); "
            + (
                f"those of a confidence from {threshold:.2f} on are {100 * ACCURACY:.0f} % right"
                if threshold is not None
                else f"at no confidence are {100 * ACCURACY:.0f} % right"
            )
        )
        used += chosen
    if not parts:
        raise ValueError(
            "; ".join(lines) + f". A calibration needs at least {FEWEST} samples, right and wrong "
            "ones, and of more than one right answer: name larger sets with --benchmarks"
        )
    sets = {_name(result): result.n for result in used}
    made = Calibration(model=model, sets=sets, chose_step=chose_step, **parts)
    return Fitted(made, "\n".join(lines))


def _name(result: Result) -> str:
    asked = result.settings["benchmark"]
    return f"{asked['source']} {asked['split']}"


def calibrated_on(result: Result) -> bool:
    """Whether the confidences of a result were fitted to samples of the same set and split."""
    return _name(result) in result.settings.get("calibration", {}).get("sets", ())


Row = tuple[Mapping[str, Any], bool]
"""A prediction, and whether it is right."""


def _problem(rows: Sequence[Row]) -> str | None:
    """Why nothing can be fitted to these samples."""
    if len(rows) < FEWEST:
        return f"{len(rows)} samples are fewer than {FEWEST}"
    if len({right for _, right in rows}) == 1:
        return f"all {len(rows)} answers are {'right' if rows[0][1] else 'wrong'}"
    answers = {prediction["answers"][0] for prediction, _ in rows}
    if len(answers) == 1:
        return f"the right answer is {answers.pop()[:60]!r} for all {len(rows)} samples"
    return None


def _halves(n: int) -> Bool[np.ndarray, " n"]:
    """Marks of a random half of n samples, always the same."""
    return np.random.default_rng(n).permutation(n) % 2 == 0


def _fit_answers(rows: Sequence[Row]) -> tuple[AnswerMap, Floats, Floats]:
    """The map, and the confidences of the rows before and after: after by the map of the half that
    they are not in."""
    scores = np.array([p["log_prob"] for p, _ in rows])
    marks = np.array([right for _, right in rows], dtype=np.float64)
    knots, half = fit_isotonic(scores, marks), _halves(len(rows))
    after = np.empty(len(rows))
    for side in (half, ~half):
        after[side] = np.interp(scores[side], *fit_isotonic(scores[~side], marks[~side]))
    fitted = AnswerMap(
        samples=len(rows),
        scores=tuple(knots[0]),
        chances=tuple(knots[1]),
        abstain_below=abstention_threshold(after, marks, ACCURACY),
    )
    return fitted, np.exp(scores), after


def _fit_candidates(rows: Sequence[Row]) -> tuple[CandidateMap, Floats, Floats]:
    """As `_fit_answers`."""
    scores = [p["log_likelihoods"] for p, _ in rows]
    places = [right_option(p) for p, _ in rows]
    marks = np.array([right for _, right in rows], dtype=np.float64)
    half, after = _halves(len(rows)), np.empty(len(rows))
    for side in (half, ~half):
        others = np.flatnonzero(~side)
        temperature = fit_temperature([scores[i] for i in others], marks[others])
        after[side] = [_surest(scores[i], temperature) for i in np.flatnonzero(side)]
    temperature = fit_temperature(scores, marks)
    misfits = [
        -float(log_scaled(row, temperature)[place])
        for row, place in zip(scores, places, strict=True)
    ]
    fitted = CandidateMap(
        samples=len(rows),
        temperature=temperature,
        misfits=tuple(sorted(misfits)),
        abstain_below=abstention_threshold(after, marks, ACCURACY),
    )
    return fitted, np.array([_surest(row, 1.0) for row in scores]), after


def _surest(log_likelihoods: Sequence[float], temperature: float) -> float:
    """The probability of the likeliest candidate."""
    return float(np.exp(log_scaled(log_likelihoods, temperature).max()))
