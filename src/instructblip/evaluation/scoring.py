"""From predictions to the score of a benchmark, 0 to 100: one entry per metric in ``SCORERS``.

A prediction is a dict, one line of ``predictions.jsonl``::

    {"id": "42", "dataset": "vsr", "images": ["a.png"], "prompt": "Based on ...",
     "prediction": "true", "answers": ["true"], "score": 1.0, "extra": {},
     "candidates": ["true", "false"], "log_likelihoods": [-0.1, -2.4],
     "probabilities": [0.91, 0.09]}

Only ranked predictions have the last three. ``score`` is that of the prediction alone, 0 to 1,
known at once; a benchmark score that is not their mean (AUROC, CIDEr) is computed at the end from
all predictions.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from functools import partial
from typing import Any

import numpy as np

from instructblip.core.user_code import find_function, is_function
from instructblip.evaluation import captions, classes, metrics, normalize, objects
from instructblip.evaluation.bootstrap import Statistic, auroc_of, class_mean_of, mean_of
from instructblip.evaluation.captions import CaptionTokenizer

Prediction = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Score:
    """``value`` 0 to 100 (CIDEr may exceed it), or None where the metric is not defined.

    ``statistic`` is the score of resamples, of all samples once it is ``value / 100``. ``others``
    are further scores of the same predictions.
    """

    value: float | None
    statistic: Statistic
    others: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Scorer:
    """One metric: the score of one prediction, and of all of them if it is not the mean.

    Examples whose ``extra`` has ``skips`` are not part of the score. ``require`` raises ValueError
    if a package is missing. ``undefined`` is what the predictions lack where there is no score.
    """

    sample: Callable[[Prediction], float]
    corpus: Callable[[Sequence[Prediction], CaptionTokenizer], Score] | None = None
    uses_tokenizer: bool = False
    skips: str = ""
    require: Callable[[], object] = lambda: None
    undefined: str = "one class only"

    def score(
        self, predictions: Sequence[Prediction], tokenizer: CaptionTokenizer = "python"
    ) -> Score:
        """Score all predictions. Raises ValueError if there are none."""
        if not predictions:
            raise ValueError("no predictions to score")
        if self.corpus is not None:
            return self.corpus(predictions, tokenizer)
        return _mean([self.sample(prediction) for prediction in predictions])


ALIASES = {
    "vqa_accuracy": "vqa_accuracy official_2021",
    "okvqa_accuracy": "okvqa_accuracy official_2021",
    "gqa_accuracy": "gqa_accuracy official_exact",
    "bleu": "bleu_4",
}
"""Short names of metrics -> the variant that they mean."""
NEEDS_CANDIDATES = ("auroc", "mrr")
"""Metrics of the order of candidates, which a generated answer does not have."""
RIGHT_FROM = 0.5
"""The least score that counts as right: most accuracies, a close caption."""
RECIPROCAL_RANKS = ("mrr",)
"""Metrics whose score is one over a rank: only the first rank is right."""


def scorer_of(metric: str) -> Scorer:
    """Return the scorer called ``metric``. Raises ValueError with the nearest name."""
    if is_function(metric):
        return Scorer(partial(_user_score, metric))
    kind, _, words = metric.partition(" ")
    if kind in OBJECT_SCORERS and words:
        return OBJECT_SCORERS[kind](words)
    if metric not in SCORERS:
        near = get_close_matches(metric.lower(), [*ALIASES, *SCORERS], n=1, cutoff=0.4)
        hint = f"did you mean {near[0]}? " if near else ""
        raise ValueError(f"no metric '{metric}'; {hint}expected one of {', '.join(SCORERS)}")
    return SCORERS[metric]


def _user_score(metric: str, prediction: Prediction) -> float:
    """The score of one prediction, 0 to 1, by a function of the user; a stored one is not computed
    again, so that results are read without the user's code."""
    if metric in prediction.get("scores", {}):
        return prediction["scores"][metric]
    score = find_function(metric)(prediction["prediction"], list(prediction["answers"]))
    if not isinstance(score, int | float) or not 0 <= score <= 1:
        raise ValueError(f"{metric}: expected a number from 0 to 1; got {score!r}")
    return float(score)


