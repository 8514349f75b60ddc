"""The evaluation loop: scores, resuming, the blind control, and what it refuses."""

import json
import os
import socket
import sys
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import multiprocessing

from instructblip.core import distributed
from instructblip.core.example import Example
from instructblip.data.prepared.prepare import prepare
from instructblip.evaluation import normalize
from instructblip.evaluation.benchmarks import select_benchmarks
from instructblip.evaluation.compare import summarise
from instructblip.evaluation.evaluate import derange, evaluate, in_batches, pick, swap_images
from instructblip.evaluation.predictions import PREDICTIONS
from instructblip.evaluation.result import Result
from instructblip.scenes.official import write_scenes
from tests.evaluation.fakes import COLOURS, FakeEngine, ListDataset, benchmark, colour_questions


def test_a_seeing_model_is_right_and_a_blind_one_is_not(tmp_path: Path) -> None:
    dataset = colour_questions()
    engine = FakeEngine()
    seeing = evaluate(engine, benchmark(), dataset, batch_size=5, progress=False)
    blind = evaluate(engine, benchmark(), dataset, blind_seed=0, progress=False)
    assert seeing.value == 100.0
    assert blind.value is not None
    assert blind.value < 60
    assert engine.decoding == {"num_beams": 1, "max_new_tokens": 5}
    for prediction, example in zip(blind.predictions, dataset.examples, strict=True):
        assert prediction["id"] == example.id
        assert prediction["images"] != list(example.images)
        assert prediction["asked_about"] == list(example.images)


def test_batches_are_sorted_by_length_and_predictions_are_not() -> None:
    engine = FakeEngine()
    result = evaluate(engine, benchmark(), colour_questions(), batch_size=4, progress=False)
    assert [int(i) % 4 for batch in engine.batches for i in batch] == [3] * 3 + [2] * 3 + [
        1
    ] * 3 + [0] * 3
    assert [p["id"] for p in result.predictions] == [str(i) for i in range(12)]


def test_ranked_predictions_have_candidates_and_probabilities() -> None:
    ranking = benchmark(mode="rank", decoding={})
    result = evaluate(FakeEngine(), ranking, colour_questions(), progress=False)
    first = result.predictions[0]
    assert result.value == 100.0
    assert first["candidates"] == list(COLOURS)
    assert sum(first["probabilities"]) == pytest.approx(1)
    assert first["probabilities"][0] == max(first["probabilities"])


def test_a_candidate_scores_as_its_best_wording() -> None:
    worded = benchmark(
        mode="rank", candidates=("warm", "cold"), verbalizers={"warm": ("red",), "cold": ("blue",)}
    )
    dataset = colour_questions()
    dataset.examples = [
        replace(e, answers=("warm" if e.answers == ("red",) else "cold",))
        for e in dataset.examples
        if e.answers != ("green",)
    ]
    assert evaluate(FakeEngine(), worded, dataset, progress=False).value == 100.0


def test_auroc_and_its_one_class_case() -> None:
    hateful = benchmark(mode="rank", metric="auroc", candidates=("red", "green"), decoding={})
    dataset = colour_questions()
    two = ListDataset([e for e in dataset.examples if e.answers != ("blue",)])
    result = evaluate(FakeEngine(), hateful, two, progress=False)
    assert result.value == 100.0
    one = ListDataset([e for e in dataset.examples if e.answers == ("red",)])
    undefined = evaluate(FakeEngine(), hateful, one, progress=False)
    assert undefined.value is None
    assert undefined.interval is None
    assert "one class" in undefined.describe()
    with pytest.raises(ValueError, match="one class"):
        summarise([undefined])


def test_an_interrupted_run_resumes(tmp_path: Path) -> None:
    dataset, asked = colour_questions(), benchmark()
    with pytest.raises(KeyboardInterrupt):
        evaluate(FakeEngine(stop_after=2), asked, dataset, batch_size=3, out=tmp_path)
    with (tmp_path / PREDICTIONS).open("ab") as file:
        file.write(b'{"id": "torn')  # the kill came in the middle of a line
    engine = FakeEngine()
    resumed = evaluate(engine, asked, dataset, batch_size=3, out=tmp_path)
    assert sum(len(batch) for batch in engine.batches) == 6
    assert resumed.predictions == evaluate(FakeEngine(), asked, dataset).predictions
    lines = (tmp_path / PREDICTIONS).read_text().splitlines()
    assert len({json.loads(line)["id"] for line in lines}) == len(lines) == 12
    assert Result.load(tmp_path).to_json() == resumed.to_json()


