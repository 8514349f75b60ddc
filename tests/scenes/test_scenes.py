"""The embedded world: annotations are true of their images; a seed determines the bytes."""

import filecmp
import itertools
import json
import math
import random

import numpy as np
import pytest
from PIL import Image

from instructblip.data.sources import SOURCES
from instructblip.scenes.language import CAPTIONS
from instructblip.scenes.official import SCENE_SETS, write_scenes
from instructblip.scenes.questions import (
    HELD_IN_KINDS,
    QUESTIONS,
    sides,
)
from instructblip.scenes.world import (
    COLOURS,
    HELD_OUT_PAIRS,
    SHAPES,
    Scene,
    Thing,
    render,
    sample_scene,
)

SCENE = Scene(
    (
        Thing("shape", "circle", 0, 0, "red", "large"),
        Thing("shape", "square", 1, 1, "blue", "small"),
        Thing("word", "cat", 2, 2),
    ),
    seed=5,
)
TRUTH = {
    "color": {"red", "blue"},
    "shape": {"circle", "square"},
    "size": {"large", "small"},
    "place": {"top left", "middle"},
    "corners": {"0", "4"},
    "fruit": {"cherry", "blueberry"},
    "signal": {"stop"},
    "word": {"cat"},
    "digit": set(),
    "most": set(),
    "word at": set(),
}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    root = tmp_path_factory.mktemp("scenes")
    return write_scenes(root, seed=3, scale=0.02)


@pytest.mark.parametrize("kind", TRUTH)
def test_answers_follow_from_the_scene(kind):
    questions = [QUESTIONS[kind](SCENE, random.Random(seed)) for seed in range(60)]
    assert {q.answer for q in questions if q} == TRUTH[kind]
    assert all(q.answer not in q.others for q in questions if q)


def test_questions_know_the_cells_of_what_they_ask_about():
    for seed in range(60):
        scene = sample_scene(random.Random(seed), shapes=(2, 3), words=2)
        for kind, ask in QUESTIONS.items():
            question = ask(scene, random.Random(seed))
            if question is None:
                continue
            things = [t for t in scene.things if (t.row, t.column) in question.cells]
            values = {v for t in things for v in (t.name, t.colour, t.size, t.place)}
            if kind in ("color", "shape", "shape at", "place", "size", "beside", "word at"):
                assert len(things) == 1
                assert question.answer in values
            elif kind in ("exists", "label"):
                assert len(things) == (question.answer == "yes")
            elif kind in ("statement", "most"):
                assert len(things) >= 2
                words = question.text if kind == "statement" else question.answer
                words = words.strip(".").split()
                assert all({t.name, t.colour} & set(words) for t in things)
            elif kind == "count":
                assert not things
            else:
                assert {things[0].name, things[0].colour} & set(question.text.split("?")[0].split())


def test_count_exists_and_statement_are_true():
    for seed in range(200):
        scene = sample_scene(random.Random(seed), shapes=(2, 3))
        looks = [(t.colour, t.name) for t in scene.shapes]
        question = QUESTIONS["exists"](scene, random.Random(seed))
        words = set(question.text.replace("?", "").split())
        asked = next((c, s) for c in COLOURS for s in SHAPES if {c, s} <= words)
        assert question.answer == ("yes" if asked in looks else "no")
        count = QUESTIONS["count"](scene, random.Random(seed))
        what = next(
            w for w in count.text.split() if w in COLOURS or w[:4] in _stems() or w == "shapes"
        )
        expected = [w for t in scene.shapes for w in (t.colour, t.name[:4])]
        number = (
            len(looks)
            if what == "shapes"
            else expected.count(what if what in COLOURS else what[:4])
        )
        assert count.answer == str(number)
        if statement := QUESTIONS["statement"](scene, random.Random(seed)):
            first, side, second = _parse(statement.text)
            by_name = {t.name: t for t in scene.shapes}
            holds = side in sides(by_name[first], by_name[second])
            assert statement.answer == ("true" if holds else "false")


def _stems():
    return {s[:4] for s in SHAPES}


def _parse(text):
    words = text.rstrip(".").split()
    names = [w for w in words if w in SHAPES]
    side = next(s for s in ("left of", "right of", "above", "below") if s in text)
    return names[0], side, names[1]


def test_captions_of_a_known_scene():
    assert [form(SCENE) for form in CAPTIONS] == [
        "a red circle, a blue square and the word cat",
        "there is a red circle, a blue square and the word cat",
        "a picture of a red circle, a blue square and the word cat",
        "a large red circle, a small blue square and the word cat",
        "a red circle at the top left, a blue square in the middle and the word cat at the "
        "bottom right",
    ]


def test_image_shows_the_shapes_of_the_scene():
    pixels = np.asarray(render(SCENE)).astype(int)
    for thing in SCENE.shapes:
        centre = pixels[int((thing.row + 0.5) * 64 / 3), int((thing.column + 0.5) * 64 / 3)]
        nearest = min(COLOURS, key=lambda c: abs(centre - np.array(COLOURS[c])).sum())
        assert nearest == thing.colour
    assert (pixels == np.asarray(render(SCENE))).all()


def test_scenes_without_held_out_pairs_and_with_them():
    for seed in range(300):
        seen = sample_scene(random.Random(seed), pairs="seen")
        unseen = sample_scene(random.Random(seed), pairs="unseen")
        assert not {(t.colour, t.name) for t in seen.shapes} & HELD_OUT_PAIRS
        assert {(t.colour, t.name) for t in unseen.shapes} & HELD_OUT_PAIRS


