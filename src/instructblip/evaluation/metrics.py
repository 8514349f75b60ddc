"""Scores of single answers and of rankings, equal to the official scorers.

Every accuracy is a number from 0 to 1 for one prediction; a benchmark's figure is the mean times
100. Captions are scored in ``captions.py``. Where official versions disagree, ``variant`` names
one.
"""

import math
from collections.abc import Sequence
from typing import Literal

import numpy as np

from instructblip.evaluation import normalize
from instructblip.evaluation.captions import (
    bleu,
    cider,
    meteor,
    rouge_l,
)

__all__ = [
    "anls",
    "aokvqa_accuracy",
    "auroc",
    "bleu",
    "cider",
    "exact_match",
    "gqa_accuracy",
    "ivqa_accuracy",
    "meteor",
    "okvqa_accuracy",
    "pope",
    "pope_answer",
    "rank_of",
    "retrieval_recall",
    "rouge_l",
    "textvqa_accuracy",
    "visdial_metrics",
    "vqa_accuracy",
]

VqaVariant = Literal["official_2021", "official_2017"]
GqaVariant = Literal["official_exact", "lavis", "lmms_eval"]


def vqa_accuracy(
    prediction: str, answers: Sequence[str], variant: VqaVariant = "official_2021"
) -> float:
    """Agreement with ten people: min(1, n / 3) of nine of them, averaged over who is left out.

    Source: GT-Vision-Lab/VQA ``vqaEval.py``; checked case by case against it under Python 2.7.

    - ``official_2021`` (master): prediction and answers are normalised alike, and not at all when
      all answers are equal; then "Yes." does not match ten times "yes".
    - ``official_2017`` (also LAVIS): the prediction is always normalised; the answers lose their
      punctuation only, and that only when they differ. An answer "the two dogs" is never matched.

    With a single answer the accuracy is 0: nobody is left when that person is left out.
    """
    _require_answers(answers)
    prediction = normalize.clean_space(prediction)
    if variant == "official_2021":
        answers = [normalize.clean_space(answer) for answer in answers]
    elif variant == "official_2017":
        prediction = normalize.vqa(prediction)
    else:
        raise ValueError(f"variant must be 'official_2021' or 'official_2017'; got {variant!r}")
    if len(set(answers)) > 1:
        if variant == "official_2021":
            answers = [normalize.vqa(answer) for answer in answers]
            prediction = normalize.vqa(prediction)
        else:
            answers = [normalize.vqa_punctuation(answer) for answer in answers]
    return _leave_one_out(prediction, answers)


def textvqa_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """VQA accuracy after MMF's normalisation of both sides (``m4c_evaluators.py``).

    Raises ValueError unless there are exactly ten answers, as the original asserts.
    """
    if len(answers) != 10:
        raise ValueError(
            f"TextVQA has ten answers per question; got {len(answers)}. Its test split has none: "
            "evaluate on val"
        )
    return _leave_one_out(
        normalize.textvqa(prediction), [normalize.textvqa(answer) for answer in answers]
    )


def okvqa_accuracy(
    prediction: str, answers: Sequence[str], variant: VqaVariant = "official_2021"
) -> float:
    """VQA accuracy over OK-VQA's ten answers: five people, each answer listed twice in the file.

    Five answers are doubled here, so that both ways of storing them score alike.
    """
    _require_answers(answers)
    doubled = [answer for answer in answers for _ in range(2)] if len(answers) == 5 else answers
    return vqa_accuracy(prediction, doubled, variant)


def aokvqa_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """A-OKVQA direct answers: min(1, n / 3) over all answers, raw strings, nobody left out.

    Source: allenai/aokvqa ``eval_predictions.py``. The benchmark skips questions marked
    ``difficult_direct_answer``.
    """
    _require_answers(answers)
    return min(1.0, sum(prediction == answer for answer in answers) / 3)


def gqa_accuracy(prediction: str, answer: str, variant: GqaVariant = "official_exact") -> float:
    """1 for the right answer. The variants differ in what they forgive.

    ``official_exact``: the organisers' ``eval.py``, equal strings. ``lavis``: both sides after the
    VQA normalisation. ``lmms_eval``: both without case and ASCII punctuation.
    """
    if variant == "official_exact":
        return float(prediction == answer)
    if variant == "lavis":
        rewrite = _lavis_gqa
    elif variant == "lmms_eval":
        rewrite = normalize.lmms_eval
    else:
        raise ValueError(
            f"variant must be 'official_exact', 'lavis' or 'lmms_eval'; got {variant!r}"
        )
    return float(rewrite(prediction) == rewrite(answer))


