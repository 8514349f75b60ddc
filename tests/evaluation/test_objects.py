"""CHAIR and POPE: what an answer names, and what the image shows."""

from pathlib import Path
from typing import Any

import pytest

from instructblip.data.prepared.prepare import prepare
from instructblip.evaluation.benchmarks import BENCHMARKS, select_benchmarks
from instructblip.evaluation.compare import summarise
from instructblip.evaluation.evaluate import evaluate
from instructblip.evaluation.objects import says_yes, vocabulary
from instructblip.evaluation.scoring import scorer_of
from instructblip.scenes import write_scenes
from tests.evaluation.fakes import FakeEngine, benchmark, colour_questions
from tests.testing import write_json, write_json_lines, write_picture


def predicted(text: str, *answers: str, **extra: Any) -> dict[str, Any]:
    return {"prediction": text, "answers": list(answers), "extra": extra}


def test_the_longest_phrase_names_an_object_and_plurals_count() -> None:
    words = vocabulary("coco")
    assert words.mentions("Two women with hot dogs.") == ["person", "hot dog"]
    assert words.mentions("A dog; dogs, a teddy bear on benches") == [
        *("dog", "dog"),
        *("teddy bear", "bench"),
    ]
    assert vocabulary("scenes").mentions("a small red circle, the word cat and red") == [
        "red circle",
        "word cat",
    ]


def test_chair_counts_mentions_and_captions_as_the_paper_does() -> None:
    rows = [
        predicted("a red circle and a blue star", "a red circle"),  # 1 of 2 invented
        predicted("a blue star, a blue star", "a red star and a red heart"),  # 2 of 2
        predicted("there is the digit 7", "the digit 7 and a red star"),  # none
        predicted("", "a red star"),  # names nothing: no mention, no invention
    ]
    score = scorer_of("chair scenes").score(rows)
    assert score.others == pytest.approx({"chair_i": 60, "chair_s": 50, "recall": 100 * 2 / 6})
    assert score.value == pytest.approx(40)
    assert [scorer_of("chair scenes").sample(row) for row in rows] == [0.5, 0, 1, 0]
    # a mention that is repeated is a wrong one for F1, so that repeating does not pay
    f1 = scorer_of("object_f1 scenes").sample
    assert f1(predicted("a red star, a red star", "a red star")) == pytest.approx(2 / 3)
    assert [f1(row) for row in rows] == pytest.approx([2 / 3, 0, 2 / 3, 0])


def test_chair_of_captions_that_name_nothing_is_not_defined() -> None:
    assert scorer_of("chair scenes").score([predicted("nothing", "a red star")]).value is None
    asked = benchmark(metric="chair scenes")  # a colour alone is no object
    result = evaluate(FakeEngine(), asked, colour_questions(), progress=False)
    assert "not defined (no caption names an object)" in result.describe()
    with pytest.raises(ValueError, match="no caption names an object"):
        summarise([result])


def test_annotated_objects_count_beside_those_of_the_references(tmp_path: Path) -> None:
    words = tmp_path / "synonyms.txt"
    words.write_text("person, man, woman\ndog, puppy\n\ncat\n")
    row = predicted("a man, a puppy and a cat", "someone", objects=["person", "dog"])
    score = scorer_of(f"chair {words}").score([row])
    assert score.others["chair_i"] == pytest.approx(100 / 3)
    with pytest.raises(FileNotFoundError, match="expected scenes, coco, or the path"):
        scorer_of("chair nowhere.txt").require()
    empty = tmp_path / "empty.txt"
    empty.write_text(" \n")
    with pytest.raises(ValueError, match="no object"):
        scorer_of(f"object_f1 {empty}").require()


@pytest.mark.parametrize(
    ("text", "yes"),
    [
        ("yes", True), ("Yes, there is.", True), ("no", False), ("No, no dog.", False),
        ("There is not. Yes", False), ("it isn't", True), ("", True), ("nothing", True),
    ],
)  # fmt: skip
def test_a_yes_is_read_as_the_authors_script_reads_it(text: str, yes: bool) -> None:
    assert says_yes(text) == yes


def test_pope_scores() -> None:
    rows = [
        *(predicted("yes", "yes"), predicted("no", "yes"), predicted("yes", "no")),
        *(predicted("no", "no"), predicted("no.", "no")),
    ]
    score = scorer_of("pope").score(rows)
    assert score.value == pytest.approx(60)
    expected = {"precision": 50, "recall": 50, "f1": 50, "yes_ratio": 40}
    assert score.others == pytest.approx(expected)


def test_scenes_writes_pope_in_the_official_format(tmp_path: Path) -> None:
    root = write_scenes(tmp_path / "scenes", scale=0.1, sets=("pope",))["pope"]
    for name in ("random", "popular", "adversarial"):
        benchmark = BENCHMARKS[f"scenes_pope_{name}"]
        data = prepare(benchmark.source, root, benchmark.split, tmp_path / "prepared")
        answers = [example.answers[0] for example in data]
        assert answers.count("yes") == answers.count("no") > 8
        assert data[0].question.startswith("Is there a")
    first = [prepare("pope", root, s, tmp_path / "prepared")[1] for s in ("random", "adversarial")]
    assert first[0].images == first[1].images
    assert first[0].question != first[1].question


def test_objects_of_scenes_do_not_enter_its_other_means() -> None:
    objects = {b.name for b in select_benchmarks(["scenes_objects"])}
    assert "scenes_chair" in objects
    assert "scenes_pope_random" in objects
    assert objects.isdisjoint(b.name for b in select_benchmarks(["scenes"]))


class Says:
    """Answers everything alike."""

    fingerprint = "says"

    def __init__(self, text: str) -> None:
        self.text = text

    def answer_examples(self, examples: Any, *_: Any, **__: Any) -> list[str]:
        return [self.text] * len(examples)

    def rank_examples(self, *_: Any) -> list[list[float]]:
        raise AssertionError


def test_coco_objects_come_from_the_instances_file(tmp_path: Path) -> None:
    root = tmp_path / "coco_objects"
    names = [f"COCO_val2014_{i:012d}.jpg" for i in (1, 2)]
    for name in names:
        write_picture(root / "images" / "val2014" / name)
    write_json(
        root / "annotations" / "coco_karpathy_test.json",
        [{"image": f"val2014/{name}", "caption": ["a street"]} for name in names],
    )
    write_json(
        root / "annotations" / "instances_val2014.json",
        {
            "annotations": [
                {"image_id": 1, "category_id": 18, "id": 5},
                {"image_id": 1, "category_id": 18, "id": 6},
            ],
            "categories": [{"id": 18, "name": "dog"}],
        },
    )
    data = prepare("coco_objects", root, "test", tmp_path / "prepared")
    assert [example.extra for example in data] == [{"objects": ["dog"]}, {"objects": []}]
    result = evaluate(Says("a dog"), BENCHMARKS["coco_chair"], data, progress=False)
    assert result.value == pytest.approx(50)


def test_a_broken_pope_file_names_the_line(tmp_path: Path) -> None:
    write_picture(tmp_path / "images" / "a.jpg")
    write_json_lines(
        tmp_path / "annotations" / "coco_pope_random.json",
        {"question_id": 1, "image": "a.jpg", "text": "Is there a dog?", "label": "maybe"},
    )
    with pytest.raises(ValueError, match="'yes' or 'no'"):
        prepare("pope", tmp_path, "random", tmp_path / "prepared")
