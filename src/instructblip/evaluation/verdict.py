"""What tuning did on one benchmark, in words for people who know no machine learning."""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

from instructblip.evaluation.bootstrap import LEAST_GROUPS, difference
from instructblip.evaluation.captions import CaptionTokenizer
from instructblip.evaluation.constant import most_common
from instructblip.evaluation.result import Result, constants_of, make_result
from instructblip.evaluation.scoring import scorer_of


class Outcome(IntEnum):
    """How a tuned model compares with its baselines, the worst first."""

    WORSE = 0
    CONSTANT = 1
    BLIND = 2
    UNCLEAR = 3
    BETTER = 4


TEXTS = {
    "worse": "Worse: tuning on your pictures made the answers worse.",
    "kept_worse": "Worse: every step of tuning on your pictures made the answers worse, so the "
    "start was kept. On pictures kept back the score was {0} of 100 at the start and {1} at the "
    "last step.",
    "constant": "No use yet: the answers are not better than always giving the same one.",
    "blind": "No use yet: the answers are as good with the wrong pictures.",
    "unclear": "Not clearly better: the difference to the start may be chance.",
    "few_pictures": "Not clearly better: fewer than {0} pictures cannot rule out chance.",
    "few_groups": "Not clearly better: fewer than {0} groups cannot rule out chance.",
    "better": "Better: the answers are better than before, and than always giving the same.",
    "better_but": "Better, but {0}",
    "kept": "No step was better than the start, which was kept.",
    "alike_one": "{0} of {1} pictures kept back looks like one that was trained on: the scores may "
    "be too high.",
    "alike": "{0} of {1} pictures kept back look like one that was trained on: the scores may be "
    "too high.",
    "group": "The column {0} looks like a group, such as a patient: pictures of one may be trained "
    "on and kept back; `--group {1}` keeps them on one side.",
    "of": "Of {0} kept back, {1}.",
    "pictures": "{0} pictures",
    "questions": "{0} questions about {1} pictures",
    "in_groups": "{0} of {1} groups",
    "right": "{0} were answered right after it, {1} before",
    "agree": "the answers agree by {0} of 100 after it, by {1} before",
    "score": "the score ({0}) is {1} after it, {2} before",
}
"""What a verdict states. A value ``{0}`` is a number, a text, or another of these facts."""

Fact = tuple[Any, ...]
"""A key of ``TEXTS``, and its values."""