def ivqa_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """iVQA: min(1, n / 2) of its five annotators, equal strings (antoyang/just-ask).

    The original only knows answers of its own vocabulary; ranking that vocabulary gives its figure.
    """
    _require_answers(answers)
    return min(1.0, sum(prediction == answer for answer in answers) / 2)


def exact_match(prediction: str, answers: Sequence[str]) -> float:
    """1 if the prediction is one of the answers, ignoring case and outer or repeated blanks."""
    _require_answers(answers)
    return float(_plain(prediction) in {_plain(answer) for answer in answers})


def visdial_metrics(
    scores: Sequence[Sequence[float]],
    gt_index: Sequence[int],
    relevance: Sequence[Sequence[float]] | None = None,
) -> dict[str, float]:
    """Visual Dialog: r@1, r@5, r@10, mean rank and mrr; with ``relevance`` also ndcg.

    ``scores[i]`` are the scores of the options of round i, the higher the better; ranks start at 1
    and equal scores keep the order of the options. NDCG cuts at k, the number of options with
    non-zero relevance, as batra-mlp-lab/visdial-challenge-starter-pytorch does; a round without
    a relevant option is an error (the original divides by zero).
    """
    if not scores or len(scores) != len(gt_index):
        raise ValueError(
            f"need one right option per round and at least one round; got {len(scores)} rounds "
            f"and {len(gt_index)} right options"
        )
    ranks = np.array([rank_of(row, index) for row, index in zip(scores, gt_index, strict=True)])
    result = {f"r@{k}": float((ranks <= k).mean()) for k in (1, 5, 10)}
    result |= {"mean": float(ranks.mean()), "mrr": float((1 / ranks).mean())}
    if relevance is not None:
        pairs = zip(scores, relevance, strict=True)
        result["ndcg"] = float(np.mean([_ndcg(row, worth) for row, worth in pairs]))
    return result


def rank_of(scores: Sequence[float], index: int) -> int:
    """Rank, from 1, of option ``index`` by descending score."""
    values = _finite(scores)
    if not 0 <= index < len(values):
        raise ValueError(f"the right option must be one of {len(values)}; got index {index}")
    return int(np.flatnonzero(np.argsort(-values, kind="stable") == index)[0]) + 1


def auroc(labels: Sequence[int | bool], scores: Sequence[float]) -> float | None:
    """Area under the ROC curve, 0 to 1, by scikit-learn; None when only one class is present.

    Scores are taken as they are: no sigmoid, float64 (other libraries squash log-likelihoods into
    ties). Ties count one half.
    """
    if len(labels) != len(scores) or not len(labels):
        raise ValueError(f"got {len(labels)} labels and {len(scores)} scores; expected as many")
    if not set(map(int, labels)) <= {0, 1}:
        raise ValueError(f"labels must be 0 or 1; got {sorted(set(labels))[:5]}")
    values = _finite(scores)
    if len(set(map(int, labels))) < 2:
        return None
    from sklearn.metrics import roc_auc_score  # slow to import, and only two sets need it

    return float(roc_auc_score(np.asarray(labels, dtype=int), values))


def anls(prediction: str, answers: Sequence[str], threshold: float = 0.5) -> float:
    """Normalised Levenshtein similarity to the nearest answer; below ``threshold`` it is 0.

    Source: the RRC script of DocVQA and InfographicVQA. Distance between lower-cased texts with
    single blanks, divided by the length of the RAW texts; a similarity of exactly 0.5 counts.
    """
    _require_answers(answers)
    said = " ".join(prediction.strip().lower().split())
    distances = []
    for answer in answers:
        expected = " ".join(answer.strip().lower().split())
        # upper() as in the original: some letters grow ("ß" counts two).
        length = max(len(answer.upper()), len(prediction.upper()))
        distances.append(levenshtein(expected, said) / length if length else 0.0)
    similarity = 1 - min(distances)
    return similarity if similarity >= threshold else 0.0


