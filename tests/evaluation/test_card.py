"""The model card: data with their terms, figures and settings, and no folder of this machine."""

from pathlib import Path

from instructblip.evaluation.card import write_card
from instructblip.evaluation.evaluate import evaluate
from instructblip.recipe import load_recipe
from tests.evaluation.fakes import FakeEngine, benchmark, colour_questions


def test_a_card_with_all_of_it(tmp_path: Path) -> None:
    recipe = load_recipe(
        "scenes", ["data.root=/secret/place", "data.sets.mine.format=imagefolder"]
    ).to_yaml()
    assert "/secret/place" in recipe
    result = evaluate(FakeEngine(), benchmark(), colour_questions())
    folder = tmp_path / "mine"
    folder.mkdir()
    parts = {"qformer": 1_234_567}
    text = write_card(
        folder, "InstructBlipForConditionalGeneration", parts, recipe, [result]
    ).read_text("utf-8")
    assert text.startswith("---\nlibrary_name: transformers\n")
    assert "# mine\n\nAn InstructBLIP" in text
    assert "| qformer | 1,234,567 |" in text
    assert "| mine | 1 | those of its owner |" in text
    assert "| vqav2 | 1 | " in text
    assert "| toy | 100.0 |" in text
    assert "| mean, held-in | 100.0 |" in text
    assert "learning_rate:" in text
    assert "/secret/place" not in text
    assert "null" not in text


def test_a_card_without_recipe_and_figures(tmp_path: Path) -> None:
    text = write_card(tmp_path, "Blip2ForConditionalGeneration", {}).read_text("utf-8")
    assert "A BLIP-2" in text
    assert text.count("Not known.") == 2
    assert "Not evaluated." in text
