"""Scores of single answers and of rankings, equal to those of the official scorers.

An accuracy is a number from 0 to 1 for one prediction; the score of a benchmark is their mean times
100. ``captions.py`` scores captions. Where official versions disagree, ``variant`` chooses one.
"""

from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np

from instructblip.evaluation import normalize

VqaVariant = Literal["official_2021", "official_2017"]
OkvqaVariant = Literal["official_2021", "official_2017", "lavis"]
GqaVariant = Literal["official_exact", "lavis", "lmms_eval"]
_GQA: dict[GqaVariant, Callable[[str], str]] = {
    "official_exact": str,
    "lavis": lambda answer: normalize.vqa_digits_and_articles(normalize.vqa_punctuation(answer)),
    "lmms_eval": normalize.lmms_eval,
}


def vqa_accuracy(
    prediction: str, answers: Sequence[str], variant: VqaVariant = "official_2021"
) -> float:
    """Agreement with ten annotators: min(1, n / 3) over nine, averaged over who is left out.

    Official VQA evaluation, GT-Vision-Lab/VQA ``vqaEval.py``, compared with it case by case under
    Python 2.7. A single answer scores 0, since nobody remains when that annotator is left out.

    - ``official_2021`` (master) normalises prediction and answers alike, and neither of them when
      all answers are equal: "Yes." does not match ten times "yes".
    - ``official_2017`` (also LAVIS) always normalises the prediction. The answers lose only their
      punctuation, and only when they differ: an answer "the two dogs" is never matched.
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
    """VQA accuracy after normalising both sides as MMF does (facebookresearch/mmf
    ``m4c_evaluators.py``: ``TextVQAAccuracyEvaluator``).

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
    prediction: str, answers: Sequence[str], variant: OkvqaVariant = "official_2021"
) -> float:
    """VQA accuracy over OK-VQA's ten answers: five annotators, each listed twice in the file.

    Five answers are doubled, so that both ways of storing them score alike. ``lavis`` is
    ``official_2017`` of ``normalize.lemmatize(prediction)``.
    """
    _require_answers(answers)
    if variant == "lavis":
        prediction, variant = normalize.lemmatize(prediction), "official_2017"
    doubled = [answer for answer in answers for _ in range(2)] if len(answers) == 5 else answers
    return vqa_accuracy(prediction, doubled, variant)


def aokvqa_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """A-OKVQA direct answers: min(1, n / 3) over all answers, equal strings, nobody left out.

    Source: allenai/aokvqa ``evaluation/eval_predictions.py``, which skips the questions marked
    ``difficult_direct_answer``; LAVIS (``tasks/vqa.py``: ``AOKVQATask``) scores them too.
    """
    _require_answers(answers)
    return min(1.0, sum(prediction == answer for answer in answers) / 3)


def gqa_accuracy(prediction: str, answer: str, variant: GqaVariant = "official_exact") -> float:
    """Return 1 for the right answer. The variants differ in how they normalise both sides:

    - ``official_exact`` not at all (GQA ``eval.py``);
    - ``lavis`` as VQA does (LAVIS ``tasks/vqa.py``: ``GQATask``);
    - ``lmms_eval`` without case and ASCII punctuation (lmms-eval ``gqa.yaml``).
    """
    if variant not in _GQA:
        raise ValueError(
            f"variant must be 'official_exact', 'lavis' or 'lmms_eval'; got {variant!r}"
        )
    return float(_GQA[variant](prediction) == _GQA[variant](answer))


def ivqa_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """iVQA: min(1, n / 2) over its five annotators, equal strings.

    Source: antoyang/just-ask ``util.py``: ``compute_aggreeings``, which knows only the answers of
    its vocabulary; ranking that vocabulary gives its score.
    """
    _require_answers(answers)
    return min(1.0, sum(prediction == answer for answer in answers) / 2)


def exact_match(prediction: str, answers: Sequence[str]) -> float:
    """Return 1 if the prediction is one of the answers, ignoring case and extra white space."""
    _require_answers(answers)
    return float(plain(prediction) in {plain(answer) for answer in answers})


