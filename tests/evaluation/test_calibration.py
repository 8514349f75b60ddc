"""A calibration: fitted to predictions, stored, refused where it would mean nothing, reported."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from instructblip.core.example import Example
from instructblip.evaluation.calibration import Calibration, fit
from instructblip.evaluation.evaluate import evaluate
from instructblip.evaluation.report import trust_of, write_report
from instructblip.evaluation.result import Result, make_result
from tests.evaluation.fakes import FakeEngine, benchmark, colour_questions

NAMES = ("red", "blue", "green", "pink")


def ranked(n: int = 400, heat: float = 3.0, seed: int = 0) -> Result:
    """Candidates whose log-likelihoods are ``heat`` times too far apart."""
    rng = np.random.default_rng(seed)
    predictions = []
    for i in range(n):
        logits = rng.normal(scale=1.5, size=4)
        chances = np.exp(logits) / np.exp(logits).sum()
        scores, right = (heat * logits).tolist(), NAMES[rng.choice(4, p=chances)]
        chosen = NAMES[int(np.argmax(scores))]
        predictions.append(
            {
                "id": str(i),
                "dataset": "toy",
                "images": [f"{i}.png"],
                "answers": [right],
                "extra": {},
                "prediction": chosen,
                "candidates": list(NAMES),
                "log_likelihoods": scores,
                "score": float(chosen == right),
            }
        )
    return result(predictions, mode="rank", decoding={})


def generated(n: int = 400, seed: int = 0) -> Result:
    """Answers that are right as often as the square of their probability."""
    rng = np.random.default_rng(seed)
    chances = rng.uniform(0.05, 1, size=n)
    predictions = [
        {
            "id": str(i),
            "dataset": "toy",
            "images": [f"{i}.png"],
            "answers": [NAMES[i % 4]],
            "extra": {},
            "prediction": NAMES[i % 4] if rng.uniform() < chance**2 else "none",
            "log_prob": float(np.log(chance)),
            "num_tokens": 2,
        }
        for i, chance in enumerate(chances)
    ]
    for each in predictions:
        each["score"] = float(each["prediction"] in each["answers"])
    return result(predictions)


def result(predictions: list[dict[str, Any]], **changes: Any) -> Result:
    settings = {"benchmark": benchmark(**changes).settings(), "model": "toy", "limit": None}
    return make_result(settings, predictions)


def test_a_calibration_finds_what_is_wrong_and_keeps_it(tmp_path: Path) -> None:
    fitted = fit([ranked(), generated()], "abc")
    known = fitted.calibration
    assert known.candidates is not None
    assert known.answers is not None
    assert known.candidates.temperature == pytest.approx(3.0, rel=0.15)
    assert known.sets == {"toy val": 400}
    lines = fitted.report.split("\n")
    assert [line.split(":")[0] for line in lines] == ["answers", "candidates"]
    for line in lines:  # "... error 0.151 before, 0.038 after ..."
        before, after = (
            float(line.split(f" {word}")[0].split()[-1]) for word in ("before", "after")
        )
        assert after < 0.06 < before
    for log_prob in (-0.1, -0.5, -1.0):  # of answers that were not seen
        expected = float(np.exp(log_prob)) ** 2
        assert known.answers.confidence(log_prob) == pytest.approx(expected, abs=0.15)
    known.save(tmp_path)
    assert Calibration.load(tmp_path) == known
    assert Calibration.load(tmp_path / "elsewhere") is None
    stored = json.loads((tmp_path / "calibration.json").read_text())
    assert (stored["version"], stored["model"]) == (1, "abc")
    (tmp_path / "calibration.json").write_text(json.dumps({**stored, "version": 9}))
    with pytest.raises(ValueError, match=r"calibration.json: version: .*calibrate` again"):
        Calibration.load(tmp_path)


def test_sets_of_other_samples_cover_what_they_promise() -> None:
    known = fit([ranked(400)], "abc").calibration.candidates
    assert known is not None
    tested = ranked(2000, seed=1).predictions
    for coverage in (0.8, 0.9):
        sets = [known.answer_set(p["log_likelihoods"], coverage) for p in tested]
        right = [NAMES.index(p["answers"][0]) for p in tested]
        covered = np.mean([r in chosen for r, chosen in zip(right, sets, strict=True)])
        assert covered == pytest.approx(coverage, abs=0.035)
        assert all(sets)
    narrow, wide = (
        {len(known.answer_set(p["log_likelihoods"], c)) for p in tested} for c in (0.5, 0.99)
    )
    assert max(narrow) < max(wide)


def test_captions_take_part_only_without_short_answers() -> None:
    short, caption = generated(), generated(seed=1)
    caption = result(caption.predictions, metric="rouge_l", source="captions")
    assert fit([short, caption], "abc").calibration.sets == {"toy val": 400}
    assert fit([caption], "abc").calibration.sets == {"captions val": 400}


def test_what_means_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match=r"99 samples are fewer than 100.*needs at least 100"):
        fit([generated(99)], "abc")
    right = [p for p in generated(800).predictions if p["score"] == 1]
    with pytest.raises(ValueError, match=r"all \d+ answers are right"):
        fit([result(right)], "abc")
    one = [{**p, "answers": ["red"]} for p in generated().predictions]
    with pytest.raises(ValueError, match="the right answer is 'red' for all 400 samples"):
        fit([result(one)], "abc")
    fitted = fit([generated(), ranked(50)], "abc")
    assert fitted.calibration.candidates is None
    assert "candidates: not calibrated, 50 samples are fewer than 100" in fitted.report


class SureEngine(FakeEngine):
    """A fake whose answers have details and a calibration."""

    calibration = fit([ranked(), generated()], "abc").calibration

    def detail_examples(
        self, examples: list[Example], prompts: Any, image_root: Path, **decoding: Any
    ) -> list[Any]:
        from instructblip.inference.details import DetailedAnswer, TokenDetail

        texts = self.answer_examples(examples, prompts, image_root, **decoding)
        tokens = (TokenDetail("x", -0.2), TokenDetail("", -0.1))
        return [DetailedAnswer(text, tokens, -0.3, "stop") for text in texts]


def test_predictions_and_the_report_have_confidences(tmp_path: Path) -> None:
    engine = SureEngine()
    answered = evaluate(engine, benchmark(), colour_questions(), progress=False)
    assert {p["confidence"] for p in answered.predictions} == {
        engine.calibration.answers.confidence(-0.3)  # type: ignore[union-attr]
    }
    assert answered.settings["calibration"]["id"] == engine.calibration.id
    chosen = benchmark(mode="rank", decoding={}, source="other", name="other", title="other")
    other = evaluate(engine, chosen, colour_questions(), out=tmp_path / "r/other", progress=False)
    for prediction in other.predictions:
        fitted = engine.calibration.candidates
        assert fitted is not None
        chances = fitted.probabilities(prediction["log_likelihoods"])
        assert prediction["confidence"] == pytest.approx(max(chances))
    assert trust_of(other) is not None
    page = write_report(tmp_path / "report.html", {"tuned": [answered, other]}).read_text()
    assert page.count("the confidences were fitted to samples of this set and split") == 1
    assert "toy colours: right answers, % by confidence, %" in page
    assert "other: wrong answers, % by share of the questions answered, %" in page
    plain = evaluate(FakeEngine(), benchmark(), colour_questions(), progress=False)
    assert "confidence" not in plain.predictions[0]
    assert trust_of(plain) is None
    page = write_report(tmp_path / "plain.html", {"tuned": [plain]}).read_text()
    assert 'id="trust"' not in page
    assert Result.load(tmp_path / "r/other").predictions == other.predictions
