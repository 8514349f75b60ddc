"""Retrieval as a benchmark: ranks both ways, captions that fit several images, and the result."""

from pathlib import Path

import numpy as np
import pytest
import torch

from instructblip.core.example import Example
from instructblip.evaluation.benchmarks import BENCHMARKS, select_benchmarks
from instructblip.evaluation.evaluate import evaluate
from instructblip.evaluation.metrics import rank_among
from instructblip.evaluation.result import Result
from tests.evaluation.fakes import FakeEngine, ListDataset

CAPTIONS = [("a red circle", "red"), ("a red circle", "small red"), ("a blue star", "blue")]
TEXTS = ["a red circle", "red", "small red", "a blue star", "blue"]
SCORES = torch.tensor(
    [  # of the images in rows
        [0.8, 0.9, 0.1, 0.0, 0.0],
        [0.9, 0.2, 0.3, 0.0, 0.0],
        [0.0, 0.0, 0.4, 0.7, 0.7],
    ]
)


class Comparing(FakeEngine):
    def can_match(self) -> bool:
        return True

    def compare_examples(self, examples, image_root: Path, texts, rerank: int):
        assert list(texts) == TEXTS
        assert rerank == 128
        rows = [int(Path(example.images[0]).stem) for example in examples]
        return SCORES[rows], SCORES[rows]


def dataset() -> ListDataset:
    return ListDataset(
        [
            Example(
                dataset="toy",
                split="val",
                id=str(i),
                images=(f"{i}.png",),
                task="caption",
                answers=answers,
            )
            for i, answers in enumerate(CAPTIONS)
        ]
    )


def test_recall_by_hand(tmp_path: Path) -> None:
    out = tmp_path / "result"
    result = evaluate(Comparing(), BENCHMARKS["scenes_retrieval"], dataset(), out=out)
    # "small red" is most similar to the image of the blue star; all else is right where
    # "a red circle" may be either of two images
    equal, to_text, official = result.by_metric()
    assert equal.value == pytest.approx(100 * 5 / 6)
    assert official.value == pytest.approx(100 * 4 / 6)
    assert to_text.value == 100
    assert equal.others == {"r@5": 100, "r@10": 100}
    assert [p["prediction"] for p in result.predictions] == ["red", "a red circle", "a blue star"]
    assert result.interval is not None
    loaded = Result.load(out)
    assert loaded.value == result.value
    assert "matching of the most similar" in loaded.describe()


def test_a_model_that_does_not_match_is_said_to_compare_only(tmp_path: Path) -> None:
    class Contrasting(Comparing):
        def can_match(self) -> bool:
            return False

    benchmark, out = BENCHMARKS["scenes_retrieval"], tmp_path / "result"
    evaluate(Contrasting(), benchmark, dataset(), out=out)
    described = Result.load(out).describe()
    assert "; contrast" in described
    assert "matching" not in described


def test_a_model_that_scores_all_alike_retrieves_nothing() -> None:
    assert rank_among(np.zeros(7), [3]) == 7
    assert rank_among(np.array([0.1, 0.5, 0.5, 0.2]), [1, 2]) == 1


def test_a_model_without_heads_is_refused() -> None:
    with pytest.raises(ValueError, match="needs a model of this package with retrieval heads"):
        evaluate(FakeEngine(), BENCHMARKS["scenes_retrieval"], dataset())


def test_retrieval_is_no_part_of_other_groups() -> None:
    names = {b.name for b in select_benchmarks(["held_in", "held_out", "scenes"])}
    assert not any("retrieval" in name for name in names)
    assert [b.name for b in select_benchmarks(["retrieval"])] == [
        "coco_retrieval",
        "flickr30k_retrieval",
    ]
