"""A printed recipe is the recipe with comments, and the schema agrees with what is read."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema_rs
import pytest
import yaml

from instructblip.recipe.load import RECIPES, load_recipe
from instructblip.recipe.writing import commented, json_schema, titles

NAMES = sorted(path.stem for path in RECIPES.glob("*.yaml"))


@pytest.mark.parametrize("name", NAMES)
def test_a_printed_recipe_is_the_recipe(name: str, tmp_path: Path):
    text = commented(name)
    (tmp_path / "mine.yaml").write_text(text)
    assert load_recipe(tmp_path / "mine.yaml") == load_recipe(name)
    assert "base:" not in text
    assert commented(tmp_path / "mine.yaml") == text
    lines = text.splitlines()
    settings = [i for i, line in enumerate(lines) if line[:2] == "  " and line[2] not in " #"]
    assert len(settings) >= 10
    for i in settings:
        assert lines[i - 1].startswith("  # "), lines[i]
        assert len(lines[i - 1]) <= 100


def test_titles_are_short():
    assert list(titles()) == NAMES
    for title in titles().values():
        assert 10 < len(title) < 100
    assert titles()["scenes"] == "Instruction tuning on Scenes, the embedded world"


def test_every_setting_has_a_sentence():
    parts = {"Recipe": json_schema(), **json_schema()["$defs"]}
    bare = [
        f"{part}.{key}"
        for part, schema in parts.items()
        for key, setting in schema.get("properties", {}).items()
        if not setting.get("description", "").endswith(".")
    ]
    bare.remove("Recipe.model")  # its sentence is that of ModelConfig
    assert set(bare) <= {"NativeConfig.kind", "DiffusersConfig.kind"}


def errors(text: str) -> Iterator[Any]:
    return jsonschema_rs.Draft202012Validator(json_schema()).iter_errors(yaml.safe_load(text))


@pytest.mark.parametrize("name", NAMES)
def test_the_schema_takes_what_ships(name: str):
    assert not list(errors((RECIPES / f"{name}.yaml").read_text()))
    assert not list(errors(commented(name)))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("data: {sets: {a: {}}, temprature: 1}", "'temprature' was unexpected"),
        ("data: {sets: {a: {wieght: 1}}}", "'wieght' was unexpected"),
        ("{data: {sets: {a: {}}}, training: {steps: many}}", '"many" is not of type "integer"'),
        ("{data: {sets: {a: {}}}, training: {steps: 0}}", "less than or equal to the minimum"),
        ("{data: {sets: {a: {}}}, training: {report_to: [clearml]}}", "is not one of"),
        ("data: {root: here}", '"sets" is a required property'),
        ("training: {steps: 3}", '"data" is a required property'),
        ("{base: draw, training: {stepz: 3}}", "'stepz' was unexpected"),
    ],
)
def test_the_schema_refuses_what_the_loader_refuses(text: str, message: str, tmp_path: Path):
    assert [error for error in errors(text) if message in error.message]
    (tmp_path / "wrong.yaml").write_text(text)
    with pytest.raises(ValueError, match=r"wrong\.yaml"):
        load_recipe(tmp_path / "wrong.yaml")


@pytest.mark.parametrize(
    "text", ["{base: scenes, data: {seed: 3}}", "{base: draw, drawing: {understanding: 0.5}}"]
)
def test_a_base_may_have_what_is_required(text: str, tmp_path: Path):
    assert not list(errors(text))
    (tmp_path / "right.yaml").write_text(text)
    load_recipe(tmp_path / "right.yaml")
