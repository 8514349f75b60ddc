"""Continuous micro-batches: requests that wait while the model is busy go together next.

One thread owns the model. As soon as it is free it takes the oldest job and every other one that
can stand in the same batch (same kind, same decoding, as many frames), oldest first. The queue is
bounded: what does not fit is refused at once instead of being answered too late.
"""

import functools
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from PIL import Image
from torch import Tensor

from instructblip.inference.engine import Engine
from instructblip.inference.streaming import TextStream
from instructblip.model.decoding import Decoding
from instructblip.model.language.ranking import Normalization


class QueueFull(Exception):
    """The queue holds as many jobs as it may."""


class TooLate(Exception):
    """The job's time was up before its answer was."""


@dataclass(frozen=True, slots=True)
class Answer:
    """A generated answer; ``cut`` when the limit of tokens ended it. Of its prompt the model read
    ``prompt_tokens``, all but ``lost`` at the beginning."""

    text: str
    prompt_tokens: int
    lost: int
    tokens: int
    cut: bool


@dataclass(eq=False, kw_only=True)
class Job:
    """One request: pictures as pixels [F][3, S, S], the instruction, and what is wanted.

    The result is an ``Answer``, of which ``on_text`` hears the pieces from the model's thread;
    with ``candidates`` their log-likelihoods, a list of floats; with ``look`` the attention of the
    queries to the picture [F, Q, P]; with ``drawing``, the settings of ``Engine.draw``, pictures.
    """

    pixels: tuple[Tensor, ...]
    instruction: str
    decoding: Decoding | None = None  # the engine's
    candidates: tuple[str, ...] | None = None
    normalization: Normalization = "sum"
    look: bool = False
    drawing: dict[str, Any] | None = None
    deadline: float = math.inf
    on_text: Callable[[str], None] | None = None
    future: "Future[Any]" = field(default_factory=Future)
    left: bool = False

    @property
    def key(self) -> Hashable:
        """Jobs with equal keys can stand in one batch; a drawing has noise of its own seed."""
        if self.drawing is not None:
            return "draw", id(self)
        if self.look:
            return "look", len(self.pixels)
        if self.candidates is not None:
            return "rank", len(self.pixels), self.normalization
        return "answer", len(self.pixels), self.decoding

    @property
    def gone(self) -> bool:
        """Whether no one waits for it any more."""
        return self.left or time.monotonic() > self.deadline


class Batcher:
    """Answers jobs from any thread with one engine, whose only user it must be.

    Args:
        max_batch: jobs that run together at most; 1 is one request at a time.
        max_queue: jobs that wait at most.
        on_batch: told the size and the seconds of each batch.
    """

    def __init__(
        self,
        engine: Engine,
        max_batch: int = 32,
        max_queue: int = 128,
        on_batch: Callable[[int, float], None] = lambda size, seconds: None,
    ) -> None:
        self.engine = engine
        self.max_batch, self.max_queue, self.on_batch = max_batch, max_queue, on_batch
        self._jobs: deque[Job] = deque()
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._work, name="batcher", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        """Jobs in the queue."""
        return len(self._jobs)

    def submit(self, job: Job) -> "Future[Any]":
        """Queue a job. Raises QueueFull, also once the batcher is closed."""
        with self._changed:
            self._drop_gone()  # the model may be too busy to have noticed
            if self._closed or len(self._jobs) >= self.max_queue:
                raise QueueFull
            self._jobs.append(job)
            self._changed.notify()
        return job.future

    def close(self) -> None:
        """Answer what waits, take nothing new, and end the thread."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    def _work(self) -> None:
        while jobs := self._next():
            began = time.monotonic()
            self._run(jobs)
            self.on_batch(len(jobs), time.monotonic() - began)

    def _next(self) -> list[Job]:
        """The next batch; empty when the batcher is closed and nothing waits."""
        with self._changed:
            while True:
                self._drop_gone()
                while self._jobs:
                    # from here on a future cannot be cancelled, only left
                    if jobs := [job for job in self._take() if _begins(job)]:
                        return jobs
                if self._closed:
                    return []
                self._changed.wait()

    def _drop_gone(self) -> None:
        for job in [job for job in self._jobs if job.gone]:
            self._jobs.remove(job)
            if job.future.set_running_or_notify_cancel():
                job.future.set_exception(TooLate())

    def _take(self) -> list[Job]:
        """The oldest job and what can go with it, out of the queue."""
        key = self._jobs[0].key
        jobs = [job for job in self._jobs if job.key == key][: self.max_batch]
        taken = set(map(id, jobs))
        self._jobs = deque(job for job in self._jobs if id(job) not in taken)
        return jobs

    def _run(self, jobs: Sequence[Job]) -> None:
        try:
            results = self._results(jobs)
        except InterruptedError:
            results = [TooLate()] * len(jobs)
        except Exception as error:
            if len(jobs) > 1:  # so that one request cannot spoil the others'
                for job in jobs:
                    self._run([job])
                return
            results = [error]
        for job, result in zip(jobs, results, strict=True):
            if isinstance(result, Exception):
                job.future.set_exception(result)
            else:
                job.future.set_result(result)

    def _results(self, jobs: Sequence[Job]) -> Sequence[Any]:
        engine = self.engine
        if jobs[0].drawing is not None:
            return [_draw(engine, job) for job in jobs]
        samples = [
            engine.sample(
                tuple(f"{number}.{frame}" for frame in range(len(job.pixels))),
                job.pixels,
                job.instruction,
            )
            for number, job in enumerate(jobs)
        ]
        if jobs[0].look:
            return list(engine.look(samples))
        if jobs[0].candidates is not None:
            candidates = [job.candidates or () for job in jobs]
            going_on = functools.partial(_going_on, jobs)
            return engine.rank_samples(samples, candidates, jobs[0].normalization, going_on)
        texts = [TextStream(engine.tokens, engine.ends) for _ in jobs]

        def on_tokens(tokens: list[int]) -> None:
            _going_on(jobs)
            for job, text, token in zip(jobs, texts, tokens, strict=True):
                _tell(job, text.add(token))

        decoding = jobs[0].decoding or engine.decoding
        ids = engine.respond(samples, decoding, on_tokens)
        for job, text, own in zip(jobs, texts, ids, strict=True):
            _tell(job, text.rest(own))
        return [
            Answer(
                text=engine.tokens.decode(own),
                prompt_tokens=len(sample.prompt_ids),
                lost=engine.lost_tokens(job.instruction),
                tokens=len(own),
                cut=len(own) >= decoding.max_new_tokens,
            )
            for job, sample, own in zip(jobs, samples, ids, strict=True)
        ]


def _draw(engine: Engine, job: Job) -> list[Image.Image]:
    going_on = functools.partial(_going_on, [job])
    return engine.draw(job.instruction, **(job.drawing or {}), on_step=going_on)


def _going_on(jobs: Sequence[Job]) -> None:
    """InterruptedError once no one waits for any of the jobs."""
    if all(job.gone for job in jobs):
        raise InterruptedError


def _tell(job: Job, piece: str) -> None:
    if piece and job.on_text is not None:
        job.on_text(piece)


def _begins(job: Job) -> bool:
    return job.future.set_running_or_notify_cancel()
