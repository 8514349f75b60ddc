"""Recipes: what ships, what can be overridden, and which error a mistake raises."""

from pathlib import Path

import pytest

from instructblip.experiment.datasets import evaluated_too
from instructblip.recipe.load import RECIPES, differences, find_recipe, load_recipe
from instructblip.recipe.schema import Recipe

SHIPPED = sorted(path.stem for path in RECIPES.glob("*.yaml"))


@pytest.mark.parametrize("name", SHIPPED)
def test_every_shipped_recipe_reads_and_writes_itself(name: str, tmp_path: Path):
    recipe = load_recipe(name)
    written = tmp_path / "recipe.yaml"
    written.write_text(recipe.to_yaml())
    assert load_recipe(written) == recipe
    assert not any(evaluated_too(recipe, name) for name in recipe.data.sets)


def test_the_papers_recipes():
    """Section 2.6 of the paper: 60K steps, batch by size of the model, 1e-8 -> 1e-5 -> 0."""
    batches = {"flant5xl": 192, "flant5xxl": 64, "vicuna7b": 128, "vicuna13b": 64}
    for name, batch in batches.items():
        recipe = load_recipe(f"instructblip_{name}")
        training = recipe.training
        assert (training.steps, training.batch_size, training.validate_every) == (
            60_000,
            batch,
            3000,
        )
        assert (training.warmup_start_learning_rate, training.learning_rate) == (1e-8, 1e-5)
        assert (training.min_learning_rate, training.warmup_steps) == (0.0, 1000)
        assert (training.weight_decay, training.betas) == (0.05, (0.9, 0.999))
        assert (recipe.model.image_size, recipe.data.temperature) == (224, 0.5)
        assert recipe.training.trainable == ("qformer",)
        assert len(recipe.data.sets) == 14  # the 13 of the paper, A-OKVQA in two forms


def test_overrides_are_yaml():
    overrides = [
        "training.steps=2000",
        "training.warmup_steps=0",
        "training.clip_norm=null",
        "training.trainable=[query_tokens, projection]",
        "data.sets.vqav2.weight=2",
        "data.sets.gqa.split=val",
        "evaluation.decoding.num_beams=5",
    ]
    recipe = load_recipe("scenes", overrides)
    assert recipe.training.steps == 2000
    assert recipe.training.clip_norm is None
    assert recipe.training.trainable == ("query_tokens", "projection")
    assert recipe.data.sets["vqav2"].weight == 2
    assert recipe.data.sets["gqa"].split == "val"
    assert recipe.evaluation.decoding == {"num_beams": 5}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "training.learning_rat=1",
            r"unknown key training.learning_rat: did you mean learning_rate\?",
        ),
        ("trainign.steps=1", r"unknown key trainign: did you mean training\?"),
        ("data.sets.vqav2.wieght=1", r"unknown key data.sets.vqav2.wieght: did you mean weight\?"),
        ("data.zzzz=1", "unknown key data.zzzz: known are .*temperature"),
        ("training.steps=-1", r"training.steps: .*greater than 0 \(got -1\)"),
        ("training.steps=many", r"training.steps: .*valid integer.*\(got 'many'\)"),
        (
            "training={early_stopping_patience: 2, validate_every: null}",
            "training: early_stopping_patience 2 counts validations.*: set validate_every",
        ),
        ("data.sets.vqav2.split=trian", r"data.sets.vqav2.split: .*'train'.*\(got 'trian'\)"),
        ("data.temperature=2", "data.temperature: .*less than or equal to 1"),
        ("data.sets={../../up: {}}", r"data.sets.../../up.*: expected a name .*\(got '../../up'\)"),
        ("data.sets={.vqav2: {}}", r"data.sets.*letters, digits"),
        ("data.sets={'': {}}", r"data.sets.*letters, digits"),
        ("training.steps", "expected an override such as training.steps=100"),
        ("training..steps=1", "expected an override"),
        ("training.steps.more=1", "steps is 2000, which has no keys"),
        ("training.steps=[1", "is not YAML"),
        (
            "drawing={sets: {a: {kind: scenes}}, decoder: {kind: native, widht: 3}}",
            r"unknown key drawing.decoder.native.widht: did you mean width\?",
        ),
        ("training={steps: 1, steps: 2}", "the key steps is there twice"),
        ("training.device=foo", r"training.device: expected auto, cpu, .*\(got 'foo'\)"),
        ("training.device=cuda:one", r"training.device: expected auto, cpu"),
        ("training.seed=18446744073709551616", "training.seed: .*less than 18446744073709551616"),
        ("data.sets.vqav2.weight=.inf", "data.sets.vqav2.weight: .*finite number"),
        ("data.sets.vqav2.weight=.nan", "data.sets.vqav2.weight: .*finite number"),
        ("training.learning_rate=.inf", "training.learning_rate: .*finite number"),
        ("model.lora.alpha=.inf", "model.lora.alpha: .*finite number"),
    ],
)
def test_mistakes_name_the_key_and_the_remedy(override: str, message: str):
    with pytest.raises(ValueError, match=message):
        load_recipe("scenes", [override])


