"""Answers that join those that run: each is that of its request alone, whatever else happens."""

import random
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from benchmarks.attack_server import Failing
from instructblip.data.templates import Rendered
from instructblip.inference.engine import Engine, load
from instructblip.scenes.world import render, sample_scene
from instructblip.serving.batching import Batcher, Job, TooLate
from tests.conftest import greedy_engine
from tests.serving.test_api import together

TEXTS = ("what is red?", "what?", "the red cat is blue? what is it?")
LONG: dict[str, Any] = {"max_new_tokens": 40, "min_new_tokens": 40}


@pytest.fixture(scope="module")
def engine(model_folder: Path) -> Engine:
    return greedy_engine(model_folder)


@pytest.fixture
def batcher(engine: Engine) -> Iterator[Batcher]:
    batcher = Batcher(engine, max_batch=4)
    yield batcher
    batcher.close()


def job_of(
    engine: Engine, image: Path | Image.Image, text: str, more: dict[str, Any], **rest: Any
) -> Job:
    image = Image.open(image) if isinstance(image, Path) else image
    pixels = engine.images.transform(image.convert("RGB"))
    return Job(
        pixels=(pixels,), instruction=text, decoding=engine.decoding.override(**more), **rest
    )


def collect(job: Job) -> list[str]:
    """The pieces of a job's answer as they come."""
    pieces: list[str] = []
    job.listen(pieces.append)
    return pieces


def test_a_mix_of_requests_gets_the_answers_of_each_alone() -> None:
    """The starter: short and long answers, streams, stop texts, a search, a ranking, one that is
    left, and one whose listener fails; the same questions twice."""
    engine, rng = load("starter", device="cpu"), random.Random(0)
    images = [render(sample_scene(rng)) for _ in range(3)]
    settings: list[dict[str, Any]] = [
        {"max_new_tokens": 3},
        {"max_new_tokens": 40},
        {"max_new_tokens": 20, "repetition_penalty": 1.5, "min_new_tokens": 12},
        {"max_new_tokens": 9, "num_beams": 2},
    ]
    texts = ("A short image description.", "Question: how many shapes are there? Short answer:")
    asked = [(i, text, more) for more in settings for i in images for text in texts]
    expected = [engine.answer(*each[:2], **each[2]) for each in asked]
    scores = engine.rank(images[0], texts[1], ["2", "a red circle"])
    until = engine.answer(images[0], texts[0]).split(" a")[0]
    jobs = [job_of(engine, *each) for each in asked * 2]
    streams = {n: collect(job) for n, job in enumerate(jobs) if n % 3 == 0}
    ranked = job_of(engine, images[0], texts[1], {}, candidates=("2", "a red circle"))
    stopped = job_of(engine, images[0], texts[0], {}, stop=(" a",))
    left, broken = (job_of(engine, images[1], texts[0], {}) for _ in range(2))
    left.listen(lambda _piece: left.leave())

    def fail(_piece: str) -> None:
        raise RuntimeError("nobody listens")

    broken.listen(fail)
    batcher = Batcher(engine, max_batch=5)
    for job in (*jobs[:7], left, ranked, broken, stopped, *jobs[7:]):
        batcher.submit(job)
    assert [job.future.result(120).text for job in jobs] == expected * 2
    for number, pieces in streams.items():
        assert "".join(pieces) == (expected * 2)[number]
    assert ranked.future.result(60) == pytest.approx(scores, abs=1e-3)
    assert stopped.future.result(60).text == until
    with pytest.raises(TooLate):
        left.future.result(60)
    with pytest.raises(RuntimeError, match="nobody listens"):
        broken.future.result(60)
    batcher.close()


def test_a_short_answer_and_a_ranking_do_not_wait_for_a_long_answer(
    engine: Engine, batcher: Batcher, png: list[Path]
) -> None:
    two: dict[str, Any] = {"max_new_tokens": 2, "min_new_tokens": 2}
    expected = engine.answer(png[0], TEXTS[0], **LONG), engine.answer(png[1], TEXTS[1], **two)
    long, short = job_of(engine, png[0], TEXTS[0], LONG), job_of(engine, png[1], TEXTS[1], two)
    ranked = job_of(engine, png[1], TEXTS[1], {}, candidates=("a", "b"))
    order: list[str] = []
    for name, job in (("long", long), ("short", short), ("ranked", ranked)):
        job.future.add_done_callback(lambda _, name=name: order.append(name))
    begun = threading.Event()

    def submit(_piece: str) -> None:
        if not begun.is_set():
            begun.set()
            batcher.submit(short)
            batcher.submit(ranked)

    long.listen(submit)
    batcher.submit(long)
    assert (long.future.result(60).text, short.future.result(60).text) == expected
    assert sorted(order[:2]) == ["ranked", "short"]


def test_a_long_answer_goes_on_while_many_short_ones_come(
    engine: Engine, batcher: Batcher, png: list[Path]
) -> None:
    long = job_of(engine, png[0], TEXTS[0], {"max_new_tokens": 20, "min_new_tokens": 20})
    short = [job_of(engine, png[1], TEXTS[1], {"max_new_tokens": 1}) for _ in range(100)]
    left: list[int] = []
    long.future.add_done_callback(lambda _: left.append(batcher.waiting))
    with batcher._changed:
        batcher._jobs += [long, *short]
        batcher._changed.notify()
    for job in (long, *short):
        job.future.result(60)
    assert left[0] > 30


