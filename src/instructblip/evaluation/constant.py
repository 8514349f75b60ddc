"""The majority baseline: what a model would score that gives one and the same answer to all."""

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from instructblip.evaluation.captions import CaptionTokenizer
from instructblip.evaluation.metrics import plain
from instructblip.evaluation.scoring import CAPTION_METRICS, scorer_of

MOST_TRIED, LEAST_TRIED = 100, 10
MOST_SCORED = 20_000
"""Answers that are tried on every row, and predictions that are scored in all."""


class Constant(NamedTuple):
    """One answer to all samples, and its score, 0 to 100 (CIDEr may exceed it)."""

    answer: str
    score: float


def most_common(references: Sequence[Sequence[str]]) -> Constant:
    """Return the answer that most rows have, as written, and the share of these rows in percent.

    ``references`` holds the accepted answers of each row. Case and extra white space do not count.
    Raises ValueError if there is no answer.
    """
    spellings: dict[str, Counter[str]] = {}
    rows = Counter[str]()
    for answers in references:
        for answer in answers:
            spellings.setdefault(plain(answer), Counter())[answer] += 1
        rows.update({plain(answer) for answer in answers})
    if not rows:
        raise ValueError("no answers, so there is no most common one; give the references")
    common, count = rows.most_common(1)[0]
    return Constant(spellings[common].most_common(1)[0][0], 100 * count / len(references))


def best_constant(
    references: Sequence[Sequence[str]],
    metric: str,
    tokenizer: CaptionTokenizer = "python",
    candidates: Sequence[str] = (),
) -> Constant:
    """Return the answer that scores best when it is given to every row, and its score.

    Args:
        references: the accepted answers of each row.
        metric: a name of `scoring.SCORERS`.
        candidates: answers to try as well, of a benchmark that ranks them.

    Of answers that score alike, `most_common` has precedence, then the first candidate. Up to 100
    answers are tried, fewer of more than 200 rows and at least 10: the most common ones,
    and among equally common ones those whose words are the most common. So for exact match and
    classes the result is the best one, and for long texts a lower bound on it. Any constant has an
    AUROC of 50.

    Raises ValueError if there is no answer, for an unknown metric, and for ``mrr``, which has no
    answers.
    """
    scorer_of(metric)
    if metric == "mrr":
        raise ValueError("mrr scores the order of candidates, so no answer has a score by itself")
    common = most_common(references)
    if metric == "auroc":
        return Constant(common.answer, 50.0)
    tried = min(MOST_TRIED, max(LEAST_TRIED, MOST_SCORED // len(references)))
    best, answers = Constant(common.answer, float("-inf")), [list(row) for row in references]
    for answer in dict.fromkeys([common.answer, *candidates, *_promising(references)[:tried]]):
        value = _score([answer] * len(answers), answers, metric)
        if value > best.score:
            best = Constant(answer, value)
    if tokenizer == "python":
        return best
    return Constant(best.answer, _score([best.answer] * len(answers), answers, metric, tokenizer))


def _score(
    predictions: list[str],
    answers: list[list[str]],
    metric: str,
    tokenizer: CaptionTokenizer = "python",
) -> float:
    """The score of a metric that needs answers only, 0 to 100."""
    if metric in CAPTION_METRICS:  # without the further ones that its scorer reports
        return 100 * CAPTION_METRICS[metric](predictions, answers, tokenizer).value
    rows = [
        {"prediction": prediction, "answers": row, "extra": {}}
        for prediction, row in zip(predictions, answers, strict=True)
    ]
    value = scorer_of(metric).score(rows).value
    assert value is not None
    return value


def _promising(references: Sequence[Sequence[str]]) -> list[str]:
    """The distinct answers: those of most rows first, then those whose words most rows have."""
    rows, words, spelling = Counter[str](), Counter[str](), dict[str, str]()
    for answers in references:
        for answer in answers:
            spelling.setdefault(plain(answer), answer)
        rows.update({plain(answer) for answer in answers})
        words.update({word for answer in answers for word in plain(answer).split()})
    length = sum(words.values()) / len(references)

    def overlap(answer: str) -> float:  # Dice's coefficient with a row of average length
        parts = {*answer.split()}
        return sum(words[part] for part in parts) / (len(parts) + length)

    order = sorted(rows, key=lambda answer: (-rows[answer], -overlap(answer)))
    return [spelling[answer] for answer in order]
