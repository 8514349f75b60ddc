"""Tables of several models."""

import io
import json
from dataclasses import replace
from typing import Any

import pytest
from rich.console import Console

from instructblip.evaluation import tables
from instructblip.evaluation.benchmarks import BENCHMARKS
from instructblip.evaluation.compare import Comparison, compare
from instructblip.evaluation.evaluate import evaluate
from instructblip.evaluation.result import Result
from instructblip.evaluation.tables import PUBLISHED
from tests.evaluation.fakes import FakeEngine, ListDataset, benchmark, colour_questions


def results(blind: int | None, **changes: Any) -> list[Result]:
    """One held-in and one held-out set; the blind model confuses the colours."""
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
def comparison() -> Comparison:
    return compare({"blind": results(1), "seeing": results(None)})


def test_differences_are_paired_and_means_are_of_sets(comparison: Comparison) -> None:
    assert comparison.baseline == "blind"
    assert [row.name for row in comparison.rows] == ["a_in", "b_out"]
    row = comparison.rows[0]
    low = row.cells["blind"].value
    assert low is not None
    assert row.differences["seeing"].value == pytest.approx(100 - low)
    assert row.differences["seeing"].p < 0.01
    assert row.differences["seeing"].low > 0
    assert comparison.means[0].cells["seeing"].value == 100
    assert comparison.means[0].title == "colours"


def test_the_mean_of_one_set_is_left_out_of_its_table(comparison: Comparison) -> None:
    assert [[row.name for row in comparison.table(r)] for r in ("held_in", "own")] == [["a_in"], []]
    assert "mean of" not in tables.to_markdown(comparison)
    first, second = results(None)
    both = compare({"seeing": [first, replace(second, role="held_in")]})
    assert [row.title for row in both.table("held_in")][2:] == ["mean of 2 sets (held-in)"]
    assert "mean of 2 sets (held-in)" in tables.to_markdown(both)


def test_json_is_plain_and_complete(comparison: Comparison) -> None:
    plain = json.loads(json.dumps(tables.to_json(comparison), allow_nan=False))
    assert plain["means"]["held_out"]["models"]["seeing"]["value"] == 100
    assert plain["datasets"]["b_out"]["unseen_type"] is True
    assert plain["datasets"]["b_out"]["published"] == {}
    assert plain["datasets"]["b_out"]["how"] == {
        "metric": "exact_match",
        "tokenizer": None,
        "mode": "generate",
        "decoding": {"num_beams": 1, "max_new_tokens": 5},
        "prompt": "Question: {question} Short answer:",
        "images": 15,
    }
    assert plain["means"]["held_out"]["how"] is None
    assert plain["datasets"]["b_out"]["differences"]["seeing"]["p"] < 0.01


def test_markdown_has_the_papers_shape(comparison: Comparison) -> None:
    held_in, held_out, _, measured = tables.to_markdown(comparison).split("\n\n")
    rows = [line.removesuffix(" |").split(" | ") for line in held_out.splitlines()]
    assert rows[0][0] == "| held-out"
    assert rows[0][1] == "50% & more\\_colours †"
    assert [row[0] for row in rows[3:]] == ["| **blind**", "| **seeing**", "| Δ seeing"]
    assert rows[4][1] == "100.0 [78.2, 100.0]"
    assert rows[5][1].startswith("+")
    assert rows[5][1].endswith("\\*\\*")
    assert len({len(row) for row in rows if len(row) > 1}) == 1
    assert "†" not in held_in
    assert [line.split(":")[0] for line in measured.splitlines()] == [
        "- colours",
        "- 50% & more\\_colours",
    ]
    prompt = "prompt 'Question: {question} Short answer:'"
    assert measured.count(prompt) == 2
    assert "a\\_in, n 30; exact\\_match; generate (num\\_beams 1, max\\_new\\_tokens 5)" in measured