def probabilities(log_likelihoods: Sequence[float]) -> list[float]:
    """Return the softmax over the candidates of one sample."""
    values = np.asarray(log_likelihoods, dtype=np.float64)
    exponentials = np.exp(values - values.max())
    return [float(p) for p in exponentials / exponentials.sum()]


def right_option(prediction: Prediction) -> int:
    """Return the index of the right candidate: ``gt_index`` of the set, or that of an answer."""
    if "gt_index" in prediction["extra"]:
        return int(prediction["extra"]["gt_index"])
    candidates = list(prediction["candidates"])
    for answer in prediction["answers"]:
        if answer in candidates:
            return candidates.index(answer)
    raise ValueError(
        f"{prediction['dataset']} {prediction['id']}: none of the answers "
        f"{list(prediction['answers'])[:3]} is among the {len(candidates)} candidates"
    )


def is_right(prediction: Prediction, metric: str) -> bool:
    """Whether a prediction counts as right."""
    return prediction["score"] >= (1.0 if metric in RECIPROCAL_RANKS else RIGHT_FROM)


def _mean(samples: Sequence[float], **others: float) -> Score:
    values = np.array(samples)
    return Score(100 * float(values.mean()), mean_of(values), dict(others))


def _reciprocal_rank(prediction: Prediction) -> float:
    return 1 / metrics.rank_of(prediction["log_likelihoods"], right_option(prediction))


def _visdial(predictions: Sequence[Prediction], tokenizer: CaptionTokenizer) -> Score:
    scores = [p["log_likelihoods"] for p in predictions]
    others = metrics.visdial_metrics(scores, [right_option(p) for p in predictions])
    rated = [p for p in predictions if "gt_relevance" in p["extra"]]
    if rated:
        others["ndcg"] = metrics.visdial_metrics(
            [p["log_likelihoods"] for p in rated],
            [right_option(p) for p in rated],
            [p["extra"]["gt_relevance"] for p in rated],
        )["ndcg"]
    return _mean([_reciprocal_rank(p) for p in predictions], **others)


def _auroc(predictions: Sequence[Prediction], tokenizer: CaptionTokenizer) -> Score:
    """A sample scores log p(first candidate) - log p(second); the first one is the positive."""
    margins, labels = [], []
    for p in predictions:
        if len(p["candidates"]) != 2:
            raise ValueError(
                f"{p['dataset']} {p['id']}: AUROC needs two candidates, the positive one first; "
                f"got {len(p['candidates'])}"
            )
        margins.append(p["log_likelihoods"][0] - p["log_likelihoods"][1])
        labels.append(int(right_option(p) == 0))
    area = metrics.auroc(labels, margins)
    accuracy = float(np.mean([_exact(p) for p in predictions]))
    return Score(
        None if area is None else 100 * area,
        auroc_of(np.array(margins), np.array(labels)),
        {"accuracy": 100 * accuracy},
    )


CAPTION_METRICS = {
    "cider": captions.cider,
    "rouge_l": captions.rouge_l,
    "bleu_4": captions.bleu,
    "meteor": captions.meteor,
}
CORPUS_METRICS = {
    "bleu_4": (captions.bleu_counts, captions.bleu_of),
    "meteor": (captions.meteor_counts, captions.meteor_of),
}
"""Metrics that are no mean over the samples: the counts of each, and the score of their sum."""


