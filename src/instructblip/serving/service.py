"""What handlers and page share: a batcher for each model, the limits and the counters."""

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from typing import Any

from fastapi import HTTPException
from PIL import Image
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from starlette.concurrency import run_in_threadpool
from torch import Tensor

from instructblip.data.images import ImageTransform
from instructblip.data.reading.decode import Window
from instructblip.data.tokens import check_marks
from instructblip.inference.engine import Engine
from instructblip.inference.inputs import ImageInput
from instructblip.serving.batching import Batcher, Ended, Job, QueueFull, TooLate
from instructblip.serving.config import ServeConfig
from instructblip.serving.decoders import Decoders
from instructblip.serving.incoming import read_url
from instructblip.serving.schema import Box

BATCH_SIZES = (1, 2, 4, 8, 16, 32, 64)


class Metrics:
    """Counters in the format of Prometheus, in a registry of their own: two applications in a
    process do not share them. ``waiting`` returns the number of requests in the queue."""

    def __init__(self, waiting: Callable[[], int]) -> None:
        self._registry = CollectorRegistry()
        shared: Any = {"namespace": "instructblip", "registry": self._registry}
        self._requests = Counter("requests", "Requests", ["route", "status"], **shared)
        self._seconds = Histogram("request_seconds", "Time of a request", ["route"], **shared)
        self._batch_size = Histogram(
            "batch_size", "Requests of a batch or a step", buckets=BATCH_SIZES, **shared
        )
        self._batch_seconds = Histogram("batch_seconds", "Time of a batch or a step", **shared)
        Gauge("waiting", "Requests waiting", **shared).set_function(waiting)
        self.tokens = Counter("generated_tokens", "Tokens answered", **shared)

    def request(self, route: str, status: int, seconds: float) -> None:
        """Count a finished request; ``route`` is its pattern, never a path that a client made."""
        self._requests.labels(route, str(status)).inc()
        self._seconds.labels(route).observe(seconds)

    def batch(self, size: int, seconds: float) -> None:
        self._batch_size.observe(size)
        self._batch_seconds.observe(seconds)

    def text(self) -> bytes:
        return generate_latest(self._registry)


