"""Known values of every metric; figures marked "official" came out of the original scorers."""

import inspect
import math
from types import SimpleNamespace

import pytest

from instructblip.evaluation import metrics, normalize

# prediction, answers, official 2021, official 2017 (both ran under Python 2.7)
VQA_CASES = [
    ("2", ["2"] * 3 + ["two"] * 7, 1.0, 0.9),
    ("two dogs", ["the two dogs"] * 4 + ["2 dogs"] * 6, 1.0, 1.0),
    ("Yes.", ["yes"] * 10, 0.0, 1.0),
    ("yes", ["yes"] * 9 + ["no"], 1.0, 1.0),
    ("yes", ["yes"] * 3 + ["no"] * 7, 0.9, 0.9),
    ("yes", ["yes"] * 2 + ["no"] * 8, 0.6, 0.6),
    ("yes", ["yes"], 0.0, 0.0),
    ("dont walk", ["don't walk"] * 5 + ["stop"] * 5, 1.0, 1.0),
    ("1,000", ["1000"] * 5 + ["1,000"] * 5, 1.0, 1.0),
    ("black/white", ["black white"] * 5 + ["black, white"] * 5, 1.0, 1.0),
    ("U.S.", ["us"] * 4 + ["u.s."] * 6, 1.0, 1.0),
    ("x" + "." * 40, ["x"] * 5 + ["x" + "." * 8] * 5, 0.0, 0.0),
    ("a cat", ["cat"] * 2 + ["the cat"] * 3 + ["dog"] * 5, 1.0, 0.6),
    ("", ["none"] * 9 + [""], 0.3, 0.3),
]


@pytest.mark.parametrize(("prediction", "answers", "in_2021", "in_2017"), VQA_CASES)
def test_vqa_accuracy_is_the_official_one(
    prediction: str, answers: list[str], in_2021: float, in_2017: float
) -> None:
    assert metrics.vqa_accuracy(prediction, answers) == pytest.approx(in_2021, abs=1e-12)
    got = metrics.vqa_accuracy(prediction, answers, variant="official_2017")
    assert got == pytest.approx(in_2017, abs=1e-12)


def test_only_32_full_stops_are_stripped() -> None:
    # re.UNICODE (32) stands where the official code should give the flags of ``sub``.
    assert normalize.vqa_punctuation("." * 40) == "." * 8
    assert normalize.vqa_punctuation("3.5 u.s. ٣.٣") == "3.5 us ٣٣"


def test_contraction_table_has_the_official_size() -> None:
    assert len(normalize.CONTRACTIONS) == 120
    assert normalize.vqa("Youre shouldntve somebody'd") == "you're shouldntve somebodyd"


def test_textvqa_splits_possessives_and_needs_ten_answers() -> None:
    assert normalize.textvqa("Men's, two?") == "men 's 2"
    assert normalize.vqa("Men's, two?") == "men's 2"
    assert metrics.textvqa_accuracy("Mens'", ["mens'"] * 3 + ["x"] * 7) == pytest.approx(0.9)
    with pytest.raises(ValueError, match="ten answers"):
        metrics.textvqa_accuracy("a", ["a"] * 9)


def test_okvqa_doubles_five_answers() -> None:
    five, ten = ["dog", "dog", "cat", "cow", "pig"], ["dog"] * 4 + ["cat", "cow", "pig"] * 2
    assert metrics.okvqa_accuracy("dog", five) == 1.0
    assert metrics.okvqa_accuracy("cat", ten) == pytest.approx(0.6)
    assert metrics.okvqa_accuracy("cat", five) == pytest.approx(0.6)


def test_okvqa_of_lavis_compares_lemmas(monkeypatch: pytest.MonkeyPatch) -> None:
    parts = {"riding": "VERB", "bikes": "NOUN", "its": "PRON"}
    lemmas = {"riding": "ride", "bikes": "bike", "its": "it"}

    def pipeline(text: str) -> list[SimpleNamespace]:
        return [SimpleNamespace(text=w, pos_=parts[w], lemma_=lemmas[w]) for w in text.split()]

    monkeypatch.setattr(normalize, "lemmatizer", lambda: pipeline)
    answers = ["ride its bike"] * 5
    assert metrics.okvqa_accuracy("riding its bikes", answers, "lavis") == 1.0
    assert metrics.okvqa_accuracy("riding its bikes", answers, "official_2017") == 0.0


