"""The scripts of the migration pages run: the loss of transformers' is that of our ranking."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from instructblip.data.tokens import Tokens
from instructblip.inference.engine import Engine
from instructblip.model.instructblip import InstructBlip
from instructblip.recipe.load import load_recipe
from instructblip.release.export import export_model
from tests.testing import write_picture

HOWTO = Path(__file__).parents[1] / "docs" / "howto"
COLOURS = ["red", "a red circle", "blue", "green"]


def blocks(page: str, language: str) -> list[str]:
    text = (HOWTO / page).read_text("utf-8")
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the pages start from: an InstructBLIP in models/mine, and my_images."""
    root = tmp_path_factory.mktemp("migration")
    starter = Engine.from_pretrained("starter", device="cpu")
    InstructBlip.from_pretrained("starter", instruction_aware=True).save_pretrained(root / "start")
    starter.tokens.save_pretrained(root / "start")
    starter.images.transform.save_pretrained(root / "start")
    export_model(root / "start", root / "models" / "mine")
    rows = [
        {"file_name": f"{i}.png", "question": "what color is it?", "answer": answer}
        for i, answer in enumerate(COLOURS)
    ]
    for i, row in enumerate(rows):
        write_picture(root / "my_images" / row["file_name"], (64, 64), seed=i)
    (root / "my_images" / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return root


def test_the_script_for_transformers_trains_on_the_loss_of_our_ranking(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    (script,) = blocks("from-transformers.md", "python")
    names: dict[str, Any] = {}
    exec(script.replace("range(8)", "range(2)"), names)
    trained = Engine.from_pretrained("models/tuned", device="cpu")
    assert isinstance(trained.tokens, Tokens)
    names["model"].eval()
    for row in names["rows"]:
        batch = names["collate"]([row])
        with torch.no_grad():
            loss = names["model"](**batch).loss * (batch["labels"] != -100).sum()
        prompt = f"Question: {row['question']} Short answer:"
        (score,) = trained.rank(f"my_images/{row['file_name']}", prompt, [row["answer"]])
        assert score == pytest.approx(-float(loss), rel=1e-4)


@pytest.mark.parametrize("page", ["from-transformers.md", "from-lavis.md"])
def test_the_recipes_load(folder: Path, page: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    Path("my.yaml").write_text(blocks(page, "yaml")[-1])
    recipe = load_recipe("my.yaml", [])
    assert list(recipe.data.sets) == ["mine"]
    assert recipe.training.batch_size in (4, 16)