def worker(rank: int, ranks: int, port: int, folder: str) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    engine = FakeEngine()
    with distributed.process_group("gloo"):
        asked = {"batch_size": 2, "out": folder, "progress": False}
        result = evaluate(engine, benchmark(), colour_questions(), **asked)
    record = {"json": result.to_json(), "answered": [i for batch in engine.batches for i in batch]}
    (Path(folder) / f"rank{rank}.json").write_text(json.dumps(record))


def test_ranks_share_the_samples_and_take_over_from_others(tmp_path: Path) -> None:
    dataset, out = colour_questions(), tmp_path / "two"
    whole = evaluate(FakeEngine(), benchmark(), dataset, out=tmp_path / "one")
    with pytest.raises(KeyboardInterrupt):
        evaluate(FakeEngine(stop_after=1), benchmark(), dataset, batch_size=3, out=out)
    # A run of four ranks was killed here: its third has answered sample 0.
    line = (tmp_path / "one" / PREDICTIONS).read_text().splitlines(keepends=True)
    answered = next(one for one in line if json.loads(one)["id"] == "0")
    (out / "predictions.rank2.jsonl").write_text(answered + '{"id": "torn')
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    multiprocessing.spawn(worker, args=(2, port, str(out)), nprocs=2)
    ranks = [json.loads((out / f"rank{rank}.json").read_text()) for rank in (0, 1)]
    assert ranks[0]["json"] == ranks[1]["json"] == whole.to_json()
    assert [len(rank["answered"]) for rank in ranks] == [4, 4]
    assert not {*ranks[0]["answered"]} & {*ranks[1]["answered"]}
    assert {p.name for p in out.glob("*.jsonl")} == {PREDICTIONS}
    assert Result.load(out).to_json() == whole.to_json()


