"""Drawn images in a folder, and in the report."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from instructblip.core.drawings import INDEX, read_drawings
from instructblip.evaluation.report import write_report
from instructblip.text_to_image.gallery import INK, RIGHT, WRONG, write_drawings
from instructblip.text_to_image.measure import Measured, fresh_prompts, measure
from tests.evaluation.fakes import FakeEngine, benchmark, colour_questions
from tests.text_to_image.conftest import Renderer

HOSTILE = '<img src="https://evil.example/x.png" onerror="alert(1)">'


@pytest.fixture
def measured() -> list[Measured]:
    """Every second image repeats the one before it, so it is wrong."""

    def drawn(kind: str) -> Measured:
        examples = fresh_prompts(kind, 6)
        targets = [each.target() for each in examples if each.target is not None]
        return measure(Renderer([targets[i - i % 2] for i in range(6)]), kind, examples)

    return [drawn("one_object"), drawn("subject")]


def test_written_drawings_are_read_back(measured: list[Measured], tmp_path: Path):
    assert write_drawings(tmp_path, measured, shown=4) == tmp_path / INDEX
    one, subject = read_drawings(tmp_path)
    assert one.figures == measured[0].figures
    assert [d.prompt for d in one.drawings] == [e.instruction for e in measured[0].examples[:4]]
    assert [d.right for d in one.drawings][::2] == [True, True]
    assert not all(d.right for d in one.drawings)
    assert all(d.subject is None for d in one.drawings)
    for drawing in (*one.drawings, *subject.drawings):
        assert (tmp_path / drawing.picture).is_file()
    assert all(d.subject and (tmp_path / d.subject).is_file() for d in subject.drawings)
    with Image.open(tmp_path / "subject.png") as grid:
        colours = {tuple(v) for v in np.asarray(grid.convert("RGB")).reshape(-1, 3).tolist()}
    assert {RIGHT, WRONG, INK} <= colours  # frames of both verdicts and of the subject


def test_a_folder_without_drawings_names_the_remedy(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match=r"drawn\.json is missing.*benchmarks/draw\.py"):
        read_drawings(tmp_path)
    (tmp_path / INDEX).write_text('[{"kind": "one"}]')
    with pytest.raises(ValueError, match=r"drawn\.json: 0\.figures: Field required; 0\.drawings"):
        read_drawings(tmp_path)


def test_the_report_shows_drawings(measured: list[Measured], tmp_path: Path):
    index = write_drawings(tmp_path, measured, shown=4)
    kinds = json.loads(index.read_text())
    kinds[0]["drawings"][0]["prompt"] = HOSTILE
    index.write_text(json.dumps(kinds))
    results = [evaluated(tmp_path)]
    page = write_report(tmp_path / "with.html", {"a": results}, drawn=tmp_path).read_text()
    assert page.count('<div class="yes"><img') + page.count('<div class="no"><img') == 8
    assert page.count('class="subject" src="data:image/png;base64,') == 4
    assert '<th scope="row">one object</th>' in page
    assert f"<td>{measured[0].figures.objects:.1f}</td>" in page
    assert HOSTILE not in page
    assert "&lt;img src=" in page
    without = write_report(tmp_path / "without.html", {"a": results}).read_text()
    assert "Drawn images" not in without


def test_images_outside_the_folder_are_refused(measured: list[Measured], tmp_path: Path):
    index = write_drawings(tmp_path / "drawn", measured, shown=1)
    kinds = json.loads(index.read_text())
    kinds[0]["drawings"][0]["picture"] = "../secret.png"
    measured[0].images[0].save(tmp_path / "secret.png")
    index.write_text(json.dumps(kinds))
    results = {"a": [evaluated(tmp_path)]}
    with pytest.raises(ValueError, match="secret"):
        write_report(tmp_path / "r.html", results, drawn=tmp_path / "drawn")


def evaluated(folder: Path):
    from instructblip.evaluation.evaluate import evaluate
    from tests.testing import write_picture

    questions = colour_questions(4)
    for example in questions.examples:
        write_picture(folder / "images" / example.images[0], seed=1)
    questions.image_root = folder / "images"
    return evaluate(FakeEngine(), benchmark(), questions)