def visdial_metrics(
    scores: Sequence[Sequence[float]],
    gt_index: Sequence[int],
    relevance: Sequence[Sequence[int | float]] | None = None,
) -> dict[str, float]:
    """Visual Dialog: r@1, r@5, r@10, mean rank and mrr; with ``relevance`` also ndcg.

    ``scores[i]`` are the scores of the options of round i, higher is better. Ranks start at 1;
    equal scores keep the order of the options. NDCG cuts at k, the number of options with non-zero
    relevance (batra-mlp-lab/visdial-challenge-starter-pytorch ``visdialch/metrics.py``). A round
    without a relevant option raises ValueError, where the original divides by zero.
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
        result["ndcg"] = float(np.mean([_ndcg(row, gains) for row, gains in pairs]))
    return result


def rank_of(scores: Sequence[float], index: int) -> int:
    """Return the rank, from 1, of option ``index`` by descending score."""
    values = _without_nan(scores)
    if not 0 <= index < len(values):
        raise ValueError(f"the right option must be one of {len(values)}; got index {index}")
    return int(np.flatnonzero(np.argsort(-values, kind="stable") == index)[0]) + 1


def rank_among(scores: np.ndarray, right: Sequence[int]) -> int:
    """Return the rank, from 1, of the best of the ``right`` ones; others of equal score come before
    it, so that a model that scores all alike retrieves nothing."""
    values = _without_nan(scores)
    better = values >= values[list(right)].max()
    better[list(right)] = False
    return int(better.sum()) + 1


def auroc(labels: Sequence[int | bool], scores: Sequence[float]) -> float | None:
    """Area under the ROC curve, 0 to 1, by scikit-learn; None when only one class is present.

    Scores stay float64 and get no sigmoid, which would turn log-likelihoods into ties. A tie counts
    one half.
    """
    if len(labels) != len(scores) or not len(labels):
        raise ValueError(f"got {len(labels)} labels and {len(scores)} scores; expected as many")
    if not set(map(int, labels)) <= {0, 1}:
        raise ValueError(f"labels must be 0 or 1; got {sorted(set(labels))[:5]}")
    values = _without_nan(scores)
    if len(set(map(int, labels))) < 2:
        return None
    from sklearn.metrics import roc_auc_score  # slow to import, and only two sets need it

    return float(roc_auc_score(np.asarray(labels, dtype=int), values))


def anls(prediction: str, answers: Sequence[str], threshold: float = 0.5) -> float:
    """Normalised Levenshtein similarity to the nearest answer; 0 below ``threshold``.

    Source: the Robust Reading Competition's script for DocVQA and InfographicVQA. A similarity of
    exactly 0.5 counts.
    """
    _require_answers(answers)
    predicted = plain(prediction)
    distances = []
    for answer in answers:
        # As in the original: the distance of the cleaned texts is divided by the length of the raw
        # ones, and of their upper case, where some letters grow ("ß" has two).
        length = max(len(answer.upper()), len(prediction.upper()))
        distances.append(_levenshtein(plain(answer), predicted) / length if length else 0.0)
    similarity = 1 - min(distances)
    return similarity if similarity >= threshold else 0.0


def _levenshtein(a: str, b: str) -> int:
    """Fewest insertions, deletions and substitutions of characters that turn a into b."""
    row = list(range(len(b) + 1))  # distances of the first i letters of a to every start of b
    for i, left in enumerate(a, start=1):
        diagonal, row[0] = row[0], i
        for j, right in enumerate(b, start=1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (left != right))
    return row[-1]


def _leave_one_out(prediction: str, answers: Sequence[str]) -> float:
    # vqaEval.py compares whole records to find the annotator to leave out. They are distinct by
    # answer_id, so leaving out by position is the same.
    hits = sum(answer == prediction for answer in answers)
    left = (hits - (answer == prediction) for answer in answers)
    return sum(min(1.0, n / 3) for n in left) / len(answers)


def _ndcg(scores: Sequence[float], relevance: Sequence[int | float]) -> float:
    values, gains = _without_nan(scores), _without_nan(relevance)
    if len(values) != len(gains):
        raise ValueError(f"got {len(values)} scores and {len(gains)} relevances of a round")
    k = int((gains != 0).sum())
    if k == 0:
        raise ValueError("a round has no relevant option, so its NDCG is not defined; leave it out")
    discounts = np.log2(np.arange(k) + 2)
    order = np.argsort(-values, kind="stable")[:k]
    best = np.sort(gains)[::-1][:k]
    return float((gains[order] / discounts).sum() / (best / discounts).sum())


def _without_nan(scores: Sequence[int | float] | np.ndarray) -> np.ndarray:
    values = np.asarray(scores, dtype=np.float64)
    if np.isnan(values).any():
        raise ValueError("a score is NaN: the output of the model is broken and ranks nothing")
    return values


def plain(text: str) -> str:
    """Lower case, and one space in place of any white space."""
    return " ".join(text.lower().split())


def _require_answers(answers: Sequence[str]) -> None:
    if isinstance(answers, str) or not answers:
        raise ValueError(
            f"expected a list of at least one answer; got {answers!r}. Only the owner's server can "
            "score a test split without answers"
        )
