"""The model card: data with their terms, scores and settings, and no folder of this machine."""

import re
from dataclasses import replace

import pytest
import yaml

from instructblip.core.example import Example
from instructblip.data.chat_format import ChatFormat
from instructblip.evaluation.evaluate import evaluate
from instructblip.recipe.load import load_recipe
from instructblip.release.export import model_card
from tests.data.test_chat_format import FORMATS, chat_tokenizer
from tests.evaluation.fakes import FakeEngine, ListDataset, benchmark, colour_questions


def test_a_complete_card() -> None:
    recipe = load_recipe(
        "scenes", ["data.root=/secret/place", "data.sets.mine.format=imagefolder"]
    ).to_yaml()
    assert "/secret/place" in recipe
    result = evaluate(FakeEngine(), benchmark(), colour_questions())
    parts, settings = {"qformer": 1_234_567}, yaml.safe_load(recipe)
    text = model_card("mine", "InstructBlipForConditionalGeneration", parts, settings, [result])
    bounds = result.interval
    assert bounds is not None
    low = bounds.low  # exact, where every answer is right
    assert text.startswith("---\nlibrary_name: transformers\n")
    assert "# mine\n\nAn InstructBLIP" in text
    assert "| qformer | 1,234,567 |" in text
    assert "| mine | 1 | those of its owner |" in text
    assert "| vqav2 | 1 | " in text
    assert f"| toy | 100.0 [{low:.1f}, 100.0] | 12 of 12 | exact\\_match; generate (" in text
    assert f"| mean, held-in | 100.0 [{low:.1f}, 100.0] | 1 set |" in text
    assert "learning_rate:" in text
    assert "/secret/place" not in text
    assert "null" not in text


def test_a_card_without_recipe_and_scores() -> None:
    text = model_card("plain", "Blip2ForConditionalGeneration", {})
    assert "A BLIP-2" in text
    assert text.count("Not known.") == 2
    assert "Not evaluated." in text
    assert "Plain text: prompts and responses have no chat format." in text


@pytest.mark.parametrize("name", ["smollm2", "qwen3", "llama-3", "gemma"])
def test_a_card_shows_the_chat_format(name: str) -> None:
    template, end = FORMATS[name]
    chat = ChatFormat.of(chat_tokenizer(), template)
    text = model_card("mine", "InstructBlipForConditionalGeneration", {}, chat=chat)
    assert f"chat format of `chat_template.jinja`, and `{end}` ends a response" in text
    start = "<start_of_turn>" if name == "gemma" else "<|"
    shown = text.partition("```\n")[2].partition("\n```")[0]
    assert shown.startswith(("<|begin|>", start))
    assert f"<image>What is it?{end}" in shown
    assert shown.endswith(f"A red cat.{end}")


def test_scores_of_a_card() -> None:
    asked = benchmark(prompt="Question | {question}\nAnswer:")
    some = evaluate(FakeEngine(), asked, colour_questions(), limit=4)
    one_class = evaluate(
        FakeEngine(),
        benchmark(name="memes", mode="rank", metric="auroc", decoding={}),
        ListDataset([replace(e, choices=("red", "blue"), answers=("red",)) for e in reds()]),
    )
    assert one_class.value is None
    text = model_card("mine", "InstructBlipForConditionalGeneration", {}, None, [some, one_class])
    assert "| 4 of 12 |" in text
    assert r"Question \|" in text
    assert "| memes | not defined: one class only |" in text
    assert re.search(r"\| mean, held-in \| 100.0 \[\d\d.\d, 100.0\] \| 1 set \|", text)
    blind = evaluate(FakeEngine(), benchmark(), colour_questions(), blind_seed=0)
    with pytest.raises(ValueError, match="blind control"):
        model_card("mine", "x", {}, None, [blind])
    with pytest.raises(ValueError, match="two results of toy"):
        model_card("mine", "x", {}, None, [some, some])


def test_card_of_an_own_benchmark_has_every_metric_and_its_constant() -> None:
    asked = benchmark(role="own", metric="balanced_accuracy", others=("rouge_l",))
    result = evaluate(FakeEngine(), asked, colour_questions())
    text = model_card("mine", "InstructBlipForConditionalGeneration", {}, None, [result])
    constant = result.constants["balanced_accuracy"]
    assert f"always '{constant.answer}': {constant.score:.1f} |" in text
    assert "| toy rouge\\_l | 100.0" in text
    assert "NOT BETTER" not in result.describe()
    guess = replace(
        result,
        value=constant.score,
        score=replace(result.score, statistic=lambda weights: 0 * weights[:, 0]),
    )
    assert "NOT BETTER than this constant answer" in guess.describe()


def reds() -> list[Example]:
    return [e for e in colour_questions().examples if e.answers[0] == "red"]


HOSTILE = "a|b](https://evil.example)<img src=x>`c`\n---\n# not a heading"


def test_a_card_with_names_and_settings_full_of_markup() -> None:
    made = evaluate(
        FakeEngine(), benchmark(name=HOSTILE, prompt=f"{{question}} {HOSTILE}"), colour_questions()
    )
    recipe = {
        "data": {"sets": {HOSTILE: {"templates": ["one\n```\n\n# not a heading\n~~~"]}}},
        "model": {"start": HOSTILE},
    }
    text = model_card(HOSTILE, "InstructBlipForConditionalGeneration", {}, recipe, [made])
    assert yaml.safe_load(text.split("---\n")[1])["library_name"] == "transformers"
    outside, _, fenced = text.partition("\n````yaml\n")
    headings = [line for line in outside.splitlines() if line.startswith(("#", "---"))]
    assert headings == ["---", "---", headings[2]] + [
        f"## {name}" for name in ("Prompts", "Data", "Figures", "Recipe")
    ]
    assert fenced.rstrip().endswith("\n````")
    assert "````" not in fenced.rstrip()[:-4]
    prose = outside.split("---\n", 2)[2]
    assert "](" not in prose
    assert not re.search(r"(?<!\\)<img|(?<!\\)\|b", prose)


def test_a_chat_format_does_not_end_its_block() -> None:
    template, _ = FORMATS["smollm2"]
    chat = ChatFormat.of(chat_tokenizer(), "{{ '```\n# not a heading\n' }}" + template)
    text = model_card("mine", "InstructBlipForConditionalGeneration", {}, chat=chat)
    assert "\n````\n```\n# not a heading\n" in text
