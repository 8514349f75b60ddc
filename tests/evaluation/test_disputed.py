"""Disputed scores: the settings are real ones, and a model is evaluated under each."""

from pathlib import Path

import pytest

from instructblip.cli import main as cli
from instructblip.core.example import Example
from instructblip.data.templates import check_template
from instructblip.evaluation.disputed import DISPUTED, without_context, without_ocr_tokens
from instructblip.evaluation.result import Result
from instructblip.evaluation.scoring import scorer_of
from instructblip.scenes.official import write_scenes

EXAMPLE = Example(
    dataset="toy",
    split="val",
    id="1",
    images=("a.png",),
    task="multiple_choice",
    question="what is written?",
    answers=("milk",),
    choices=("milk", "tea"),
    context="A cup.",
    ocr_tokens=("fresh", "milk"),
)


def test_there_are_ten_with_a_thread_and_two_settings_at_least() -> None:
    assert len(DISPUTED) == 10
    for name, entry in DISPUTED.items():
        assert entry.thread.startswith("https://github.com/salesforce/LAVIS/issues/"), name
        variants = entry.variants()
        assert next(iter(variants)) == "paper"
        assert len({str(benchmark.settings()) for benchmark in variants.values()}) >= 2, name
        for benchmark in variants.values():
            scorer_of(benchmark.metric)
            check_template(benchmark.prompt or "")


def test_prompts_leave_out_what_their_names_state() -> None:
    assert without_ocr_tokens(EXAMPLE) == "Context: A cup. Question: what is written? Short answer:"
    text = without_context(EXAMPLE)
    assert "A cup" not in text
    assert "(a) milk (b) tea" in text


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as stop:
        cli.main(["reproduce", *arguments, "--debug"])
    return stop.value.code  # type: ignore


def test_the_list_names_scores_and_threads(capsys: pytest.CaptureFixture[str]) -> None:
    assert run() == 0
    printed = capsys.readouterr().out
    assert "issues/719" in printed
    assert "83.1" in printed
    assert "82.4" in printed


def test_a_model_is_evaluated_under_every_setting(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_scenes(tmp_path / "scenes", scale=0.02, sets=("textvqa",))
    out = tmp_path / "out"
    data = f"data.root={tmp_path / 'scenes'}"
    assert run("textvqa", data, "--model", "starter", "--limit", "4", "--out", str(out)) == 0
    first, second = (Result.load(out / "textvqa" / number) for number in "01")
    assert "OCR tokens" in first.predictions[0]["prompt"]
    assert first.predictions[0]["extra"] is not None
    assert "OCR tokens" not in second.predictions[0]["prompt"]
    assert f"{first.value:.1f} [" in capsys.readouterr().out


def test_unknown_names_and_settings_without_a_model_are_refused() -> None:
    for arguments, message in (
        (["flickr"], "none of the scores"),
        (["flickr30k", "data.root=x"], "give --model"),
    ):
        with pytest.raises(ValueError, match=message):
            cli.main(["reproduce", *arguments, "--debug"])
