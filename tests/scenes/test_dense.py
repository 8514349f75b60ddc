"""The dense world: answers follow from the image, and training shows nothing that is held out."""

import json
import random

import numpy as np
import pytest

from instructblip.cli import main as cli
from instructblip.data.sources import SOURCES
from instructblip.scenes.dense import (
    BY_LOOK,
    BY_PLACE,
    DENSE_SETS,
    FEWEST,
    MOST,
    DenseScene,
    Item,
    ask_beside,
    ask_number,
    ask_one_each,
    ask_statement,
    limit,
    render_dense,
    sample_dense,
    write_dense,
)
from instructblip.scenes.world import HELD_OUT_PAIRS

HEART = Item("red", "heart", "large", "7", 1, 3)
STAR = Item("blue", "star", "small", "4", 1, 2)
SCENE = DenseScene((Item("red", "cross", "small", "0", 0, 0), STAR, HEART), seed=1)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return write_dense(tmp_path_factory.mktemp("dense"), seed=3, scale=0.02)


def test_answers_follow_from_the_scene():
    rng = random.Random(0)
    asked = {kind: ask(SCENE, HEART, rng) for kind, ask in (BY_PLACE | BY_LOOK).items()}
    assert {kind: question.answer for kind, question in asked.items()} == {
        "color at": "red",
        "shape at": "heart",
        "digit at": "7",
        "size at": "large",
        "digit on": "7",
        "size of": "large",
        "row of": "2",
        "column of": "4",
    }
    assert asked["color at"].text == "what color is the shape in the second row, column 4?"
    assert asked["row of"].text == "in which row is the red heart?"
    assert all(question.answer not in question.others for question in asked.values())
    assert {question.cells for question in asked.values()} == {((1, 3),)}


def test_one_question_about_each_of_three_things():
    scene = sample_dense(random.Random(0))
    asked = ask_one_each(scene)
    assert [each.kind for each in asked] == ["row of", "digit on", "size of"]
    named = [next(i for i in scene.items if i.look in each.text) for each in asked]
    assert len(set(named)) == 3
    assert named[0] == scene.items[0]
    assert asked[0].answer == str(named[0].row + 1)
    assert asked[1].answer == named[1].digit


def test_what_is_beside_a_thing():
    questions = [ask_beside(SCENE, STAR, random.Random(seed)) for seed in range(60)]
    assert {q.answer for q in questions if q} == {"heart", "red", "7"}
    assert {q.cells for q in questions if q} == {((1, 3),)}  # of the heart
    assert {q.text for q in questions if q} == {
        "what shape is right of the blue star?",
        "what color is the shape right of the blue star?",
        "which digit is right of the blue star?",
    }


def test_statements_and_numbers_are_true():
    for seed in range(100):
        question = ask_statement(SCENE, HEART, random.Random(seed))
        said = question.text.removesuffix(".").split()[-1]
        assert question.answer == str(said in ("red", "heart", "7", "large")).lower()
        number = ask_number(SCENE, HEART, random.Random(seed))
        what = number.text.split()[2].removesuffix("s")
        assert number.answer == str(int(what in ("red", "heart")) + int(what in ("blue", "star")))


def test_scenes_are_dense_and_tell_things_apart_by_look():
    for seed in range(50):
        scene = sample_dense(random.Random(seed))
        looks = {item.look for item in scene.items}
        assert FEWEST <= len(scene.items) <= MOST
        assert len(looks) == len(scene.items)
        assert not {(i.colour, i.shape) for i in scene.items} & HELD_OUT_PAIRS


def test_every_property_shows_in_the_image():
    image = np.asarray(render_dense(SCENE)).astype(int)
    for change in (
        {"colour": "blue"}, {"shape": "circle"}, {"size": "small"}, {"digit": "1"}, {"row": 4},
    ):  # fmt: skip
        settings = {key: getattr(HEART, key) for key in HEART.__dataclass_fields__} | change
        other = DenseScene((*SCENE.items[:2], Item(**settings)), seed=1)
        assert np.abs(np.asarray(render_dense(other)).astype(int) - image).max() > 60, change


def test_readers_of_the_published_sets_read_it(world):
    assert set(world) == set(DENSE_SETS)
    for name, folder in world.items():
        for split in DENSE_SETS[name].sizes:
            examples = list(SOURCES[name].read(folder, split))
            assert len(examples) >= 6, (name, split)
            assert all(e.answers for e in examples), (name, split)


def test_training_never_shows_what_is_held_out(world):
    for name in ("vqav2", "okvqa"):
        for file in (world[name] / "annotations").glob("*train2014_questions.json"):
            texts = [q["question"] for q in json.loads(file.read_text())["questions"]]
            assert not any(f"{c} {s}" in t for c, s in HELD_OUT_PAIRS for t in texts)
    asked = json.loads((world["vizwiz"] / "annotations/val.json").read_text())
    assert all(any(f"{c} {s}" in q["question"] for c, s in HELD_OUT_PAIRS) for q in asked)


def test_limit_of_a_qformer_that_does_not_read():
    assert limit(0, 0.2) == 0.2
    assert limit(100, 0.2) == 1.0
    assert limit(4, 0.0) == pytest.approx(4 / 22.5)


def test_the_command_writes_it(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["scenes", str(tmp_path), "--dense", "--scale", "0.01"])
    assert not stop.value.code
    assert "8 data sets" in capsys.readouterr().out
    assert (tmp_path / "iconqa").is_dir()
