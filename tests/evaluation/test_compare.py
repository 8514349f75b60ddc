"""Tables of several models."""

import io
import json
from dataclasses import replace
from typing import Any

import pytest
from rich.console import Console

from instructblip.evaluation import compare as tables
from instructblip.evaluation.evaluate import evaluate
from instructblip.evaluation.result import Result
from tests.evaluation.fakes import FakeEngine, ListDataset, benchmark, colour_questions


def results(blind: int | None, **changes: Any) -> list[Result]:
    """One held-in and one held-out set; the blind model mixes the colours up."""
    mixed = ListDataset([replace(e, id=f"m{e.id}") for e in colour_questions(30).examples])
    asked = [
        benchmark(name="a_in", title="colours"),
        benchmark(name="b_out", title="50% & more_colours", role="held_out", unseen_type=True),
    ]
    return [
        evaluate(FakeEngine(), replace(one, **changes), mixed, blind_seed=blind, progress=False)
        for one in asked
    ]


@pytest.fixture(scope="module")
def comparison() -> tables.Comparison:
    return tables.compare({"blind": results(1), "seeing": results(None)})


def test_differences_are_paired_and_means_are_of_sets(comparison: tables.Comparison) -> None:
    assert comparison.baseline == "blind"
    assert [row.name for row in comparison.rows] == ["a_in", "b_out"]
    row = comparison.rows[0]
    low = row.cells["blind"].value
    assert low is not None
    assert row.differences["seeing"].value == pytest.approx(100 - low)
    assert row.differences["seeing"].p < 0.01
    assert row.differences["seeing"].low > 0
    assert comparison.means[0].cells["seeing"].value == 100
    assert comparison.means[0].title == "mean of 1 held-in sets"


def test_json_is_plain_and_complete(comparison: tables.Comparison) -> None:
    plain = json.loads(json.dumps(tables.to_json(comparison), allow_nan=False))
    assert plain["means"]["held_out"]["models"]["seeing"]["value"] == 100
    assert plain["datasets"]["b_out"]["unseen_type"] is True


def test_markdown_escapes_and_marks(comparison: tables.Comparison) -> None:
    text = tables.to_markdown(comparison)
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert len({line.replace("\\|", "").count("|") for line in rows}) == 1
    assert "50% & more\\_colours †" in text
    assert "**100.0 [100.0, 100.0]**" in text


def test_latex_escapes_and_marks(comparison: tables.Comparison) -> None:
    text = tables.to_latex(comparison)
    assert r"50\% \& more\_colours $^\dagger$" in text
    assert r"\textbf{100.0 [100.0, 100.0]}" in text
    body = [
        line for line in text.splitlines() if line.endswith(r"\\") and "multicolumn" not in line
    ]
    assert {line.replace(r"\&", "").count("&") for line in body} == {4}


def test_terminal_shows_all_models(comparison: tables.Comparison) -> None:
    for intervals in (False, True):
        console = Console(width=200, file=io.StringIO(), record=True)
        console.print(tables.to_rich(comparison, intervals))
        text = console.export_text()
        assert "seeing" in text
        assert "held-out" in text
        assert ("[100.0, 100.0]" in text) == intervals


def test_only_shared_sets_enter_the_means() -> None:
    found = tables.compare({"one": results(None), "two": results(None)[:1]})
    assert [mean.role for mean in found.means] == ["held_in"]
    assert "two" not in found.rows[1].cells
    assert "–" in tables.to_markdown(found)


def test_what_cannot_be_compared_is_refused() -> None:
    with pytest.raises(ValueError, match="different prompts"):
        tables.compare({"one": results(None), "two": results(None, prompt="{question}")})
    short = evaluate(
        FakeEngine(), benchmark(name="a_in", title="colours"), colour_questions(), limit=4
    )
    with pytest.raises(ValueError, match="same samples"):
        tables.compare({"one": results(None), "two": [short]})
    with pytest.raises(ValueError, match="none of the models"):
        tables.compare({"one": results(None)}, baseline="two")
    with pytest.raises(ValueError, match="no model"):
        tables.compare({})
