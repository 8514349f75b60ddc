"""What handlers and page share: a batcher for each model, the limits and the counters."""

import asyncio
import math
import time
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import HTTPException
from starlette.concurrency import run_in_threadpool
from torch import Tensor

from instructblip.inference.engine import Engine
from instructblip.serving.batching import Batcher, Job, QueueFull, TooLate
from instructblip.serving.config import ServeConfig
from instructblip.serving.incoming import read_image
from instructblip.serving.metrics import Metrics


class Service:
    """A batcher for each of ``engines``, by the name that requests choose."""

    def __init__(self, engines: Mapping[str, Engine], config: ServeConfig) -> None:
        self.config = config
        self.metrics = Metrics(lambda: self.waiting)
        self.batchers = {
            name: Batcher(engine, config.max_batch, config.max_queue, self.metrics.batch)
            for name, engine in engines.items()
        }
        self.painters = {n: b for n, b in self.batchers.items() if b.engine.can_draw}
        self.created = int(time.time())
        self.decoders = asyncio.Semaphore(4)  # decoded images are large: few at a time

    @property
    def waiting(self) -> int:
        return sum(batcher.waiting for batcher in self.batchers.values())

    @property
    def deadline(self) -> float:
        """When a request that arrives now must be answered."""
        return time.monotonic() + self.config.timeout_s

    def choose(self, model: str | None) -> tuple[str, Batcher]:
        """Name and batcher of a model; None is the first. Raises HTTPException."""
        name = next(iter(self.batchers)) if model is None else model
        if name not in self.batchers:
            known = ", ".join(self.batchers)
            raise HTTPException(404, f"no model of that name; there are {known}")
        return name, self.batchers[name]

    def check_candidates(self, candidates: Sequence[str]) -> None:
        """Raise HTTPException if there are too many candidates, or too many characters in all."""
        count, most = len(candidates), self.config.max_candidates
        if count > most:
            raise HTTPException(413, f"{count} candidates; at most {most}")
        length, longest = sum(map(len, candidates)), self.config.max_candidate_characters
        if length > longest:
            raise HTTPException(
                413, f"candidates of {length} characters in all; at most {longest}: send fewer"
            )

    async def pixels(self, urls: list[str], engine: Engine, where: str) -> tuple[Tensor, ...]:
        """Images decoded and transformed off the event loop. Raises HTTPException, BadImage."""
        if len(urls) > self.config.max_pictures:
            raise HTTPException(
                413, f"{where}: {len(urls)} images; at most {self.config.max_pictures}"
            )

        def load(url: str, place: str) -> Tensor:
            return engine.images.transform(read_image(url, self.config, place))

        pixels = []
        for number, url in enumerate(urls, 1):
            async with self.decoders:
                pixels.append(await run_in_threadpool(load, url, f"{where}, image {number}"))
        return tuple(pixels)

    def submit(self, batcher: Batcher, job: Job) -> None:
        """Queue a job. Raises HTTPException 429 if the queue is full."""
        try:
            batcher.submit(job)
        except QueueFull:
            raise too_busy() from None

    async def result(self, job: Job) -> Any:
        """The job's result. Raises HTTPException 504 when its time is up; cancelling this frees the
        job's place."""
        try:
            seconds = max(0.0, job.deadline - time.monotonic())
            return await asyncio.wait_for(asyncio.wrap_future(job.future), seconds)
        except (TooLate, TimeoutError):
            raise HTTPException(504, f"no answer within {self.config.timeout_s:g} s") from None
        finally:
            job.leave()

    @staticmethod
    def wait(job: Job) -> Any:
        """``result`` for a thread. Raises TooLate or TimeoutError when the time is up."""
        try:
            return job.future.result(max(0.0, job.deadline - time.monotonic()))
        finally:
            job.leave()


def too_busy() -> HTTPException:
    return HTTPException(429, "too many requests wait; try again", headers={"Retry-After": "1"})


def probabilities(scores: list[float]) -> list[float]:
    """The softmax of log-likelihoods in nats."""
    top = max(scores)
    weights = [math.exp(score - top) for score in scores]
    return [weight / sum(weights) for weight in weights]
