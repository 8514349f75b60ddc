"""The checker reads rendered scenes, and rejects other prompts and broken images."""

import random
from dataclasses import replace

import numpy as np
from PIL import Image

from instructblip.scenes.world import COLOURS, SHAPES, Scene, Thing, render, sample_scene
from instructblip.text_to_image.checker import check_image, find_things

N = 200


def scenes(shapes: tuple[int, int], seed: int) -> list[Scene]:
    rng = random.Random(seed)
    return [sample_scene(rng, shapes=shapes, pairs="any") for _ in range(N)]


def test_reads_rendered_scenes_exactly():
    worlds = [*scenes((1, 2), 1), *scenes((3, 4), 2)]
    exact = [check_image(render(s), s.things).exact for s in worlds]
    assert np.mean(exact) >= 0.99, [s.things for s, ok in zip(worlds, exact, strict=True) if not ok]


def test_every_shape_and_colour_in_every_cell():
    for cell in range(9):
        for shape in SHAPES:
            for colour in COLOURS:
                thing = Thing("shape", shape, cell // 3, cell % 3, colour, "small")
                assert find_things(render(Scene((thing,), seed=cell))) == [thing]


def test_mismatched_prompts_are_wrong():
    worlds = scenes((1, 2), 3)
    others = [worlds[(i + 1) % N] for i in range(N)]
    pairs = [
        (s, o)
        for s, o in zip(worlds, others, strict=True)
        if not {replace(t, size="") for t in s.things} & {replace(t, size="") for t in o.things}
    ]
    right = [r for s, o in pairs for r in check_image(render(s), o.things).right]
    assert len(pairs) > N / 2
    assert np.mean(right) <= 0.01


def test_one_wrong_attribute_is_detected():
    thing = Thing("shape", "star", 0, 2, "blue", "large")
    image = render(Scene((thing,), seed=5))
    assert check_image(image, [thing]).exact
    assert check_image(image, [replace(thing, size="")]).exact
    for wrong in ({"colour": "red"}, {"name": "cross"}, {"size": "small"}, {"column": 0}):
        verdict = check_image(image, [replace(thing, **wrong)])
        assert verdict.right == (False,)
    extra = replace(thing, row=2, colour="red")
    assert not check_image(render(Scene((thing, extra), seed=5)), [thing]).exact


def test_pieces_and_noise_are_not_shapes():
    pixels = np.array(render(Scene((Thing("shape", "circle", 1, 1, "red", "large"),), seed=2)))
    pixels[:32] = pixels[0, 0]  # the upper half is gone
    things = find_things(Image.fromarray(pixels))
    assert [t.name for t in things] != ["circle"]
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    assert not any(t.name and t.colour for t in find_things(Image.fromarray(noise)))


def test_other_sizes_are_resized():
    thing = Thing("shape", "heart", 1, 0, "green", "large")
    assert find_things(render(Scene((thing,), seed=1), size=128)) == [thing]
