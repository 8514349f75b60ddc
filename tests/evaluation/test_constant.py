"""The majority baseline, and the metrics of classes that it is compared under."""

import numpy as np
import pytest
from sklearn.metrics import balanced_accuracy_score, f1_score

from instructblip.evaluation.classes import balanced_accuracy, class_table, labels, macro_f1
from instructblip.evaluation.constant import best_constant, most_common
from instructblip.evaluation.scoring import scorer_of

UNEVEN = [["no"]] * 6 + [["Yes"]] * 3 + [["maybe"]]


def test_most_common_answer_counts_rows_and_ignores_case() -> None:
    rows = [["No", "no"], ["no"], ["no"], ["yes"]]
    assert most_common(rows) == ("no", 75.0)


@pytest.mark.parametrize(
    ("metric", "score"),
    [
        ("exact_match", 60.0),
        ("accuracy", 60.0),
        ("balanced_accuracy", 100 / 3),
        ("macro_f1", 25.0),  # F1 of "no" is 2 * 0.6 / 1.6 = 0.75, over three classes
        ("auroc", 50.0),
    ],
)
def test_constant_of_uneven_classes(metric: str, score: float) -> None:
    answer, value = best_constant(UNEVEN, metric)
    assert value == pytest.approx(score)
    assert answer == "no"


def test_constant_is_the_best_of_all_answers_not_the_most_common_one() -> None:
    """Two annotators of each row agree on the answer of its kind, three write something vague."""
    rows = [["cat", "cat", "animal"]] * 2 + [["dog", "dog", "animal"]] * 2
    assert best_constant(rows, "exact_match") == ("animal", 100.0)
    assert best_constant(rows, "aokvqa_accuracy")[1] == pytest.approx(100 / 3)


def test_constant_caption_is_the_one_with_the_words_of_the_others() -> None:
    rows = [
        ["a red cube on a table"],
        ["a blue cube on a table"],
        ["two dogs"],
        ["a cube on a bed"],
    ]
    answer, score = best_constant(rows, "rouge_l")
    every = {
        text: scorer_of("rouge_l")
        .score([{"prediction": text, "answers": row, "extra": {}} for row in rows])
        .value
        for (text,) in rows
    }
    assert score == max(every.values())
    assert every[answer] == score


def test_candidates_are_tried_too() -> None:
    rows = [[f"{word}ish {word}y cat"] for word in ("red", "blue", "pink", "grey", "gold", "tan")]
    assert best_constant(rows, "rouge_l", candidates=["cat"])[0] == "cat"


def test_constant_of_nothing_and_of_ranks_is_refused() -> None:
    with pytest.raises(ValueError, match="no answers"):
        best_constant([[], []], "exact_match")
    with pytest.raises(ValueError, match="mrr scores the order"):
        best_constant(UNEVEN, "mrr")
    with pytest.raises(ValueError, match="no metric 'accurracy'; did you mean accuracy"):
        best_constant(UNEVEN, "accurracy")


def test_class_metrics_equal_scikit_learn() -> None:
    rng = np.random.default_rng(0)
    right = rng.choice(["a", "b", "c"], size=200, p=[0.7, 0.2, 0.1]).tolist()
    predicted = [r if keep else s for r, keep, s in zip(
        right, rng.random(200) < 0.6, rng.choice(["a", "b", "c", "other"], size=200), strict=True
    )]  # fmt: skip
    names = ["a", "b", "c"]
    expected = f1_score(right, predicted, labels=names, average="macro")
    assert macro_f1(right, predicted).mean() == pytest.approx(expected)
    hits = [
        p if p in names else "a" if r != "a" else "b" for r, p in zip(right, predicted, strict=True)
    ]
    assert balanced_accuracy(right, predicted).mean() == pytest.approx(
        balanced_accuracy_score(right, hits)
    )


def test_class_of_several_answers_is_the_predicted_one() -> None:
    rows = [
        {"prediction": " Left", "answers": ["right", "left"]},
        {"prediction": "up", "answers": ["a", "b"]},
    ]
    assert labels(rows) == (["left", "a"], ["left", "up"])


def test_class_table_is_the_confusion_matrix() -> None:
    answered = [("no", "no"), ("no", "yes"), ("no", "no"), ("yes", "yes"), ("yes", "a lung")]
    table = class_table(
        "chest", [{"answers": [right], "prediction": given} for right, given in answered]
    )
    assert table is not None
    assert table.columns == ["no", "yes", "other"]
    no, yes = table.rows
    assert no == ("no", 3, pytest.approx(200 / 3), 100.0, pytest.approx(80.0), [2, 1, 0])
    assert yes == ("yes", 2, 50.0, 50.0, 50.0, [0, 1, 1])
    texts = [{"answers": [f"a text {i}"], "prediction": "a text"} for i in range(5)]
    assert class_table("captions", texts) is None
