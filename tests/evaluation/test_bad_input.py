"""Input without a score: every scorer raises an error that names it, or does what the official one
does."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from instructblip.core.example import Example
from instructblip.evaluation import captions, metrics
from instructblip.evaluation.evaluate import evaluate
from tests.evaluation.fakes import FakeEngine, benchmark, colour_questions

ON_ANSWERS: list[Callable[..., float]] = [
    metrics.vqa_accuracy,
    metrics.okvqa_accuracy,
    metrics.aokvqa_accuracy,
    metrics.ivqa_accuracy,
    metrics.exact_match,
    metrics.anls,
]


@pytest.mark.parametrize("metric", ON_ANSWERS)
def test_no_references(metric: Callable[..., float]) -> None:
    for references in ([], "cat"):
        with pytest.raises(ValueError, match="list of at least one answer"):
            metric("cat", references)


@pytest.mark.parametrize("metric", [captions.cider, captions.bleu, captions.rouge_l])
def test_no_captions_to_compare_with(metric: Callable[..., Any]) -> None:
    with pytest.raises(ValueError, match="list of references"):
        metric(["a cat"], [[]])
    with pytest.raises(ValueError, match="1 candidates and 2"):
        metric(["a cat"], [["a cat"], ["a dog"]])


def test_an_empty_answer_is_wrong() -> None:
    ten = ["cat"] * 10
    assert metrics.vqa_accuracy("", ten) == metrics.vqa_accuracy(" \n", ten) == 0
    assert metrics.textvqa_accuracy("", ten) == metrics.aokvqa_accuracy("", ten) == 0
    assert metrics.gqa_accuracy("", "cat", "lavis") == metrics.anls("", ["cat"]) == 0
    assert captions.cider(["", "a dog"], [["a cat"], ["a dog"]]).per_image[0] == 0


def test_nan_scores() -> None:
    rows = [[0.1, math.nan]]
    for broken in (
        lambda: metrics.visdial_metrics(rows, [0]),
        lambda: metrics.auroc([0, 1], rows[0]),
    ):
        with pytest.raises(ValueError, match="NaN"):
            broken()


class Broken(FakeEngine):
    """Ranks with NaN, as a model does whose weights overflowed."""

    def rank_examples(
        self,
        examples: Sequence[Example],
        prompts: Sequence[str],
        image_root: Path,
        candidates: Sequence[Sequence[str]],
    ) -> list[list[float]]:
        return [[math.nan] * len(texts) for texts in candidates]


def test_nan_log_likelihoods_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="log-likelihood is NaN"):
        evaluate(Broken(), benchmark(mode="rank", decoding={}), colour_questions(), out=tmp_path)
    assert not (tmp_path / "result.json").exists()


def test_one_class() -> None:
    assert metrics.auroc([1, 1], [0.2, 0.4]) is None
    with pytest.raises(ValueError, match="0 or 1"):
        metrics.auroc([1, 2], [0.2, 0.4])