def levenshtein(a: str, b: str) -> int:
    """Fewest insertions, deletions and substitutions of characters that turn a into b."""
    row = list(range(len(b) + 1))
    for i, left in enumerate(a, start=1):
        diagonal, row[0] = row[0], i
        for j, right in enumerate(b, start=1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (left != right))
    return row[-1]


def pope_answer(text: str) -> Literal["yes", "no"]:
    """How POPE reads a free answer: "no" if the first sentence has the word No, no or not.

    Anything else is "yes": also "", "NO" and "isn't" (AoiDragon/POPE ``evaluate.py``).
    """
    words = text.split(".")[0].replace(",", "").split(" ")
    return "no" if {"No", "not", "no"} & set(words) else "yes"


def pope(predictions: Sequence[str], labels: Sequence[str]) -> dict[str, float]:
    """POPE: accuracy, precision, recall, f1 and yes_ratio, with "yes" as the positive class.

    Where the original divides by zero (nothing said or labelled "yes") the figure is nan.
    """
    if not predictions or len(predictions) != len(labels):
        raise ValueError(f"got {len(predictions)} predictions and {len(labels)} labels")
    said = np.array([pope_answer(text) == "yes" for text in predictions])
    true = np.array([label != "no" for label in labels])
    hits = float((said & true).sum())
    precision, recall = _ratio(hits, said.sum()), _ratio(hits, true.sum())
    return {
        "accuracy": float((said == true).mean()),
        "precision": precision,
        "recall": recall,
        "f1": _ratio(2 * precision * recall, precision + recall),
        "yes_ratio": float(said.mean()),
    }


def retrieval_recall(
    scores: Sequence[Sequence[float]],
    matches: Sequence[Sequence[int]],
    ks: Sequence[int] = (1, 5, 10),
) -> dict[str, float]:
    """r@k: share of queries with at least one match among the k best (LAVIS ``retrieval.py``).

    ``scores[q]`` are the scores of all targets for query q, ``matches[q]`` the right targets: the
    five captions of a picture, or the one picture of a caption.
    """
    if not scores or len(scores) != len(matches):
        raise ValueError(f"got {len(scores)} queries and {len(matches)} lists of matches")
    best = np.array(
        [min(rank_of(row, i) for i in right) for row, right in zip(scores, matches, strict=True)]
    )
    return {f"r@{k}": float((best <= k).mean()) for k in ks}


def _leave_one_out(prediction: str, answers: Sequence[str]) -> float:
    # The original removes the person left out by comparing whole records, which are distinct by
    # their answer_id; removing by position is the same.
    hits = sum(answer == prediction for answer in answers)
    left = (hits - (answer == prediction) for answer in answers)
    return sum(min(1.0, n / 3) for n in left) / len(answers)


def _lavis_gqa(answer: str) -> str:
    return normalize.vqa_digits_and_articles(normalize.vqa_punctuation(answer))


def _ndcg(scores: Sequence[float], relevance: Sequence[float]) -> float:
    values, worth = _finite(scores), _finite(relevance)
    if len(values) != len(worth):
        raise ValueError(f"got {len(values)} scores and {len(worth)} relevances of a round")
    k = int((worth != 0).sum())
    if k == 0:
        raise ValueError("a round has no relevant option: its NDCG is not defined; leave it out")
    discounts = np.log2(np.arange(k) + 2)
    order = np.argsort(-values, kind="stable")[:k]
    best = np.sort(worth)[::-1][:k]
    return float((worth[order] / discounts).sum() / (best / discounts).sum())


def _finite(scores: Sequence[float]) -> np.ndarray:
    values = np.asarray(scores, dtype=np.float64)
    if np.isnan(values).any():
        raise ValueError("a score is NaN: the model's output is broken, and no ranking means it")
    return values


def _plain(text: str) -> str:
    return " ".join(text.lower().split())


def _ratio(part: float, whole: float) -> float:
    return float(part / whole) if whole else math.nan


def _require_answers(answers: Sequence[str]) -> None:
    if isinstance(answers, str) or not answers:
        raise ValueError(
            f"expected a list of at least one answer; got {answers!r}. A test split without "
            "answers can only be scored by its owner's server"
        )
