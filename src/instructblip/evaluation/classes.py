"""Answers as classes: scores that rare classes count in, and the table of each class."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from instructblip.evaluation.bootstrap import Floats
from instructblip.evaluation.metrics import plain


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


def balanced_accuracy(right: Sequence[str], predicted: Sequence[str]) -> Floats:
    """Return shares [n] whose mean is the mean over the classes of their recall, as scikit-learn's
    ``balanced_accuracy_score``. A resample keeps the weight that a class has in the whole set."""
    names, index, count = np.unique(right, return_inverse=True, return_counts=True)
    hits = np.array(right) == np.array(predicted)
    return hits * len(right) / (len(names) * count[index])


def macro_f1(right: Sequence[str], predicted: Sequence[str]) -> Floats:
    """Return shares [n] whose mean is the mean over the classes of the right answers of their F1,
    as scikit-learn's ``f1_score`` with these ``labels``. A predicted text that is no class costs
    recall only. A resample keeps the weight that a class has in the whole set."""
    names, index, count = np.unique(right, return_inverse=True, return_counts=True)
    given = np.array([list(predicted).count(name) for name in names])
    hits = np.array(right) == np.array(predicted)
    return hits * 2 * len(right) / (len(names) * (count + given)[index])


CLASS_METRICS = {"balanced_accuracy": balanced_accuracy, "macro_f1": macro_f1}
