"""The majority baseline, and the metrics of classes that it is compared under."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from sklearn.metrics import balanced_accuracy_score, f1_score

from instructblip.evaluation.bootstrap import class_mean_of, interval, resample
from instructblip.evaluation.classes import (
    Hits,
    balanced_accuracy,
    class_table,
    labels,
    macro_f1,
)
from instructblip.evaluation.compare import compare
from instructblip.evaluation.constant import best_constant, most_common
from instructblip.evaluation.result import Result, make_result
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


def class_mean(of: Hits) -> float:
    return float(class_mean_of(*of)(np.ones((1, len(of[0]))))[0])


def test_class_metrics_equal_scikit_learn() -> None:
    rng = np.random.default_rng(0)
    right = rng.choice(["a", "b", "c"], size=200, p=[0.7, 0.2, 0.1]).tolist()
    predicted = [r if keep else s for r, keep, s in zip(
        right, rng.random(200) < 0.6, rng.choice(["a", "b", "c", "other"], size=200), strict=True
    )]  # fmt: skip
    names = ["a", "b", "c"]
    expected = f1_score(right, predicted, labels=names, average="macro")
    assert class_mean(macro_f1(right, predicted)) == pytest.approx(expected)
    hits = [
        p if p in names else "a" if r != "a" else "b" for r, p in zip(right, predicted, strict=True)
    ]
    assert class_mean(balanced_accuracy(right, predicted)) == pytest.approx(
        balanced_accuracy_score(right, hits)
    )


@pytest.mark.parametrize("metric", [balanced_accuracy, macro_f1])
def test_intervals_of_class_metrics_are_possible_scores(metric: Callable[..., Hits]) -> None:
    right = ["no"] * 40 + ["yes"] * 5
    assert interval(resample(class_mean_of(*metric(right, right)), 45)) == (100, 100)
    constant = balanced_accuracy(right, ["no"] * 45)
    assert interval(resample(class_mean_of(*constant), 45)) == (50, 50)
    predicted = [*["no"] * 30, *["yes"] * 14, "maybe"]
    values = resample(class_mean_of(*metric(right, predicted)), 45, seed=1, resamples=5)
    draws = np.random.default_rng([1, 45]).integers(0, 45, size=(5, 45))
    for value, draw in zip(values, draws, strict=True):
        part = metric([right[i] for i in draw], [predicted[i] for i in draw])
        assert value == pytest.approx(100 * class_mean(part))


def test_a_result_resamples_its_classes() -> None:
    asked = {"name": "toy", "title": "toy", "role": "own", "unseen_type": False}
    rows = [{"prediction": "no", "answers": [a], "extra": {}} for a in ["no"] * 40 + ["yes"] * 5]
    result = make_result({"benchmark": {**asked, "metric": "balanced_accuracy"}}, rows)
    assert (result.value, result.interval) == (50, None)


def test_a_result_resamples_the_groups_of_its_samples() -> None:
    """Ten patients, five of whom are answered rightly in all four of their samples."""
    asked = {"name": "toy", "title": "toy", "role": "own", "unseen_type": False, "mode": "rank"}
    settings = {"benchmark": {**asked, "metric": "accuracy", "decoding": {}, "prompt": "?"}}
    rows = [
        {
            "prediction": "yes" if i < 20 else "no",
            "answers": ["yes"],
            "extra": {"group": f"p{i // 4}"},
        }
        for i in range(40)
    ]
    grouped, single = (
        make_result(settings, [{**row, "extra": extra} for row in rows for extra in [e(row)]])
        for e in (lambda row: row["extra"], lambda row: {})
    )
    assert grouped.value == single.value == 50
    assert grouped.interval is not None
    assert single.interval is not None
    wide, narrow = (high - low for low, high in (grouped.interval, single.interval))
    assert wide == pytest.approx(2 * narrow, rel=0.15)
    assert grouped.describe().endswith("prompt '?'; intervals over 10 groups")
    assert "groups" not in single.describe()


def questions_about_images(answered: Callable[[int], str], **more: Any) -> Result:
    """Forty questions, four about each of ten images; ``answered`` by number of the question."""
    asked = {"name": "toy", "title": "toy", "role": "own", "unseen_type": False, "mode": "rank"}
    settings = {"benchmark": {**asked, "metric": "accuracy", "decoding": {}, "prompt": "?"}}
    rows = [
        {
            "id": str(i),
            "images": [f"{i // 4}.png"],
            "prediction": answered(i),
            "answers": ["yes"],
            "extra": {},
            "prompt": "?",
            **{name: value(i) for name, value in more.items()},
        }
        for i in range(40)
    ]
    blind = {"blind_seed": 0} if more else {}
    return make_result({**settings, **blind}, rows)


def test_questions_about_one_image_are_drawn_together() -> None:
    """Five images whose four questions are all answered rightly: ten samples, not forty."""
    half = questions_about_images(lambda i: "yes" if i < 20 else "no")
    assert half.interval is not None
    low, high = half.interval
    assert high - low == pytest.approx(2 * 196 * 0.5 / 10**0.5, rel=0.1)
    assert half.describe().endswith("prompt '?'; intervals over 10 images")
    every = questions_about_images(lambda i: "yes").interval
    assert every is not None
    assert every.low == pytest.approx(100 * 0.025 ** (1 / 10))


def test_a_blind_control_is_drawn_by_the_images_it_is_about() -> None:
    seeing = questions_about_images(lambda i: "yes" if i < 20 else "no")
    swapped = {"images": lambda i: [f"{(i + 7) % 10}.png"]}
    about = {"asked_about": lambda i: [f"{i // 4}.png"]}
    blind = questions_about_images(lambda i: "no", **swapped, **about)
    change = compare({"blind": [blind], "seeing": [seeing]}).rows[0].differences["seeing"]
    assert change.high - change.low == pytest.approx(2 * 196 * 0.5 / 10**0.5, rel=0.1)
    with pytest.raises(ValueError, match="evaluate it again into a new folder"):
        compare({"old": [questions_about_images(lambda i: "no", **swapped)], "new": [seeing]})


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