def in_words(fact: Fact) -> str:
    """The English of a fact."""
    key, *values = fact
    return TEXTS[key].format(*(in_words(v) if isinstance(v, tuple) else v for v in values))


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """One benchmark before and after tuning, beside its baselines; scores are 0 to 100."""

    before: Result
    after: Result
    constant: Result
    """The best constant answer, scored as a model."""
    blind: Result | None
    """The tuned model with images swapped; None where too few images could be."""
    kept_start: tuple[float, float] | None = None
    """Where no step was better than the start: the scores of the first and the last validation."""
    lookalikes: frozenset[str] = frozenset()
    """The images kept back that look like one that was trained on."""
    group_column: str = ""
    """A column that looks like a group and did not split the data."""

    @property
    def outcome(self) -> Outcome:
        """The worst outcome that holds."""
        first, last = self.kept_start or (0.0, 0.0)
        if last < first or _value(self.after) < _value(self.before):
            return Outcome.WORSE
        if not _clearly_better(self.after, self.constant):
            return Outcome.CONSTANT
        if self.blind is not None and not _clearly_better(self.after, self.blind):
            return Outcome.BLIND
        better = _clearly_better(self.after, self.before) and not self.after.too_few
        return Outcome.BETTER if better else Outcome.UNCLEAR

    @property
    def is_better(self) -> bool:
        """Whether the tuned model is clearly better than its start and than all baselines."""
        return self.outcome is Outcome.BETTER

    @property
    def headline(self) -> str:
        """The outcome and the scores that show it, in two or three sentences."""
        return " ".join(map(in_words, self.headline_facts))

    @property
    def caution(self) -> str:
        """Why the scores may be too high, where the headline does not state it, and what to do;
        empty without a reason."""
        return " ".join(map(in_words, self.caution_facts))

    @property
    def headline_facts(self) -> list[Fact]:
        """The facts of the headline."""
        if self.kept_start is not None and self.kept_start[1] < self.kept_start[0]:
            first, last = self.kept_start
            return [("kept_worse", f"{first:.1f}", f"{last:.1f}")]
        outcome: Fact = (self.outcome.name.lower(),)
        if self.is_better and self._leak:
            outcome = ("better_but", *self._leak)
        elif self.outcome is Outcome.UNCLEAR and self.after.too_few:
            outcome = ("few_groups" if self._groups else "few_pictures", LEAST_GROUPS)
        facts = [outcome, ("of", self._count, self._scores)]
        return facts if self.kept_start is None else [*facts, ("kept",)]

    @property
    def caution_facts(self) -> list[Fact]:
        """The facts of the caution."""
        facts = [] if self.is_better else self._leak
        if column := self.group_column:
            facts = [*facts, ("group", repr(column), column)]
        return facts

    @property
    def _count(self) -> Fact:
        n, images = self.after.n, len({tuple(p["images"]) for p in self.after.predictions})
        count = ("pictures", images) if n == images else ("questions", n, images)
        return ("in_groups", count, self._groups) if self._groups else count

    @property
    def _scores(self) -> Fact:
        before, after = _value(self.before), _value(self.after)
        if self.after.metric in ("exact_match", "accuracy"):
            return "right", _right(self.after), _right(self.before)
        if self.after.metric == "rouge_l":
            return "agree", f"{after:.1f}", f"{before:.1f}"
        return "score", self.after.metric, f"{after:.1f}", f"{before:.1f}"

    @property
    def alike(self) -> tuple[int, int]:
        """How many of the images look like one that was trained on, and of how many."""
        images = {name for p in self.after.predictions for name in p["images"]}
        return len(images & self.lookalikes), len(images)

    @property
    def _groups(self) -> int:
        """The number of groups of the data, such as patients; 0 without."""
        return len({p["extra"].get("group") for p in self.after.predictions} - {None})

    @property
    def _leak(self) -> list[Fact]:
        alike, count = self.alike
        return [("alike_one" if alike == 1 else "alike", alike, count)] if alike else []

    @property
    def baselines(self) -> str:
        """The scores beside before and after, in one sentence."""
        share = most_common([p["answers"] for p in self.after.predictions])
        answer = self.constant.predictions[0]["prediction"]
        parts = [f"always answering {answer[:80]!r} gives {_value(self.constant):.1f}"]
        if self.blind is not None:
            parts.append(f"the tuned model with pictures swapped {_value(self.blind):.1f}")
        return (
            f"{self.after.title}: {'; '.join(parts)}; the most common answer, "
            f"{share.answer[:80]!r}, is right for {share.score:.0f} %."
        )


def constant_result(result: Result) -> Result:
    """The score of the best constant answer on the samples of ``result``, as that of a model."""
    tokenizer: CaptionTokenizer = "ptb_java" if result.tokenizer == "ptb_java" else "python"
    predictions = result.predictions
    known = result.constant or constants_of(result)[result.metric]  # as in the tables
    answer = known.answer
    sample, constant = scorer_of(result.metric).sample, []
    for prediction in predictions:
        same = {**prediction, "prediction": answer}
        same.pop("scores", None)  # of the model's answer, by functions of the user
        if "candidates" in prediction:
            chosen = [float(c == answer) for c in prediction["candidates"]]
            same |= {"probabilities": chosen, "log_likelihoods": chosen}
        constant.append({**same, "score": sample(same)})
    return make_result(result.settings, constant, tokenizer, result.image_root)


def worst(verdicts: Sequence[Verdict]) -> Verdict:
    """The verdict to report first."""
    return min(verdicts, key=lambda verdict: verdict.outcome)


def _value(result: Result) -> float:
    return result.value or 0.0


def _right(result: Result) -> int:
    return round(_value(result) * result.n / 100)


def _clearly_better(result: Result, other: Result) -> bool:
    """Whether the 95 % interval of the paired difference lies above zero."""
    change = difference(_value(result) - _value(other), result.resampled, other.resampled)
    return change.low > 0
