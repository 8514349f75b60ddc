"""The verdict on a tuned model: worse, no better than a baseline, unclear, or better."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from instructblip.evaluation.benchmarks import Benchmark
from instructblip.evaluation.compare import compare
from instructblip.evaluation.constant import Constant
from instructblip.evaluation.result import Result, constants_of, make_result
from instructblip.evaluation.scoring import scorer_of
from instructblip.evaluation.tables import measured_with, to_markdown
from instructblip.evaluation.verdict import Outcome, Verdict, constant_result, worst


def result(
    answers: Sequence[str],
    predicted: Sequence[str],
    metric: str = "exact_match",
    log_likelihoods: bool = False,
) -> Result:
    """The result of predictions about one picture each, of candidates yes and no on request."""
    benchmark = Benchmark(
        name="own_vqa", title="own vqa", source="imagefolder", split="val", prompt="{question}",
        mode="generate", metric=metric, role="held_in",
    )  # fmt: skip
    predictions: list[dict[str, Any]] = [
        {"id": str(i), "dataset": "own", "images": [f"{i}.png"], "prompt": "?", "answers": [answer],
         "prediction": prediction, "extra": {}, "index": i}
        for i, (answer, prediction) in enumerate(zip(answers, predicted, strict=True))
    ]  # fmt: skip
    for p in predictions if log_likelihoods else ():
        likely = [0.0, -1.0] if p["prediction"] == "yes" else [-1.0, 0.0]
        p |= {"candidates": ["yes", "no"], "log_likelihoods": likely, "probabilities": likely}
    sample = scorer_of(metric).sample
    scored = [{**p, "score": sample(p)} for p in predictions]
    return make_result({"benchmark": benchmark.settings(), "blind_seed": None}, scored)


ANSWERS = ["no"] * 24 + ["yes"] * 16
WRONG = ["maybe"] * 40


def verdict(
    before: Sequence[str], after: Sequence[str], blind: Sequence[str] = WRONG, **more: Any
) -> Verdict:
    first, second, swapped = (result(ANSWERS, each) for each in (before, after, blind))
    constant = constant_result(second)
    return Verdict(before=first, after=second, constant=constant, blind=swapped, **more)


CASES = [
    (WRONG, ANSWERS, WRONG, Outcome.BETTER, "Better: "),
    (ANSWERS, ["no"] * 40, WRONG, Outcome.WORSE, "Worse: "),
    (WRONG, ["no"] * 40, WRONG, Outcome.CONSTANT, "not better than always giving the same one"),
    (WRONG, ANSWERS, ANSWERS, Outcome.BLIND, "as good with the wrong pictures"),
    (["maybe", *ANSWERS[1:]], ANSWERS, WRONG, Outcome.UNCLEAR, "may be chance"),
]


@pytest.mark.parametrize(("before", "after", "blind", "outcome", "first"), CASES)
def test_outcomes(
    before: list[str], after: list[str], blind: list[str], outcome: Outcome, first: str
):
    reached = verdict(before, after, blind)
    assert (reached.outcome, reached.is_better) == (outcome, outcome is Outcome.BETTER)
    assert first in reached.headline.split(". ")[0] + "."


def test_plain_words():
    good = verdict(WRONG, ANSWERS)
    assert "Of 40 pictures kept back, 40 were answered right after it, 0 before." in good.headline
    assert "always answering 'no' gives 60.0" in good.baselines
    assert "with pictures swapped 0.0" in good.baselines
    assert "the most common answer, 'no', is right for 60 %" in good.baselines
    captions = result(["a red cup", "a big dog"], ["a red cup", "a"], "rouge_l")
    text = Verdict(before=captions, after=captions, constant=captions, blind=None).headline
    assert "the answers agree by 7" in text


def test_a_start_that_no_step_improves_on_is_worse():
    kept = verdict(ANSWERS, ANSWERS, kept_start=(11.6, 2.5))
    assert kept.outcome is Outcome.WORSE
    assert kept.headline.startswith("Worse: every step of tuning on your pictures made")
    assert "the score was 11.6 of 100 at the start and 2.5 at the last step." in kept.headline
    unchanged = verdict(ANSWERS, ANSWERS, kept_start=(11.6, 11.6))
    assert unchanged.outcome is Outcome.UNCLEAR
    assert "No step was better than the start, which was kept." in unchanged.headline
    assert worst([verdict(WRONG, ANSWERS), kept, unchanged]) is kept


def test_a_better_score_on_images_like_those_trained_on_is_qualified():
    alike = frozenset(f"{i}.png" for i in range(9)) | {"of another benchmark.png"}
    leak = "9 of 40 pictures kept back look like one that was trained on: the scores may be"
    good = verdict(WRONG, ANSWERS, lookalikes=alike, group_column="patient_id")
    assert good.headline.startswith(f"Better, but {leak} too high. Of 40 pictures kept back, 40")
    assert "`--group patient_id`" in good.caution
    assert leak not in good.caution
    worse = verdict(ANSWERS, ["no"] * 40, lookalikes=alike)
    assert worse.headline.startswith("Worse: ")
    assert worse.caution.startswith(leak)
    assert verdict(WRONG, ANSWERS, lookalikes=frozenset({"0.png"})).headline.startswith(
        "Better, but 1 of 40 pictures kept back looks like one"
    )


@pytest.mark.parametrize(("groups", "outcome"), [(4, Outcome.UNCLEAR), (10, Outcome.BETTER)])
def test_few_groups_show_no_difference(groups: int, outcome: Outcome):
    better = [result(ANSWERS, each, "auroc", log_likelihoods=True) for each in (WRONG, ANSWERS)]
    for each in better:
        for p in each.predictions:
            p["extra"] = {"group": str(p["index"] % groups)}
    before, after = (replace(each, role="own") for each in better)
    judged = Verdict(before=before, after=after, constant=constant_result(after), blind=None)
    assert judged.outcome is outcome
    assert f" Of 40 pictures of {groups} groups kept back, the score" in judged.headline
    few = "Not clearly better: fewer than 10 groups cannot rule out chance."
    assert (few in judged.headline) == (groups < 10)
    assert after.interval is None  # every resample has 100
    table = to_markdown(compare({"before": [before], "after": [after]}))
    assert "| **after** | 100.0 |" in table
    assert ("+50.0" in table) == (groups >= 10)
    assert ("so no difference is tested" in table) == (groups < 10)


def test_a_constant_among_candidates():
    ranked = result(ANSWERS, ANSWERS)
    for prediction in ranked.predictions:
        prediction |= {"candidates": ["yes", "no"], "probabilities": [0.5, 0.5]}
    constant = constant_result(ranked)
    assert constant.value == 60
    assert constant.predictions[0]["probabilities"] == [0.0, 1.0]
    assert ranked.predictions[0]["probabilities"] == [0.5, 0.5]


def test_a_constant_takes_no_score_of_the_model_along():
    ranked = result(ANSWERS, ANSWERS, "auroc", log_likelihoods=True)
    assert ranked.value == 100
    assert constant_result(ranked).value == 50


def test_of_constants_that_tie_the_text_and_the_tables_name_the_same():
    first = result(["no", "yes"] * 20, ["no"] * 40, "balanced_accuracy", log_likelihoods=True)
    first.settings["benchmark"]["candidates"] = ["yes", "no"]
    shown = replace(first, role="own", constants=constants_of(first))
    (note,) = measured_with(compare({"before": [shown], "after": [shown]}))
    assert "best constant answer 'no'" in note
    judged = Verdict(before=shown, after=shown, constant=constant_result(shown), blind=None)
    assert "always answering 'no' gives 50.0" in judged.baselines
    assert "the most common answer, 'no'," in judged.baselines
    stored = replace(shown, constants={"balanced_accuracy": Constant("yes", 50.0)})
    assert constant_result(stored).predictions[0]["prediction"] == "yes"