def _captions(main: str) -> Callable[[Sequence[Prediction], CaptionTokenizer], Score]:
    """Score by the caption metric ``main``; CIDEr, ROUGE-L and BLEU-4 are reported beside it."""

    def score(predictions: Sequence[Prediction], tokenizer: CaptionTokenizer) -> Score:
        candidates = [p["prediction"] for p in predictions]
        references = [p["answers"] for p in predictions]
        others = {
            name: 100 * CAPTION_METRICS[name](candidates, references, tokenizer).value
            for name in ("cider", "rouge_l", "bleu_4")
            if name != main
        }
        if main not in CORPUS_METRICS:
            result = CAPTION_METRICS[main](candidates, references, tokenizer)
            return Score(100 * result.value, mean_of(np.array(result.per_image)), others)
        count, score_of = CORPUS_METRICS[main]
        counts = count(candidates, references, tokenizer)
        value = 100 * float(score_of(counts.sum(axis=0)))
        return Score(value, lambda weights: score_of(weights @ counts), others)

    return score


def _rouge(prediction: Prediction) -> float:
    return captions.rouge_l([prediction["prediction"]], [prediction["answers"]]).value


def _classes(main: str) -> Callable[[Sequence[Prediction], CaptionTokenizer], Score]:
    """Score by ``main`` of `classes.CLASS_METRICS`; accuracy is reported beside it."""

    def score(predictions: Sequence[Prediction], tokenizer: CaptionTokenizer) -> Score:
        hits, ids = classes.CLASS_METRICS[main](*classes.labels(predictions))
        statistic = class_mean_of(hits, ids)
        value = 100 * float(statistic(np.ones((1, len(hits))))[0])
        return Score(value, statistic, {"accuracy": 100 * float(hits.mean())})

    return score


def _chair(words: str) -> Scorer:
    """100 - CHAIR_i, so that more is better; beside it CHAIR_i, CHAIR_s (captions with an invented
    object) and the share of the objects that are named. Undefined where nothing is named."""

    def score(predictions: Sequence[Prediction], tokenizer: CaptionTokenizer) -> Score:
        rows = [objects.named(prediction, words) for prediction in predictions]
        table = np.array(list(objects.counts(rows)), dtype=np.float64)
        mentions, invented, wrong, found, shown = table.T

        def truth(weights: np.ndarray) -> np.ndarray:
            total = weights @ mentions
            none = np.full(len(total), np.nan)
            return 1 - np.divide(weights @ invented, total, out=none, where=total > 0)

        value = 100 * float(truth(np.ones((1, len(rows))))[0])
        others = {
            "chair_i": 100 - value,
            "chair_s": 100 * float(wrong.mean()),
            "recall": 100 * float(found.sum() / max(1, shown.sum())),
        }
        return Score(None if np.isnan(value) else value, truth, others)

    return Scorer(
        lambda prediction: objects.named(prediction, words).truth,
        score,
        require=lambda: objects.vocabulary(words),
        undefined="no caption names an object",
    )


def _object_f1(words: str) -> Scorer:
    return Scorer(
        lambda prediction: objects.named(prediction, words).f1,
        require=lambda: objects.vocabulary(words),
    )


def _pope_right(prediction: Prediction) -> float:
    answered = objects.says_yes(prediction["prediction"])
    return float(answered == objects.says_yes(prediction["answers"][0]))


def _pope(predictions: Sequence[Prediction], tokenizer: CaptionTokenizer) -> Score:
    answered = [objects.says_yes(p["prediction"]) for p in predictions]
    right = [objects.says_yes(p["answers"][0]) for p in predictions]
    accuracy = [float(s == r) for s, r in zip(answered, right, strict=True)]
    return _mean(accuracy, **objects.yes_no_scores(answered, right))


def _recall(ranks: Callable[[Prediction], Sequence[int]]) -> Scorer:
    """R@1 of all ranks of all samples; R@5 and R@10 are reported beside it."""

    def score(predictions: Sequence[Prediction], tokenizer: CaptionTokenizer) -> Score:
        counts = np.array([len(ranks(p)) for p in predictions], dtype=np.float64)
        hits = {
            k: np.array([sum(r <= k for r in ranks(p)) for p in predictions]) for k in (1, 5, 10)
        }
        recalls = {k: 100 * float(hit.sum() / counts.sum()) for k, hit in hits.items()}
        return Score(
            recalls[1],
            lambda weights: weights @ hits[1].astype(np.float64) / (weights @ counts),
            {f"r@{k}": recalls[k] for k in (5, 10)},
        )

    return Scorer(lambda p: float(np.mean([rank == 1 for rank in ranks(p)])), score)