def test_latex_escapes_and_marks(comparison: Comparison) -> None:
    text = tables.to_latex(comparison)
    assert r"50\% \& more\_colours $^\dagger$" in text
    assert text.count(r"\begin{tabular}{lr}") == text.count(r"\end{tabular}") == 2
    body = [line for line in text.splitlines() if line.endswith(r"\\")]
    measured = "% 50% & more_colours: b_out, n 30; exact_match;"
    assert text.rstrip().splitlines()[-1].startswith(measured)
    assert {line.replace(r"\&", "").count("&") for line in body} == {1}


def test_terminal_shows_all_models(comparison: Comparison) -> None:
    for intervals in (False, True):
        console = Console(width=200, file=io.StringIO(), record=True)
        for table in tables.to_rich(comparison, intervals):
            console.print(table)
        text = console.export_text()
        assert "Δ seeing" in text
        assert "held-out" in text
        assert ("[78.2, 100.0]" in text) == intervals
        assert "paired bootstrap" in text


def test_published_scores_appear_beside_ours() -> None:
    ours = [
        replace(one, benchmark=name, title=name)
        for one, name in zip(results(None), ("finetuned_okvqa", "gqa"), strict=True)
    ]
    ours[0] = replace(ours[0], role="finetuned")
    comparison = compare({"ours": ours})
    fine_tuned, zero_shot = (
        {line.name: line.texts for line in table.lines}
        for table in reversed(tables.paper_tables(comparison))
    )
    assert zero_shot["InstructBLIP Vicuna-7B (paper)"] == ["49.2"]
    assert "Flamingo-3B (paper)" not in zero_shot  # it has no score of these sets
    assert fine_tuned["BLIP-2 FlanT5-XXL (paper)"][0] == "54.7"
    assert tables.to_json(comparison)["datasets"]["gqa"]["published"]["BLIP-2 Vicuna-13B"] == 41.0


def test_published_tables_are_the_papers() -> None:
    """Sums of the columns of table 1 and of the rows of table 3, added up by hand."""
    assert len(PUBLISHED) == 11
    assert sum(len(figures) for figures in PUBLISHED.values()) == 8 * 13 + 3 * 7 + 4 * 5
    blip2, ours = PUBLISHED["BLIP-2 FlanT5-XL"], PUBLISHED["InstructBLIP FlanT5-XL"]
    shared = [name for name in blip2 if name in BENCHMARKS]
    gains = [ours[name] / blip2[name] - 1 for name in shared]
    assert 100 * sum(gains) / 13 == pytest.approx(17.1, abs=0.05)  # not the 15.0 of the text
    assert all(name in BENCHMARKS for figures in PUBLISHED.values() for name in figures)


def test_only_shared_sets_enter_the_means() -> None:
    comparison = compare({"one": results(None), "two": results(None)[:1]})
    assert [mean.role for mean in comparison.means] == ["held_in"]
    assert "two" not in comparison.rows[1].cells
    assert "–" in tables.to_markdown(comparison)


def test_what_cannot_be_compared_is_refused() -> None:
    with pytest.raises(ValueError, match="different prompts"):
        compare({"one": results(None), "two": results(None, prompt="{question}")})
    short = evaluate(
        FakeEngine(), benchmark(name="a_in", title="colours"), colour_questions(), limit=4
    )
    with pytest.raises(ValueError, match="same samples"):
        compare({"one": results(None), "two": [short]})
    dataset = colour_questions()
    asked = benchmark(name="a_in", title="colours")
    first = evaluate(FakeEngine(), asked, dataset)
    for change in ({"answers": ("pink",)}, {"question": "which?"}, {"images": ("red_9.png",)}):
        other = ListDataset([replace(dataset[0], **change), *dataset.examples[1:]])
        with pytest.raises(ValueError, match="same samples"):
            compare({"one": [first], "two": [evaluate(FakeEngine(), asked, other)]})
    with pytest.raises(ValueError, match="none of the models"):
        compare({"one": results(None)}, baseline="two")
    with pytest.raises(ValueError, match="no model"):
        compare({})
