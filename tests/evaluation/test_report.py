"""The report is complete, needs no network, and escapes all texts."""

import json
import math
import re
from collections.abc import Sequence
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from instructblip.cli import main as cli
from instructblip.core.example import Example
from instructblip.evaluation.evaluate import evaluate
from instructblip.evaluation.report import (
    is_shown,
    line_chart,
    make_cards,
    radar_chart,
    training_charts,
    write_report,
)
from instructblip.evaluation.result import Result
from tests.evaluation.fakes import FakeEngine, ListDataset, benchmark, colour_questions
from tests.testing import write_picture

HOSTILE = '</script><img src=x onerror="alert(1)"> {{ 7*7 }} "\'&<b> https://evil.example/x.js'


class Hostile(FakeEngine):
    """Answers with markup."""

    def answer_examples(
        self, examples: Sequence[Example], prompts: Sequence[str], image_root: Path, **decoding: Any
    ) -> list[str]:
        return [HOSTILE for _ in examples]


class Page(HTMLParser):
    """Tags, attributes and the text of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        self.open.append(f"/{tag}")

    def handle_data(self, data: str) -> None:
        self.text += data


def dataset(root: Path, frames: int = 1, **changes: Any) -> ListDataset:
    examples = []
    for example in colour_questions(12).examples:
        for name in example.images:
            write_picture(root / name, seed=int(example.id))
        images = example.images * frames
        examples.append(replace(example, images=images, **changes))
    return ListDataset(examples, image_root=root)


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> str:
    root = tmp_path_factory.mktemp("report")
    metrics = [{"step": i, "loss": 2 / i, "lr": 1e-4} for i in range(1, 9)]
    metrics.append({"step": 8, "validation": {HOSTILE: 0.5, "vqav2": 0.25}})
    (root / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in metrics))
    plain = dataset(root)
    hostile = dataset(root, question=HOSTILE, answers=(HOSTILE,), choices=(HOSTILE, "red"))

    def results(engine: FakeEngine, blind: int | None = None) -> list[Result]:
        asked = [
            (benchmark(name="a", title=HOSTILE), hostile),
            (benchmark(name="b", mode="rank", decoding={}), plain),
            (benchmark(name="c", mode="rank", decoding={}, role="held_out"), hostile),
        ]
        return [evaluate(engine, one, data, blind_seed=blind) for one, data in asked]

    models = {
        "BLIP-2": results(FakeEngine()),
        HOSTILE: results(Hostile()),
        "blind": results(FakeEngine(), blind=0),
    }
    out = write_report(
        root / "out" / "report.html",
        models,
        title=HOSTILE,
        lead=HOSTILE,
        curves={HOSTILE: root / "metrics.jsonl"},
        facts={HOSTILE: HOSTILE},
        samples_per_set=6,
    )
    assert [p.name for p in out.parent.iterdir()] == ["report.html"]
    return out.read_text(encoding="utf-8")


def test_texts_stay_texts(page: str) -> None:
    read = Page(page)
    assert page.count("<script>") == page.count("</script>") == 1
    assert not any(name.startswith("on") for _, attrs in read.tags for name in attrs)
    assert "b" not in {tag for tag, attrs in read.tags if "style" not in attrs}
    assert "{{ 7*7 }}" in read.text
    assert "49 " not in read.text
    assert read.text.count(HOSTILE) > 20


def test_nothing_is_fetched(page: str) -> None:
    read = Page(page)
    for tag, attrs in read.tags:
        for name in ("src", "href", "data", "action", "srcset"):
            value = attrs.get(name)
            assert value is None or value.startswith(("data:image/", "#")), (tag, name, value)
    assert not {"link", "iframe", "object", "embed", "base"} & {tag for tag, _ in read.tags}
    ours = page.replace(HOSTILE, "")
    style_and_script = "".join(re.findall(r"<(?:style|script)>.*?</(?:style|script)>", ours, re.S))
    assert "http" not in style_and_script
    assert "url(" not in style_and_script
    assert "default-src 'none'" in page


def test_page_is_complete_and_balanced(page: str) -> None:
    read = Page(page)
    for tag in (
        "table",
        "article",
        "figure",
        "section",
        "dl",
        "ul",
        "div",
        "svg",
        "form",
        "details",
    ):
        assert read.open.count(tag) == read.open.count(f"/{tag}") > 0, tag
    cards = [attrs for tag, attrs in read.tags if tag == "article"]
    assert len(cards) == 18
    assert {card["data-set"] for card in cards} == {"a", "b", "c"}
    assert {card["data-mark"] for card in cards} == {"right", "wrong"}
    assert all(attrs.get("alt") for tag, attrs in read.tags if tag == "img")
    assert "blind" not in read.text.split("Samples")[-1].split("How it was measured")[0]


def test_gallery_shows_wrong_and_right_alike(tmp_path: Path) -> None:
    half = dataset(tmp_path)
    half.examples = [
        replace(e, answers=("pink",)) if int(e.id) % 4 == 0 else e for e in half.examples
    ]
    result = evaluate(FakeEngine(), benchmark(), half)
    assert [card.right for card in make_cards({"m": [result]}, 4)].count(False) == 2
    assert [card.right for card in make_cards({"m": [result]}, 8)].count(False) == 3
    assert len(make_cards({"m": [result]}, 100)) == 12


def test_a_card_has_frames_candidates_and_the_change(tmp_path: Path) -> None:
    video = dataset(tmp_path, frames=8)
    ranking = benchmark(mode="rank", decoding={})
    right = evaluate(FakeEngine(), ranking, video)
    wrong = evaluate(FakeEngine(fingerprint="x"), ranking, video)
    for prediction in wrong.predictions:
        prediction |= {"prediction": "blue", "score": 0.0}
    card = make_cards({"old": [wrong], "new": [right]}, 1)[0]
    assert card.change == "gained"
    assert make_cards({"old": [right], "new": [wrong]}, 1)[0].change == "lost"
    assert len(card.images) == 4
    assert card.images[0].startswith("data:image/png;base64,")
    options = card.answers[-1].options
    assert [option.probability for option in options] == sorted(
        (option.probability for option in options), reverse=True
    )
    assert options[0].chosen
    assert options[0].expected


def test_only_the_first_rank_is_right(tmp_path: Path) -> None:
    data = dataset(tmp_path)
    options = {"choices": ("no", "yes"), "extra": {}}
    data.examples = [replace(e, **options, answers=("yes",)) for e in data.examples]
    second = evaluate(FakeEngine(), benchmark(mode="rank", metric="mrr", decoding={}), data)
    assert {p["score"] for p in second.predictions} == {0.5}
    assert not any(card.right for card in make_cards({"m": [second]}, 4))


def test_changes_are_compared_with_the_baseline(tmp_path: Path) -> None:
    data = dataset(tmp_path)
    names = ("one", "two")
    first, second = (evaluate(FakeEngine(), benchmark(name=name), data) for name in names)
    changes = {
        card.benchmark: card.change
        for card in make_cards({"base": [first], "old": [first, second], "new": [first, second]}, 1)
    }
    assert changes == {"one": "same", "two": None}
    models = {"base": [first], "old": [first, second], "new": [first, second]}
    text = write_report(tmp_path / "r.html", models).read_text()
    assert "right, and base wrong" in text
    assert "right, and old wrong" not in text


def test_scores_show_without_their_images(tmp_path: Path) -> None:
    data = dataset(tmp_path / "here")
    result = evaluate(FakeEngine(), benchmark(), data)
    gone = replace(result, image_root=str(tmp_path / "elsewhere"))
    text = write_report(tmp_path / "r.html", {"m": [gone]}).read_text()
    assert text.count('class="gone"') == 12
    assert "100.0" in text


def test_chart_ticks_hold_the_data() -> None:
    chart = line_chart("loss", {"a": [(0, 0.31), (100, 2.2)], "b": [(50, math.nan)]})
    assert chart is not None
    assert [line.label for line in chart.lines] == ["a"]
    assert [label for _, label in chart.x_ticks] == ["0", "25", "50", "75", "100"]
    assert chart.y_ticks[0][1] == "0"
    for line in chart.lines:
        for point in line.points.split():
            x, y = map(float, point.split(","))
            assert chart.left <= x <= chart.right
            assert 0 <= y <= chart.bottom
    assert line_chart("flat", {"a": [(1, 5.0)]}) is not None
    assert line_chart("empty", {"a": []}) is None


def test_radar_reaches_its_rim_where_a_model_is_best() -> None:
    chart = radar_chart("held-out", {"a": [50, 25], "b": [10, 20], "c": [0, 0]})
    assert chart is not None
    one, two = ([tuple(map(float, p.split(","))) for p in web.split()] for web in chart.webs)
    ends = [spoke.end for spoke in chart.spokes]
    assert one[0] == ends[0]
    assert two[1] == ends[1]
    assert two[0] == (300, 119)  # half of the way up
    assert one[2] == two[2] == chart.centre  # all scores are 0
    assert [spoke.best for spoke in chart.spokes] == ["50.0", "20.0", "0.0"]
    assert radar_chart("two axes", {"a": [1], "b": [2]}) is None


def test_curves_of_held_in_and_held_out(tmp_path: Path) -> None:
    lines = [
        {"step": step, "validation": {"score": 1.0, "scenes_vqav2": 10 * step, "scenes_vsr": 50}}
        for step in (1, 2)
    ]
    file = tmp_path / "metrics.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    chart = training_charts(file, "run")[-1]
    assert chart.title == "run: held-in and held-out"
    assert {line.label: line.last for line in chart.lines} == {"held-in": "20", "held-out": "50"}


def test_charts_of_a_run_without_validation(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "lo')
    assert [c.title for c in training_charts(tmp_path / "metrics.jsonl", "run")] == [
        "run: loss per response token"
    ]


def test_the_baseline_can_be_chosen(tmp_path: Path) -> None:
    data = dataset(tmp_path)
    models = {name: [evaluate(FakeEngine(name), benchmark(), data)] for name in ("one", "two")}
    text = write_report(tmp_path / "r.html", models, baseline="two").read_text()
    assert "Δ one</th>" in text
    assert "Δ two" not in text
    assert "difference to two" in text
    assert "one is <select" in text  # the report is about the other


def test_only_images_below_given_roots_are_shown(tmp_path: Path) -> None:
    """Results name the folder of their images, and others may have written them."""
    private, shared = tmp_path / "private", tmp_path / "shared"
    models = {}
    for root in (private, shared):
        (result,) = [evaluate(FakeEngine(), benchmark(), dataset(root))]
        models[root.name] = [result]
    for name, results in models.items():
        shown = make_cards({name: results}, 4, [shared])
        assert all((image is not None) == (name == "shared") for c in shown for image in c.images)
        assert all(image for card in make_cards({name: results}, 4) for image in card.images)
    (shared / "link").symlink_to(private)
    moved = replace(models["private"][0], image_root=str(shared / "link"))
    assert not is_shown(moved, [shared])


def test_the_command_names_what_it_leaves_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    images = tmp_path / "images"
    evaluate(FakeEngine(), benchmark(), dataset(images), out=Path("results") / "toy")
    for options, shown in ([], False), (["--images", str(images)], True):
        with pytest.raises(SystemExit):
            cli.main(["report", "results", "--out", "report.html", *options])
        page = Path("report.html").read_text()
        assert ("data:image/png" in page) == shown
        left_out = f"images in {images} are left out: --images {images} shows them"
        assert (left_out in capsys.readouterr().out) != shown