def test_batches_halve_when_memory_is_short_and_double_while_it_is_faster(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock, sizes = [0.0], []
    monkeypatch.setattr("time.perf_counter", lambda: clock[0])

    def answer(part: Sequence[int]) -> None:
        if len(part) > 100:
            raise torch.OutOfMemoryError("too large")
        clock[0] += 1.0  # whatever the size: larger is faster
        sizes.append(len(part))

    in_batches(range(300), "auto", answer)
    assert sizes == [16, 32, 64, 64, 64, 60]  # 128 did not fit
    sizes.clear()
    in_batches(range(300), 150, answer)
    assert sizes == [75] * 4

    def no_faster(part: Sequence[int]) -> None:
        clock[0] += len(part)
        sizes.append(len(part))

    sizes.clear()
    in_batches(range(200), "auto", no_faster)
    assert set(sizes[:-1]) == {16, 32}
    assert sum(sizes) == 200

    def never(part: Sequence[int]) -> None:
        raise torch.OutOfMemoryError("not even one")

    with pytest.raises(torch.OutOfMemoryError):
        in_batches(range(3), 4, never)
    with pytest.raises(ValueError, match="at least 1, or auto"):
        in_batches([], 0, never)


def test_ranks_of_a_sharded_model_take_the_sizes_of_the_first(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Their clocks differ, and a rank that calls the model less often would hang the others."""
    clock, sent, sizes = [0.0], [], {0: [], 1: []}
    monkeypatch.setattr("time.perf_counter", lambda: clock[0])

    def broadcast(value: bool) -> bool:
        sent.append(value)
        return value

    for rank in sizes:

        def answer(part: Sequence[int], rank: int = rank) -> None:
            clock[0] += len(part) ** (2 * rank)  # the first is faster the larger, the second slower
            sizes[rank].append(len(part))

        monkeypatch.setattr(
            distributed, "broadcast_object", (lambda _: sent.pop(0)) if rank else broadcast
        )
        in_batches(range(300), "auto", answer, together=True)
    assert sizes[0] == sizes[1] == [16, 32, 64, 128, 60]

    def full(part: Sequence[int]) -> None:
        raise torch.OutOfMemoryError

    with pytest.raises(torch.OutOfMemoryError) as raised:
        in_batches(range(300), 8, full, together=True)
    assert "set evaluation.batch_size below 8" in raised.value.__notes__[0]


def test_predictions_of_other_settings_are_not_continued(tmp_path: Path) -> None:
    dataset = colour_questions()
    evaluate(FakeEngine(), benchmark(), dataset, out=tmp_path)
    before = (tmp_path / PREDICTIONS).read_bytes()
    with pytest.raises(ValueError, match="another model"):
        evaluate(FakeEngine(fingerprint="other"), benchmark(), dataset, out=tmp_path)
    with pytest.raises(ValueError, match="another benchmark"):
        evaluate(FakeEngine(), benchmark(prompt="{question}"), dataset, out=tmp_path)
    with pytest.raises(ValueError, match="blind_seed"):
        evaluate(FakeEngine(), benchmark(), dataset, out=tmp_path, blind_seed=1)
    for change in (
        {"answers": ("pink",)},
        {"question": "which colour?"},
        {"images": ("red_99.png",)},
        {"choices": ("red", "pink")},
    ):
        others = ListDataset([replace(dataset[0], **change), *dataset.examples[1:]])
        with pytest.raises(ValueError, match="another data"):
            evaluate(FakeEngine(), benchmark(), others, out=tmp_path)
    assert (tmp_path / PREDICTIONS).read_bytes() == before


def test_another_vocabulary_is_other_data(tmp_path: Path) -> None:
    ranking = benchmark(mode="rank", vocabulary=True, decoding={})
    evaluate(FakeEngine(), ranking, colour_questions(), out=tmp_path, vocabulary=COLOURS)
    with pytest.raises(ValueError, match="another data"):
        evaluate(FakeEngine(), ranking, colour_questions(), out=tmp_path, vocabulary=COLOURS[:2])
    evaluate(FakeEngine(), ranking, colour_questions(), out=tmp_path, vocabulary=COLOURS)


def test_a_damaged_folder_is_named(tmp_path: Path) -> None:
    evaluate(FakeEngine(), benchmark(), colour_questions(), out=tmp_path)
    file = tmp_path / "result.json"
    whole = file.read_text()
    for text in ("no json", "{}", whole.replace('"n":', '"m":')):
        file.write_text(text)
        with pytest.raises(ValueError, match=f"{tmp_path} is damaged"):
            Result.load(tmp_path)


def test_missing_and_repeated_predictions_are_named(tmp_path: Path) -> None:
    evaluate(FakeEngine(), benchmark(), colour_questions(), out=tmp_path)
    path = tmp_path / PREDICTIONS
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:-1]))
    with pytest.raises(ValueError, match="about 12 samples"):
        Result.load(tmp_path)
    path.write_text("".join([*lines, lines[0]]))
    with pytest.raises(ValueError, match=r"line 13: id .* twice"):
        Result.load(tmp_path)
    path.write_text("no json\n")
    with pytest.raises(ValueError, match="line 1: is not a prediction"):
        Result.load(tmp_path)
    with pytest.raises(FileNotFoundError, match="has not finished"):
        Result.load(tmp_path / "nowhere")


def test_bad_examples_are_named() -> None:
    example = colour_questions(1).examples[0]
    cases = {
        "no answers": [replace(example, answers=())],
        "appears twice": [example, example],
        "no examples": [],
    }
    for message, examples in cases.items():
        with pytest.raises(ValueError, match=message):
            evaluate(FakeEngine(), benchmark(), ListDataset(examples))
    bare = ListDataset([replace(example, choices=())])
    with pytest.raises(ValueError, match="no choices"):
        evaluate(FakeEngine(), benchmark(mode="rank"), bare)
    ranking = benchmark(mode="rank", vocabulary=True)
    with pytest.raises(ValueError, match="vocabulary"):
        evaluate(FakeEngine(), ranking, ListDataset([example]))
    with pytest.raises(ValueError, match="no metric"):
        evaluate(FakeEngine(), benchmark(metric="accurate"), ListDataset([example]))


def test_limit_spreads_over_the_set() -> None:
    chosen = pick(1000, 50)
    assert [i // 20 for i in chosen] == list(range(50))
    assert chosen == pick(1000, 50)
    assert pick(3, 10) == [0, 1, 2]
    for period in (2, 4, 5, 10, 20):  # labels that take turns
        assert len({i % period for i in pick(1000, 100)}) == period
    with pytest.raises(ValueError, match="at least 1"):
        pick(3, 0)


def test_a_class_that_the_limit_leaves_out_is_named() -> None:
    dataset = colour_questions(60)
    rare = replace(dataset.examples[0], answers=("white",))
    rarely = ListDataset([rare, *dataset.examples[1:]])
    with pytest.warns(UserWarning, match=r"toy: none of the 30 samples of 60 has .*'white', so"):
        evaluate(FakeEngine(), benchmark(), rarely, limit=30, progress=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        evaluate(FakeEngine(), benchmark(), dataset, limit=30, progress=False)
        evaluate(FakeEngine(), benchmark(), rarely, progress=False)
        open_ended = [replace(e, answers=(e.id,)) for e in dataset.examples]
        evaluate(FakeEngine(), benchmark(), ListDataset(open_ended), limit=30, progress=False)


def test_aokvqa_scores_difficult_questions_only_as_lavis() -> None:
    dataset = colour_questions()
    hard = replace(dataset.examples[0], answers=("pink",), extra={"difficult_direct_answer": True})
    rest = [replace(e, answers=e.answers * 3) for e in dataset.examples[1:]]
    marked = ListDataset([hard, *rest])
    official = evaluate(FakeEngine(), benchmark(metric="aokvqa_accuracy official"), marked)
    assert (official.value, official.n) == (100.0, 11)
    for metric in ("aokvqa_accuracy lavis", "aokvqa_accuracy"):
        lavis = evaluate(FakeEngine(), benchmark(metric=metric), marked)
        assert (lavis.value, lavis.n) == (pytest.approx(100 * 11 / 12), 12)


def test_a_missing_lemmatizer_is_named_before_the_first_answer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "spacy", None)
    normalize.lemmatizer.cache_clear()
    engine = FakeEngine()
    with pytest.raises(ValueError, match=r"instructblip\[lemmas\].*or use 'okvqa_accuracy off"):
        evaluate(engine, benchmark(metric="okvqa_accuracy lavis"), colour_questions())
    assert not engine.batches


def test_the_blind_control_has_an_image_for_each_place() -> None:
    shared = {"dataset": "toy", "split": "test", "task": "vqa"}
    two = Example(**shared, id="a", images=("a", "b"), question="<image> or <image>?")
    one = Example(**shared, id="b", images=("c",), question="What?")
    assert [example.images for example in swap_images([two, one], 0)] == [("c", "c"), ("a", "b")]


@settings(max_examples=100, deadline=None)
@given(keys=st.lists(st.integers(0, 6), max_size=40), seed=st.integers(0, 5))
def test_derangement_gives_no_sample_an_equal_image(keys: list[int], seed: int) -> None:
    if keys and 2 * max(keys.count(key) for key in keys) > len(keys):
        with pytest.raises(ValueError, match="cannot swap"):
            derange(keys, seed)
        return
    givers = derange(keys, seed)
    assert sorted(givers) == list(range(len(keys)))
    assert all(keys[i] != keys[giver] for i, giver in enumerate(givers))
    assert givers == derange(keys, seed)


def test_every_set_of_the_embedded_world_can_be_evaluated(tmp_path: Path) -> None:
    asked = select_benchmarks(["scenes"])
    sources = tuple(dict.fromkeys(one.source for one in asked))
    roots = write_scenes(tmp_path, scale=0.04, sets=sources)
    for one in asked:
        data = prepare(one.source, roots[one.source], one.split, tmp_path / "prepared")
        words = None
        if one.vocabulary:
            train = prepare(one.source, roots[one.source], "train", tmp_path / "prepared")
            words = sorted({answer for example in train for answer in example.answers})
        result = evaluate(FakeEngine(), one, data, limit=8, progress=False, vocabulary=words)
        assert result.n == 8
        assert result.value is not None, f"{one.name}: {result.describe()}"
        assert 0 <= result.value <= 100
        evaluate(FakeEngine(), one, data, limit=8, blind_seed=0, progress=False, vocabulary=words)


def test_summary_counts_each_set_once() -> None:
    dataset = colour_questions()
    good = evaluate(FakeEngine(), benchmark(name="a"), dataset)
    half = ListDataset(
        [replace(e, answers=("pink",)) if int(e.id) % 3 else e for e in dataset.examples]
    )
    bad = evaluate(FakeEngine(), benchmark(name="b"), half)
    other = evaluate(FakeEngine(), benchmark(name="c", role="held_out"), dataset)
    means = summarise([good, bad, other])
    assert bad.value == pytest.approx(100 / 3)
    assert means["held_in"].value == pytest.approx((100 + 100 / 3) / 2)
    assert means["held_in"].low < means["held_in"].value < means["held_in"].high
    assert means["held_out"].value == means["held_out"].high == 100
    assert means["held_out"].low == pytest.approx(100 * 0.025 ** (1 / 6))  # of 6 images, none wrong
    assert (means["held_in"].n, means["held_out"].n) == (2, 1)