def test_aokvqa_leaves_nobody_out_and_normalises_nothing() -> None:
    assert metrics.aokvqa_accuracy("dog", ["dog"] * 2 + ["cat"] * 8) == pytest.approx(2 / 3)
    assert metrics.aokvqa_accuracy("Dog", ["dog"] * 10) == 0.0


def test_gqa_variants_normalise_differently() -> None:
    def scores(prediction: str, answer: str) -> list[float]:
        return [
            metrics.gqa_accuracy(prediction, answer, variant)
            for variant in ("official_exact", "lavis", "lmms_eval")
        ]

    assert scores("cup", "cup") == [1, 1, 1]
    assert scores("Cup.", "cup") == [0, 1, 1]
    assert scores("a cup", "cup") == [0, 1, 0]
    assert scores("t-shirt", "t shirt") == [0, 1, 0]
    with pytest.raises(ValueError, match="variant"):
        inspect.unwrap(metrics.gqa_accuracy)("a", "a", "exact")  # without the annotation checker


def test_ivqa_needs_two_of_five() -> None:
    assert metrics.ivqa_accuracy("milk", ["milk", "cream", "milk"]) == 1.0
    assert metrics.ivqa_accuracy("cream", ["milk", "cream", "milk"]) == 0.5


def test_exact_match_ignores_case_and_blanks_only() -> None:
    assert metrics.exact_match(" Two  dogs ", ["two dogs"]) == 1.0
    assert metrics.exact_match("two dogs.", ["two dogs"]) == 0.0


def test_visdial_metrics_by_hand() -> None:
    scores = [[0.1, 0.9, 0.5], [0.3, 0.2, 0.1]]
    result = metrics.visdial_metrics(scores, [2, 0], [[0, 0.5, 1], [0, 1, 0]])
    assert result["r@1"] == 0.5
    assert result["r@5"] == result["r@10"] == 1.0
    assert result["mean"] == 1.5
    assert result["mrr"] == pytest.approx((1 / 2 + 1) / 2)
    first = (0.5 + 1 / math.log2(3)) / (1 + 0.5 / math.log2(3))  # k = 2 of 3
    assert result["ndcg"] == pytest.approx((first + 0) / 2)  # k = 1, and the first has no relevance


def test_visdial_ties_keep_the_order_of_the_options() -> None:
    assert [metrics.rank_of([1.0, 1.0, 1.0], i) for i in range(3)] == [1, 2, 3]


def test_visdial_refuses_what_has_no_score() -> None:
    with pytest.raises(ValueError, match="no relevant option"):
        metrics.visdial_metrics([[1.0, 2.0]], [0], [[0, 0]])
    with pytest.raises(ValueError, match="NaN"):
        metrics.visdial_metrics([[math.nan, 2.0]], [0])
    with pytest.raises(ValueError, match="index 5"):
        metrics.visdial_metrics([[1.0, 2.0]], [5])


def test_auroc_keeps_log_likelihoods_apart() -> None:
    # A sigmoid in float32 makes ties of these: 0.75 elsewhere for a perfect ranking.
    assert metrics.auroc([1, 1, 1, 0], [20.0, 40.0, 60.0, -1.0]) == 1.0
    assert metrics.auroc([1, 0, 1, 0], [0.5, 0.5, 0.9, 0.1]) == pytest.approx(0.875)


def test_auroc_of_one_class_is_none() -> None:
    assert metrics.auroc([1, 1], [0.1, 0.2]) is None
    assert metrics.auroc([0, 0], [0.1, 0.2]) is None
    with pytest.raises(ValueError, match="NaN"):
        metrics.auroc([0, 1], [0.1, math.nan])


def test_anls_counts_a_similarity_of_one_half() -> None:
    assert metrics.anls("ab", ["ax"]) == 0.5
    assert metrics.anls("ab", ["xy", "abc"]) == pytest.approx(2 / 3)
    assert metrics.anls("abc", ["axy"]) == 0.0
    assert metrics.anls(" AB ", ["ab"]) == 1.0
    assert metrics.anls("ab  ", ["ax"]) == 0.75  # raw lengths: the blanks count below the line


def test_no_answers_is_an_error() -> None:
    for metric in (metrics.vqa_accuracy, metrics.aokvqa_accuracy, metrics.exact_match):
        with pytest.raises(ValueError, match="at least one answer"):
            metric("a", [])
    with pytest.raises(ValueError, match="list of"):
        metrics.vqa_accuracy("a", "answer")