def _on_answers(metric: Callable[..., float], *variant: str) -> Callable[[Prediction], float]:
    return lambda p: metric(p["prediction"], p["answers"], *variant)


def _on_first_answer(variant: metrics.GqaVariant) -> Callable[[Prediction], float]:
    return lambda p: metrics.gqa_accuracy(p["prediction"], p["answers"][0], variant)


_exact = _on_answers(metrics.exact_match)
_aokvqa = _on_answers(metrics.aokvqa_accuracy)

OBJECT_SCORERS: dict[str, Callable[[str], Scorer]] = {"chair": _chair, "object_f1": _object_f1}
"""Metrics of the objects of a vocabulary, whose name stands behind theirs: "chair scenes"."""

SCORERS: dict[str, Scorer] = {
    "exact_match": Scorer(_exact),
    "vqa_accuracy official_2021": Scorer(_on_answers(metrics.vqa_accuracy, "official_2021")),
    "vqa_accuracy official_2017": Scorer(_on_answers(metrics.vqa_accuracy, "official_2017")),
    "okvqa_accuracy official_2021": Scorer(_on_answers(metrics.okvqa_accuracy, "official_2021")),
    "okvqa_accuracy official_2017": Scorer(_on_answers(metrics.okvqa_accuracy, "official_2017")),
    "okvqa_accuracy lavis": Scorer(
        _on_answers(metrics.okvqa_accuracy, "lavis"), require=normalize.lemmatizer
    ),
    "textvqa_accuracy": Scorer(_on_answers(metrics.textvqa_accuracy)),
    "aokvqa_accuracy official": Scorer(_aokvqa, skips="difficult_direct_answer"),
    "aokvqa_accuracy lavis": Scorer(_aokvqa),
    "aokvqa_accuracy": Scorer(_aokvqa),  # in results of earlier versions: that of LAVIS
    "gqa_accuracy official_exact": Scorer(_on_first_answer("official_exact")),
    "gqa_accuracy lavis": Scorer(_on_first_answer("lavis")),
    "gqa_accuracy lmms_eval": Scorer(_on_first_answer("lmms_eval")),
    "ivqa_accuracy": Scorer(_on_answers(metrics.ivqa_accuracy)),
    "anls": Scorer(_on_answers(metrics.anls)),
    "mrr": Scorer(_reciprocal_rank, _visdial),
    "auroc": Scorer(_exact, _auroc),
    "text_to_image_recall official": _recall(lambda p: p["image_ranks"]),
    "text_to_image_recall equal_texts": _recall(lambda p: p["equal_ranks"]),
    "image_to_text_recall": _recall(lambda p: [p["text_rank"]]),
    "accuracy": Scorer(_exact),
    "balanced_accuracy": Scorer(_exact, _classes("balanced_accuracy")),
    "macro_f1": Scorer(_exact, _classes("macro_f1")),
    "cider": Scorer(_rouge, _captions("cider"), uses_tokenizer=True),
    "rouge_l": Scorer(_rouge, _captions("rouge_l"), uses_tokenizer=True),
    "bleu_4": Scorer(_rouge, _captions("bleu_4"), uses_tokenizer=True),
    "meteor": Scorer(_rouge, _captions("meteor"), uses_tokenizer=True),
    "pope": Scorer(_pope_right, _pope),
    **{
        f"{kind} {words}": scorer(words)
        for kind, scorer in OBJECT_SCORERS.items()
        for words in ("scenes", "coco")
    },
}
"""The name of a metric includes its variant; the run chooses the tokenizer of captions."""
