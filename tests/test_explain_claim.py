"""How the maps of an answer are judged."""

import numpy as np
import pytest
import torch

from instructblip.scenes.world import Scene, Thing, render
from runs.trust.explain import KINDS, alike, ask_scenes, boxes, judge

SCENE = Scene(
    (
        Thing("shape", "square", 0, 0, "red", "large"),
        Thing("shape", "circle", 1, 2, "blue", "small"),
    ),
    seed=1,
)


def test_boxes_are_those_of_the_things() -> None:
    image = render(SCENE)
    one, two = boxes(image, [(0, 0)], 3), boxes(image, [(0, 0), (1, 2)], 3)
    rows, columns = np.nonzero(one)
    assert rows.max() < 22
    assert columns.max() < 22
    assert 12**2 < one.sum() < 20**2
    red = np.asarray(image)[one]
    assert (red[:, 0] > red[:, 2]).mean() > 0.9
    assert two.sum() > one.sum()
    assert two[:22, :22].sum() == one.sum()


def test_a_map_is_judged_by_its_peak() -> None:
    region = boxes(render(SCENE), [(1, 2)], 3)
    row, column = (int(x.mean()) // 8 for x in np.nonzero(region))
    weights = torch.zeros(8, 8)
    weights[row, column] = 1
    right = judge(weights, region)
    assert (right["hit"], right["touch"]) == (1, 1)
    assert right["inside"] == pytest.approx(region[8 * row :, 8 * column :][:8, :8].mean())
    assert judge(weights.flip(0, 1), region) == {"hit": 0, "touch": 0, "inside": 0}
    assert alike(weights, weights) == pytest.approx(1)
    assert alike(weights, torch.ones(8, 8)) == 0


def test_questions_of_every_kind_about_several_things() -> None:
    asked = ask_scenes("test", 1)
    assert [each.kind for each in asked] == list(KINDS)
    assert all(each.region.any() for each in asked)
    assert all(0 < each.share <= 1 for each in asked)
    others = ask_scenes("other", 1)
    assert [each.instruction for each in asked] != [each.instruction for each in others]
