"""Examples to draw, and how they become batches."""

import json
from itertools import chain, islice
from pathlib import Path

import pytest
import torch

from instructblip.core.example import Example
from instructblip.data.custom.folder import FolderSet
from instructblip.scenes.world import HELD_OUT_PAIRS
from instructblip.text_to_image.batches import DrawLoader, Interleaved, target_pixels
from instructblip.text_to_image.checker import check_image, find_things
from instructblip.text_to_image.tasks import (
    CaptionedImages,
    SceneDrawings,
    SubjectDrawings,
    read_instructions,
)
from tests.testing import write_picture


def test_targets_show_what_the_instruction_names():
    for drawings in (SceneDrawings((1, 2)), SubjectDrawings()):
        for index in range(40):
            example = drawings[index]
            assert example.target is not None
            assert check_image(example.target(), example.things).exact
            for thing in example.things:
                assert thing.place in example.instruction
                assert (thing.colour, thing.name) not in HELD_OUT_PAIRS


def test_a_subject_supplies_what_the_instruction_leaves_out():
    kinds = set()
    for index in range(40):
        example = SubjectDrawings()[index]
        assert example.image is not None
        (subject,), (wanted,) = find_things(example.image()), example.things
        words = example.instruction.split()
        kinds.add((wanted.colour in words, wanted.name in words))
        assert wanted.colour in words or wanted.colour == subject.colour
        assert wanted.name in words or wanted.name == subject.name
    assert kinds == {(True, False), (False, True), (False, False)}


def write_lines(path: Path, *rows: object) -> Path:
    path.write_text("\n".join(r if isinstance(r, str) else json.dumps(r) for r in rows))
    return path


def test_an_instruction_file(tmp_path: Path):
    write_picture(tmp_path / "a.png", seed=1)
    write_picture(tmp_path / "b.png", seed=2)
    rows = [
        {"instruction": "draw it", "target_image": "b.png", "image": "a.png"},
        {"instruction": "draw red", "target_image": "a.png"},
    ]
    drawings = read_instructions(write_lines(tmp_path / "x.jsonl", *rows))
    assert len(drawings) == 2
    assert drawings[0].image is not None
    assert drawings[1].image is None


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{", "is not JSON"),
        ({"target_image": "a.png"}, "field 'instruction' is missing.*expected a string"),
        ({"instruction": " ", "target_image": "a.png"}, "field 'instruction' is ' '.*to draw"),
        ({"instruction": "draw"}, "field 'target_image' is missing.*expected a string"),
        ({"instruction": "draw", "target_image": "../a.png"}, "leaves the image root"),
        ({"instruction": "a", "target_image": "a", "image": 3}, "field 'image' is 3.*a string"),
    ],
)
def test_bad_lines_are_named(tmp_path: Path, row: object, message: str):
    good = {"instruction": "draw red", "target_image": "a.png"}
    with pytest.raises(ValueError, match=rf"^x\.jsonl:line 2: .*{message}"):
        read_instructions(write_lines(tmp_path / "x.jsonl", good, row))


def test_missing_files_are_named(tmp_path: Path, painter):
    with pytest.raises(FileNotFoundError, match="no instruction file"):
        read_instructions(tmp_path / "x.jsonl")
    row = {"instruction": "draw red", "target_image": "a.png"}
    drawings = read_instructions(write_lines(tmp_path / "x.jsonl", row))
    loader = DrawLoader({"x": drawings}, {}, painter.tokens, painter.transform, 16, batch_size=1)
    with pytest.raises(FileNotFoundError, match=r"x\.jsonl:line 1: image .*a\.png does not exist"):
        loader.batch(0)


def test_a_caption_asks_for_its_image(tmp_path: Path):
    write_picture(tmp_path / "a.png", seed=1)
    example = Example(
        dataset="coco", split="train", id="1", images=("a.png",), task="caption",
        answers=("a red cat", " ", "one cat", ""),
    )  # fmt: skip
    drawings = CaptionedImages(FolderSet([example], tmp_path))
    for seed in range(8):
        assert "cat" in CaptionedImages(FolderSet([example], tmp_path), seed)[0].instruction
    assert drawings[0].target is not None
    assert drawings[0].target().size[0] > 0


def test_batches_are_a_function_of_the_step(painter):
    def loader(**options) -> DrawLoader:
        sets = {"scenes": SceneDrawings(), "subjects": SubjectDrawings()}
        tools = (painter.tokens, painter.transform, 16)
        return DrawLoader(sets, {}, *tools, batch_size=8, **options)

    one, two = loader().batch(5), next(loader().iterate(5))[0]
    assert one.ids == two.ids
    assert one.target_values is not None
    assert two.target_values is not None
    assert torch.equal(one.target_values, two.target_values)
    ranks = [loader(rank=r, world_size=2).batch(5) for r in (0, 1)]
    assert ranks[0].ids + ranks[1].ids == one.ids
    micros = next(loader(accumulate=2).iterate(5))
    assert micros[0].ids + micros[1].ids == one.ids
    with pytest.raises(ValueError, match="expected a multiple of 3"):
        loader(accumulate=3)
    late = loader(starts={"subjects": 4})
    assert set(late.batch(3).datasets) == {"scenes"}
    assert set(late.batch(4).datasets) == {"scenes", "subjects"}


def test_interleaved_batches_resume_at_their_step():
    class Numbers:
        def __init__(self, name: str) -> None:
            self.name = name

        def iterate(self, step: int):
            return iter([[(self.name, n)] for n in range(step, 100)])

    mixed = Interleaved(Numbers("draw"), Numbers("understand"), 0.25, accumulate=2)  # type: ignore
    whole = list(chain.from_iterable(islice(mixed.iterate(0), 12)))
    assert [n for n, _ in whole].count("understand") == 6
    assert len(set(whole)) == 24
    assert list(chain.from_iterable(islice(mixed.iterate(5), 7))) == whole[10:]


def test_target_pixels_cut_the_middle_square():
    from PIL import Image

    wide = Image.new("RGB", (30, 10), "black")
    wide.paste((255, 255, 255), (10, 0, 20, 10))
    assert target_pixels(wide, 10).min() == 1