def test_mistakes_in_a_file_name_the_file(tmp_path: Path):
    path = tmp_path / "mine.yaml"
    path.write_text("data: {sets: {vqav2: {}}, temprature: 1}\n")
    with pytest.raises(ValueError, match=r"mine.yaml: unknown key .*did you mean temperature\?"):
        load_recipe(path)
    path.write_text("training: {steps: 5000}\n")
    with pytest.raises(ValueError, match=r"mine.yaml: data is missing"):
        load_recipe(path)
    path.write_text("- a list\n")
    with pytest.raises(ValueError, match=r"expected the sections model, data, training"):
        load_recipe(path)
    path.write_text("data: [\n")
    with pytest.raises(ValueError, match=r"mine.yaml is not YAML"):
        load_recipe(path)
    path.write_text("training:\n  steps: 1\n  seed: 2\n  steps: 3\n")
    with pytest.raises(ValueError, match=r"mine.yaml .*the key steps is there twice.* line 4"):
        load_recipe(path)
    path.write_text("data: !!python/object/apply:os.system ['true']\n")
    with pytest.raises(ValueError, match=r"not YAML"):
        load_recipe(path)


def test_a_recipe_may_merge_what_it_then_overrides(tmp_path: Path):
    path = tmp_path / "mine.yaml"
    entry = "&one {weight: 2, split: val}"
    path.write_text(f"data: {{sets: {{vqav2: {entry}, gqa: {{<<: *one, weight: 3}}}}}}\n")
    sets = load_recipe(path).data.sets
    assert (sets["vqav2"].weight, sets["gqa"].weight, sets["gqa"].split) == (2, 3, "val")


def test_an_unknown_recipe_names_the_nearest():
    with pytest.raises(FileNotFoundError, match=r"did you mean quickstart.*one of.*scenes"):
        find_recipe("quikstart")


def test_differences():
    left, right = load_recipe("scenes"), load_recipe("scenes", ["training.steps=7000"])
    assert differences(left, right) == ["training.steps: 2000 -> 7000"]
    assert differences(left, left) == []


def test_a_recipe_is_frozen():
    recipe = load_recipe("scenes")
    with pytest.raises(ValueError, match=r"frozen"):
        recipe.training.steps = 3  # type: ignore[misc]


def test_roots_of_sources():
    data = Recipe.model_validate(
        {"data": {"root": "d", "sets": {"a": {"source": "vqav2", "root": "x"}, "gqa": {}}}}
    ).data
    assert [data.root_of(name) for name in ("vqav2", "gqa", "vsr")] == [
        Path("d/x"),
        Path("d/gqa"),
        Path("d/vsr"),
    ]
    twice = Recipe.model_validate(
        {"data": {"root": "d", "sets": {"vqav2": {}, "more": {"source": "vqav2", "root": "x"}}}}
    ).data
    assert twice.root_of("vqav2") == Path("d/vqav2")  # the first entry's


def test_a_bare_on_or_off_is_a_word_not_a_boolean():
    for word in ("on", "off", "auto"):
        assert load_recipe("quickstart", [f"features.cache={word}"]).features.cache == word
    with pytest.raises(ValueError, match=r"features\.cache"):
        load_recipe("quickstart", ["features.cache=maybe"])


@pytest.mark.parametrize(
    ("decoding", "message"),
    [
        ("{num_beems: 5}", "evaluation.decoding: unknown decoding setting num_beems: did you mean"),
        ("{num_beams: 0}", "evaluation.decoding: num_beams must be a whole number from 1 to 100"),
    ],
)
def test_decoding_is_checked_when_the_recipe_is_read(decoding: str, message: str):
    with pytest.raises(ValueError, match=message):
        load_recipe("quickstart", [f"evaluation.decoding={decoding}"])


def test_a_recipe_starts_from_the_settings_of_its_base(tmp_path: Path):
    (tmp_path / "first.yaml").write_text(
        "base: quickstart\ndata: {seed: 3, sets: {vqav2: {}}}\n"
        "training: {steps: 7, warmup_steps: 1}\n"
    )
    (tmp_path / "second.yaml").write_text("base: first.yaml\ntraining: {steps: 9}\n")
    recipe, base = load_recipe(tmp_path / "second.yaml"), load_recipe("quickstart")
    assert (recipe.training.steps, recipe.training.warmup_steps, recipe.data.seed) == (9, 1, 3)
    assert list(recipe.data.sets) == ["vqav2"]
    assert recipe.training.batch_size == base.training.batch_size
    assert "base" not in recipe.to_yaml()
    assert load_recipe("instructblip_flant5xl").data == load_recipe("instructblip_vicuna7b").data


def test_a_folder_is_no_recipe(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match=r"is a folder, .*instructblip tune .* checks"):
        load_recipe(tmp_path)


def test_a_base_that_cannot_be_read_is_named(tmp_path: Path):
    path = tmp_path / "mine.yaml"
    for base, message in (
        ("quikstart", "no recipe quikstart: did you mean quickstart"),
        ("[a]", "base: expected the name or path of a recipe"),
        ("mine.yaml", "more than 8 recipes are based on each other"),
    ):
        path.write_text(f"base: {base}\n")
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            load_recipe(path)


LAUGHS = "a0: &a0 [x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 20)
)
BOMBS = {
    "deep": "data: " + "[" * 10_000,
    "deep mapping": "data: " + "{a: " * 10_000,
    "aliases": LAUGHS,
    "alias of itself": "data: &a [*a]",
    "long line": "data: {root: " + "x" * 5_000_000 + "}",
}


@pytest.mark.parametrize("text", BOMBS.values(), ids=BOMBS)
def test_a_bomb_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"mine\.yaml .*(too deeply|too much|more than)") as raised:
        load_recipe(path)
    assert len(str(raised.value)) < 400
    with pytest.raises(ValueError, match=r"too deeply|too much"):
        load_recipe("quickstart", ["data.root=" + "[" * 500])
