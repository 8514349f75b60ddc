"""The benchmarks are frozen: a changed prompt, decoding or scorer changes the scores."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from instructblip.data.sources import SOURCES
from instructblip.data.templates import check_template
from instructblip.evaluation.benchmarks import BENCHMARKS, OWNERS, select_benchmarks
from instructblip.evaluation.scoring import SCORERS

GOLDEN = Path(__file__).with_name("benchmarks.json")
DOCS = Path(__file__).parents[2] / "docs" / "evaluation.md"


def test_benchmarks_are_frozen() -> None:
    """After a deliberate change: see the last line of this file."""
    now = json.loads(json.dumps({name: b.settings() for name, b in BENCHMARKS.items()}))
    assert now == json.loads(GOLDEN.read_text(encoding="utf-8"))


def test_benchmarks_fit_the_data_and_the_scorers() -> None:
    for name, benchmark in BENCHMARKS.items():
        assert name == benchmark.name
        assert benchmark.source in SOURCES
        assert benchmark.metric in SCORERS
        check_template(benchmark.prompt)
        assert bool(benchmark.decoding) == (benchmark.mode == "generate")


def test_the_papers_table_is_complete() -> None:
    paper = select_benchmarks(["held_out"])
    assert len(paper) == 13
    assert len([b for b in paper if b.metric == "cider"]) == 2
    assert BENCHMARKS["textvqa"].prompt == (
        "OCR tokens: {ocr_tokens}. Question: {question} Short answer:"
    )


def test_the_papers_fine_tuning_rows_are_complete() -> None:
    rows = select_benchmarks(["finetuned"])
    assert [row.title for row in rows] == [
        "ScienceQA image",
        "OCR-VQA",
        "OK-VQA",
        "A-OKVQA direct",
        "A-OKVQA choices",
    ]
    zero_shot = BENCHMARKS["scienceqa"]
    assert rows[0] == replace(zero_shot, name=rows[0].name, role="finetuned")


def test_every_source_has_an_owner() -> None:
    assert set(OWNERS) == {benchmark.source for benchmark in BENCHMARKS.values()}


def test_scenes_stand_for_every_task_of_the_table() -> None:
    assert {b.source for b in select_benchmarks(["scenes_held_out"])} == {
        b.source for b in select_benchmarks(["held_out"])
    } - {"flickr30k", "msrvttqa", "ivqa"}  # one set of new pairs, one of videos


def test_scenes_hold_out_three_types() -> None:
    held_in, held_out = (
        select_benchmarks(["scenes_held_in"]),
        select_benchmarks(["scenes_held_out"]),
    )
    assert len(held_in) >= 6
    assert len(held_out) >= 6
    assert len([b for b in held_out if b.unseen_type]) >= 3
    assert not any(b.unseen_type for b in held_in)
    assert len(select_benchmarks(["scenes", "scenes_vsr"])) == len(held_in) + len(held_out)


def test_an_unknown_name_is_answered_with_the_nearest() -> None:
    with pytest.raises(ValueError, match="did you mean scenes_vsr"):
        select_benchmarks(["scenes_vrs"])


def table() -> str:
    """Every benchmark with its settings, for docs/evaluation.md."""
    lines = ["| benchmark | data | prompt | answered by | scored by |", "|---|---|---|---|---|"]
    for b in BENCHMARKS.values():
        how = ", ".join(f"{key} {value}" for key, value in b.decoding.items())
        if b.mode == "rank":
            how = "ranking " + (
                "the training vocabulary" if b.vocabulary else ", ".join(b.candidates or ())
            )
            how = "ranking the choices" if how == "ranking " else how
            if b.verbalizers:
                how += "; also worded " + ", ".join(w for v in b.verbalizers.values() for w in v)
        if b.mode == "retrieve":
            how = f"comparing all; matching the {b.rerank} most similar"
        name = f"{b.name} †" if b.unseen_type else b.name
        prompt = b.prompt.replace("\n", "\\n")
        lines.append(f"| {name} | {b.source} {b.split} | `{prompt}` | {how} | {b.metric} |")
    return "\n".join(lines)


def documented(text: str) -> tuple[str, str, str]:
    """The documentation before, in and after its table."""
    before, rest = text.split("<!-- benchmarks -->\n")
    inside, after = rest.split("\n<!-- /benchmarks -->")
    return before, inside, after


def test_the_documentation_lists_them() -> None:
    assert documented(DOCS.read_text(encoding="utf-8"))[1] == table()


if __name__ == "__main__":  # python -m tests.evaluation.test_benchmarks writes both files
    settings = {name: benchmark.settings() for name, benchmark in BENCHMARKS.items()}
    GOLDEN.write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")
    begin, _, end = documented(
        DOCS.read_text(encoding="utf-8").replace("-->\n<!-- /", "-->\n\n<!-- /")
    )
    DOCS.write_text(
        f"{begin}<!-- benchmarks -->\n{table()}\n<!-- /benchmarks -->{end}", encoding="utf-8"
    )
