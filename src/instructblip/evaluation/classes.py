"""Answers as classes: scores that rare classes count in, and the table of each class."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int64

from instructblip.evaluation.bootstrap import Floats
from instructblip.evaluation.metrics import plain

Hits = tuple[Floats, Int64[np.ndarray, "n k"]]
"""Whether each sample is right [n], and its class and perhaps the predicted one [n, k]: what
`bootstrap.class_mean_of` reads."""

MOST_CLASSES = 20
"""Classes of a table; more are no classes but texts."""
OTHER = "other"
"""Column of the answers that are no class."""


class ClassRow(NamedTuple):
    """One class: samples, scores in percent, and how often each of the columns was answered."""

    name: str
    n: int
    recall: float
    precision: float
    f1: float
    counts: list[int]


class ClassTable(NamedTuple):
    """The confusion matrix of a benchmark, ``rows`` by right class and ``columns`` by answer."""

    title: str
    columns: list[str]
    rows: list[ClassRow]


def class_table(title: str, predictions: Sequence[Mapping[str, Any]]) -> ClassTable | None:
    """Return the table of every class, the most frequent first; None for more than 20 classes or
    where no class has two samples, since these are texts."""
    from sklearn.metrics import confusion_matrix

    right, predicted = labels(predictions)
    frequency = Counter(right)
    names = [name for name, _ in frequency.most_common()]
    if len(names) > MOST_CLASSES or frequency[names[0]] < 2:
        return None
    given = [name if name in frequency else OTHER for name in predicted]
    columns = names if OTHER in names or OTHER not in given else [*names, OTHER]
    matrix = confusion_matrix(right, given, labels=columns)
    rows = []
    for i, name in enumerate(names):
        n, answered, hits = frequency[name], int(matrix[:, i].sum()), int(matrix[i, i])
        precision = 100 * hits / answered if answered else 0.0
        f1 = 100 * 2 * hits / (n + answered)
        rows.append(ClassRow(name, n, 100 * hits / n, precision, f1, matrix[i].tolist()))
    return ClassTable(title, columns, rows)


def labels(predictions: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[str]]:
    """Return (right class, predicted class) of each prediction.

    Case and extra white space do not count. The class of a sample with several answers is the one
    that was predicted, else the first.
    """
    right, predicted = [], []
    for prediction in predictions:
        answers = [plain(answer) for answer in prediction["answers"]]
        given = plain(prediction["prediction"])
        right.append(given if given in answers else answers[0])
        predicted.append(given)
    return right, predicted


def balanced_accuracy(right: Sequence[str], predicted: Sequence[str]) -> Hits:
    """Return hits whose `class_mean_of` is scikit-learn's ``balanced_accuracy_score``: the mean
    over the classes of their recall."""
    hits, classes = macro_f1(right, predicted)
    return hits, classes[:, :1]


def macro_f1(right: Sequence[str], predicted: Sequence[str]) -> Hits:
    """Return hits whose `class_mean_of` is scikit-learn's ``f1_score`` with the right answers as
    ``labels``: the mean over them of their F1. A predicted text that is no class costs recall
    only."""
    ids = {name: i for i, name in enumerate(dict.fromkeys(right))}
    pairs = list(zip(right, predicted, strict=True))
    classes = [(ids[name], ids.get(given, len(ids))) for name, given in pairs]
    return np.array([name == given for name, given in pairs], np.float64), np.array(classes)


CLASS_METRICS = {"balanced_accuracy": balanced_accuracy, "macro_f1": macro_f1}