def test_digits_of_training_and_test_are_different_handwriting():
    def drawn(test: bool) -> set[bytes]:
        things = (Thing("digit", "7", 1, 1),)
        return {render(Scene(things, 2 * k, test)).tobytes() for k in range(40)}

    assert not drawn(True) & drawn(False)


@pytest.mark.parametrize("name", SCENE_SETS)
def test_official_readers_read_every_set(world, name):
    sources = {"llava": ("llava_conversation", "llava_detail", "llava_reasoning")}.get(
        name, (name,)
    )
    splits = SOURCES["pope"].splits if name == "pope" else SCENE_SETS[name].sizes
    for split in splits:
        for source in sources:
            examples = list(SOURCES[source].read(world[name], split))
            assert len(examples) >= 6
            assert all(
                e.answers and (world[name] / "images" / e.images[0]).is_file() for e in examples
            )
            if e := next((e for e in examples if e.choices), None):
                assert e.answers[0] in e.choices


def test_held_in_sets_never_show_a_held_out_pair(world):
    for example in SOURCES["coco_caption"].read(world["coco_caption"], "train"):
        assert not any(f"{c} {s}" in example.answers[0] for c, s in HELD_OUT_PAIRS)
    for example in SOURCES["nocaps"].read(world["nocaps"], "val"):
        assert any(f"{c} {s}" in example.answers[0] for c, s in HELD_OUT_PAIRS)


def test_held_in_questions_are_of_held_in_kinds(world):
    annotations = json.loads(
        (world["vqav2"] / "annotations" / "v2_mscoco_train2014_annotations.json").read_text()
    )["annotations"]
    assert {a["question_type"] for a in annotations} <= set(HELD_IN_KINDS)


def test_the_seed_determines_the_bytes(tmp_path, world):
    sets = ("vqav2", "iconqa", "ocrvqa")
    again = write_scenes(tmp_path / "again", seed=3, scale=0.02, sets=sets)
    for name in sets:
        files = [p.relative_to(again[name]) for p in again[name].rglob("*") if p.is_file()]
        _, different, missing = filecmp.cmpfiles(again[name], world[name], files, shallow=False)
        assert files
        assert not different + missing
    other = write_scenes(tmp_path / "other", seed=4, scale=0.02, sets=("vqav2",))["vqav2"]
    name = next((other / "images").iterdir()).name
    assert (other / "images" / name).read_bytes() != (world["vqav2"] / "images" / name).read_bytes()


def test_a_set_is_written_again_only_with_other_settings(tmp_path):
    folder = write_scenes(tmp_path, scale=0.02, sets=("vsr",))["vsr"]
    note = folder / "note.txt"
    note.write_text("mine")
    write_scenes(tmp_path, scale=0.02, sets=("vsr",))
    assert note.exists()
    write_scenes(tmp_path, seed=1, scale=0.02, sets=("vsr",))
    assert not note.exists()
    assert (folder / "annotations" / "test.jsonl").exists()


@pytest.mark.parametrize("kind", ["folder", "link", "link to an empty folder", "file"])
def test_other_data_is_never_replaced(kind, tmp_path):
    real, root = tmp_path / "real", tmp_path / "root"
    taken = root / "gqa"
    root.mkdir()
    if kind == "file":
        taken.write_text("mine")
    elif kind == "folder":
        (taken / "annotations").mkdir(parents=True)
    else:
        (real if "empty" in kind else real / "annotations").mkdir(parents=True)
        taken.symlink_to(real)
    with pytest.raises(ValueError, match=rf"{taken}: .*did not write this.*another ROOT"):
        write_scenes(root, scale=0.02, sets=("vsr", "gqa"))
    assert [path.name for path in root.iterdir()] == ["gqa"]  # nothing was written


def test_an_empty_folder_is_filled(tmp_path):
    (tmp_path / "vsr").mkdir()
    folder = write_scenes(tmp_path, scale=0.02, sets=("vsr",))["vsr"]
    assert (folder / "annotations").is_dir()


@pytest.mark.parametrize("scale", [-1, 0, math.nan, math.inf])
def test_scale_is_positive_and_finite(scale, tmp_path):
    with pytest.raises(ValueError, match=r"scale .*expected a number above 0"):
        write_scenes(tmp_path / "root", scale=scale)
    assert not (tmp_path / "root").exists()


def test_unknown_set_is_named(tmp_path):
    with pytest.raises(ValueError, match="no scene set"):
        write_scenes(tmp_path, sets=("vqa",))


def test_unanswerable_images_are_blurred(world):
    examples = list(SOURCES["vizwiz"].read(world["vizwiz"], "val"))
    assert {len(e.answers) for e in examples} == {10}
    for example in examples:
        with Image.open(world["vizwiz"] / "images" / example.images[0]) as image:
            contrast = np.asarray(image.convert("L")).astype(int)
        edges = np.abs(np.diff(contrast, axis=1)).max()
        assert (edges < 20) == (example.answers[0] == "unanswerable")
    assert {e.extra["answerable"] for e in examples} == {0, 1}


def test_in_a_video_one_shape_moves_and_the_other_stays(world):
    examples = list(SOURCES["msvdqa"].read(world["msvdqa"], "test"))
    for example in examples:
        assert len(example.images) == 4
        frames = [
            np.asarray(Image.open(world["msvdqa"] / "images" / name)).astype(int)
            for name in example.images
        ]
        assert all((a != b).any() for a, b in itertools.pairwise(frames))
        asked_for_colour = "color" in example.question
        assert example.answers[0] in (COLOURS if asked_for_colour else SHAPES)
        if asked_for_colour:  # what stays has the same place in every frame
            near = [np.abs(f - np.array(COLOURS[example.answers[0]])).max(2) < 40 for f in frames]
            assert np.logical_and.reduce(near).any() == ("stays" in example.question)