def test_a_seed_samples_the_same_answer_beside_others(
    engine: Engine, batcher: Batcher, png: list[Path]
) -> None:
    sampling = {"temperature": 1.5, "top_p": 0.9, "max_new_tokens": 12}
    expected = []
    for seed in range(6):
        torch.manual_seed(seed)
        expected.append(engine.answer(png[seed % 4], TEXTS[seed % 3], **sampling))
    assert len(set(expected)) > 3
    jobs = [
        job_of(engine, png[seed % 4], TEXTS[seed % 3], sampling, seed=seed) for seed in range(6)
    ]
    for job in jobs:
        batcher.submit(job)
    assert [job.future.result(60).text for job in jobs] == expected


@pytest.mark.parametrize("sampled", [False, True])
def test_no_stream_repeats_or_loses_text_when_a_step_fails(
    engine: Engine, png: list[Path], sampled: bool
) -> None:
    more = {**LONG, "temperature": 2.0} if sampled else LONG
    expected = engine.answer(png, TEXTS[0], **LONG)
    jobs = [job_of(engine, path, TEXTS[0], more) for path in png]
    streams = [collect(job) for job in jobs]
    failing: Any = Failing(engine, 4)
    batcher = together(failing, jobs)
    texts = [job.future.result(60).text for job in jobs]
    assert ["".join(pieces) for pieces in streams] == texts
    assert sampled != (texts == expected)
    batcher.close()


def test_only_the_prompt_that_cannot_be_read_fails(engine: Engine, png: list[Path]) -> None:
    class Broken(Failing):
        def read(self, samples: Any) -> Any:
            if any(sample.prompt_ids == bad for sample in samples):
                raise RuntimeError("out of memory")
            return self.engine.read(samples)

    bad = engine.tokens.prompt("bad")
    jobs = [job_of(engine, path, TEXTS[0], {}) for path in png]
    jobs[1].instruction = "bad"
    expected = engine.answer(png, TEXTS[0])
    broken: Any = Broken(engine, 1000)
    batcher = together(broken, jobs)
    with pytest.raises(RuntimeError, match="out of memory"):
        jobs[1].future.result(60)
    for number in (0, 2, 3):
        assert jobs[number].future.result(60).text == expected[number]
    batcher.close()


def test_requests_about_one_image_share_its_features_and_its_prompt(
    engine: Engine, png: list[Path]
) -> None:
    class Counting(Failing):
        def encode(self, pixels: Any) -> Any:
            encoded.append(len(pixels))
            return self.engine.encode(pixels)

        def read(self, samples: Any) -> Any:
            read.append(len(samples))
            return self.engine.read(samples)

    encoded: list[int] = []
    read: list[int] = []
    counting: Any = Counting(engine, 1000)
    asked = [(path, text) for path in png[:2] for text in TEXTS]

    def answers(batcher: Batcher) -> list[str]:
        jobs = [job_of(engine, *each, {}) for each in asked]
        looks = job_of(engine, png[0], TEXTS[0], {}, look=True)
        for job in (*jobs, looks):
            batcher.submit(job)
        looks.future.result(60)
        return [job.future.result(60).text for job in jobs]

    expected = [engine.answer(*each) for each in asked]
    sharing, alone = Batcher(counting, max_batch=1), Batcher(counting, 1, shared_bytes=0)
    for _ in range(2):
        assert answers(sharing) == expected
    assert (sum(encoded), sum(read)) == (2, 6)
    for _ in range(2):
        assert answers(alone) == expected
    assert (sum(encoded), sum(read)) == (2 + 14, 6 + 12)
    sharing.close()
    alone.close()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_no_request_waits_for_a_thread_that_has_ended(engine: Engine, png: list[Path]) -> None:
    jobs = [job_of(engine, path, TEXTS[0], LONG) for path in (*png, *png)]

    def die(size: int, _seconds: float) -> None:
        if size == 2:
            raise RuntimeError("the thread ends here")

    batcher = Batcher(engine, max_batch=2, on_batch=die)
    with batcher._changed:
        batcher._jobs += jobs
        batcher._changed.notify()
    for job in jobs:
        with pytest.raises(RuntimeError, match="thread has ended"):
            job.future.result(60)
    batcher._thread.join(10)
    assert not batcher.alive


def test_an_explanation_gives_way_to_answers(engine: Engine, png: list[Path]) -> None:
    """A question that comes while eight images are explained is answered before, and both are as
    they are alone."""
    pixels = tuple(engine.images.transform(Image.open(png[0]).convert("RGB")) for _ in range(8))
    asked = Rendered("what?", "what?", "the red cat is blue")
    batcher, ended = Batcher(engine), []
    try:
        alone = batcher.submit(Job(pixels=pixels, instruction=asked, explain="occlusion"))
        expected = [each.whole for each in alone.result(60)]
        both = {
            "explanation": Job(pixels=pixels, instruction=asked, explain="occlusion"),
            "answer": job_of(engine, png[1], "what is red?", {}),
        }
        for name, job in both.items():
            job.future.add_done_callback(lambda _, name=name: ended.append(name))
            batcher.submit(job)
            while batcher.waiting:  # the model's thread has not begun it
                time.sleep(0.001)
        assert both["answer"].future.result(60).text == engine.answer(png[1], "what is red?")
        for map_, whole in zip(both["explanation"].future.result(60), expected, strict=True):
            torch.testing.assert_close(map_.whole, whole)
        assert ended == ["answer", "explanation"]
    finally:
        batcher.close()