class Service:
    """A batcher for each of ``engines``, by the name that requests choose."""

    def __init__(
        self,
        engines: Mapping[str, Engine],
        config: ServeConfig,
        titles: Mapping[str, str] | None = None,
        others: Sequence[ImageInput] = (),
    ) -> None:
        self.config, self.others = config, others
        self.titles = dict(titles or {})
        self.metrics = Metrics(lambda: self.waiting)
        self.batchers = {name: self._batcher(engine) for name, engine in engines.items()}
        self.painters = {n: b for n, b in self.batchers.items() if b.engine.can_draw}
        self.created = int(time.time())
        self.decoders = Decoders()

    def _batcher(self, engine: Engine) -> Batcher:
        config = self.config
        shared = config.shared_mb << 20
        sizes = (config.max_batch, config.max_queue)
        return Batcher(engine, *sizes, self.metrics.batch, shared, self.others)

    def put(self, name: str, engine: Engine, title: str) -> None:
        """Serve a model under a name, in place of the one that had it, whose requests end first."""
        earlier = self.batchers.get(name)
        self.batchers[name], self.titles[name] = self._batcher(engine), title
        if earlier is not None:
            threading.Thread(target=earlier.close, daemon=True).start()

    @property
    def waiting(self) -> int:
        return sum(batcher.waiting for batcher in self.batchers.values())

    @property
    def dead(self) -> list[str]:
        """The models that cannot answer any more, since their thread has ended."""
        return [name for name, batcher in self.batchers.items() if not batcher.alive]

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

    def choose_painter(self, model: str | None) -> Batcher:
        """The model of that name, or the first that draws. Raises HTTPException."""
        if model is not None:
            self.choose(model)
        name = next(iter(self.painters), None) if model is None else model
        if name not in self.painters:
            known = f"; ask one of {', '.join(self.painters)}" if self.painters else " here"
            raise HTTPException(404, f"no decoder: this model does not draw{known}")
        return self.painters[name]

    def check_candidates(self, candidates: Sequence[str], what: str = "candidates") -> None:
        """Raise HTTPException if there are too many texts, or too many characters in all."""
        count, most = len(candidates), self.config.max_candidates
        if count > most:
            raise HTTPException(413, f"{count} {what}; at most {most}")
        length, longest = sum(map(len, candidates)), self.config.max_candidate_characters
        if length > longest:
            raise HTTPException(
                413, f"{what} of {length} characters in all; at most {longest}: send fewer"
            )

    def check_length(self, length: int, where: str) -> None:
        """Raise HTTPException if the texts of a request have too many characters in all."""
        longest = self.config.max_text_characters
        if length > longest:
            raise HTTPException(
                413, f"{where}: {length} characters in all; at most {longest}: send fewer"
            )

    def check_marks(self, text: str, num_images: int, where: str) -> None:
        """Raise HTTPException for a text with more image marks than there are images."""
        try:
            check_marks(text, num_images)
        except ValueError as error:
            raise HTTPException(400, f"{where}: {error}") from None

    async def read_image(
        self, url: str, where: str, deadline: float, window: Window = "auto"
    ) -> Image.Image:
        """The image behind a URL. Raises BadImage, HTTPException 504 at the deadline."""
        data = await run_in_threadpool(read_url, url, self.config, where)
        try:
            most = self.config.max_pixels
            return await self.decoders.decode(data, most, where, window, deadline)
        except TimeoutError:
            raise self.too_late() from None

    async def read_images(
        self, urls: list[str], transform: ImageTransform, where: str, deadline: float
    ) -> AsyncIterator[Image.Image]:
        """The images behind the URLs, in the window of ``transform``, one at a time. Raises
        HTTPException, BadImage."""
        if len(urls) > self.config.max_pictures:
            raise HTTPException(
                413, f"{where}: {len(urls)} images; at most {self.config.max_pictures}"
            )
        for number, url in enumerate(urls, 1):
            place = f"{where}, image {number}"
            yield await self.read_image(url, place, deadline, transform.window)

    async def pixels(
        self, urls: list[str], engine: Engine, where: str, deadline: float
    ) -> tuple[Tensor, ...]:
        """Images as the model reads them. Raises HTTPException, BadImage."""
        return (await self.pixels_and_boxes(urls, engine, where, deadline))[0]

    async def pixels_and_boxes(
        self, urls: list[str], engine: Engine, where: str, deadline: float
    ) -> tuple[tuple[Tensor, ...], list[Box]]:
        """Images as the model reads them, and the part of each that it reads (left, top, right,
        bottom) in fractions of its sides. Raises HTTPException, BadImage."""
        transform = engine.images.transform
        pixels, boxes = [], []
        async for image in self.read_images(urls, transform, where, deadline):
            left, top, right, bottom = transform.seen(*image.size)
            width, height = image.size
            boxes.append((left / width, top / height, right / width, bottom / height))
            pixels.append(await run_in_threadpool(transform, image))
        return tuple(pixels), boxes

    def submit(self, batcher: Batcher, job: Job) -> None:
        """Queue a job. Raises HTTPException 429 if the queue is full."""
        try:
            batcher.submit(job)
        except QueueFull:
            raise too_busy() from None

    async def result(self, job: Job) -> Any:
        """The job's result. Raises HTTPException 504 when its time is up, 503 when the model has
        ended; cancelling this frees the job's place."""
        try:
            return await asyncio.wait_for(asyncio.wrap_future(job.future), job.seconds_left)
        except (TooLate, TimeoutError):
            raise self.too_late() from None
        except Ended:
            raise HTTPException(503, "the model has ended: the server starts anew") from None
        finally:
            job.leave()

    def too_late(self) -> HTTPException:
        return HTTPException(504, f"no answer within {self.config.timeout_s:g} s")


def too_busy() -> HTTPException:
    return HTTPException(429, "too many requests wait; try again", headers={"Retry-After": "1"})
