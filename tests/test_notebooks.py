"""The notebooks are those of their page, and their cells run."""

import json
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient

from runs import notebooks
from tests.test_docs import ROOT

SHORT = {
    "quickstart.ipynb": ("STEPS, SCALE = 100, 0.1", "STEPS, SCALE = 2, 0.02"),
    "own_pictures.ipynb": ("COUNT, STEPS = 800, 150", "COUNT, STEPS = 30, 2"),
}


def run(name: str, folder: Path) -> list[Any]:
    """The outputs of the code cells, in ``folder`` and with few steps."""
    notebook = nbformat.read(ROOT / "notebooks" / name, 4)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    long, short = SHORT[name]
    assert long in cells[0].source
    cells[0].source = cells[0].source.replace(long, short)
    where = {"metadata": {"path": str(folder)}}
    NotebookClient(notebook, timeout=300, startup_timeout=300, resources=where).execute()
    return [cell.outputs for cell in cells]


def text_of(outputs: list[Any]) -> str:
    """What the outputs print or show, as text."""
    return "".join(each.get("text") or each.data["text/plain"] for each in outputs)


def test_the_notebooks_are_those_of_the_page() -> None:
    written = notebooks.notebooks()
    assert {*written} == {*SHORT} == {path.name for path in (ROOT / "notebooks").iterdir()}
    page = notebooks.PAGE.read_text("utf-8")
    for name, content in written.items():
        text = (ROOT / "notebooks" / name).read_text("utf-8")
        assert json.loads(text) == content, "run `python runs/notebooks.py`"
        nbformat.validate(nbformat.reads(text, 4))
        for cell in content["cells"]:
            assert cell["cell_type"] == "markdown" or "".join(cell["source"]) in page
            assert not cell.get("outputs")


def test_the_quickstart_answers_explains_and_compares(tmp_path: Path) -> None:
    _, _, answers, looks, explanation, scores = run("quickstart.ipynb", tmp_path)
    lines = text_of(answers).splitlines()
    assert [line.split()[0] for line in lines] == ["before", "after"] * 2
    for outputs in (looks, explanation):
        assert outputs[-1].data["image/png"]
    assert "scenes_gqa" in text_of(scores)
    assert "held-out" in text_of(scores)


def test_a_folder_of_pictures_becomes_a_model(tmp_path: Path) -> None:
    _, tuned, answers, last = run("own_pictures.ipynb", tmp_path)
    assert "best constant answer" in text_of(tuned)
    assert len(text_of(answers).splitlines()) == 4
    assert "out/own_pictures/tuned/report.html" in text_of(last)
    assert (tmp_path / "out/own_pictures/tuned/report.html").is_file()
