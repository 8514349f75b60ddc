"""One thread owns the model and answers jobs from all others.

Answers of a decoder without beams share its steps: a job joins those that run as soon as a row is
free, and leaves at its own last token (`model.language.running`). All other work runs in whole
batches between the steps: the oldest job and every other one that can run with it (same kind, same
decoding, same number of frames). Batches and steps take turns of equal time. The queue is bounded:
a job that does not fit is refused at once instead of being answered too late.
"""

import hashlib
import math
import secrets
import threading
import time
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from instructblip.core.batch import Sample
from instructblip.data.templates import Rendered
from instructblip.inference.details import DetailedAnswer, FinishReason
from instructblip.inference.embedder import Embedder
from instructblip.inference.engine import Engine
from instructblip.inference.inputs import ImageInput
from instructblip.inference.sharing import Shared
from instructblip.inference.streaming import TextStream
from instructblip.model.decoding import Decoding
from instructblip.model.explain import Method
from instructblip.model.language.ranking import Normalization
from instructblip.model.language.running import Response

JOINS = "joins"
"""Key of the jobs that join those that run."""


class QueueFull(Exception):
    """The queue holds as many jobs as it may."""


class Ended(RuntimeError):
    """The model's thread has ended, and nobody answers."""


class TooLate(Exception):
    """The job's time was up before its answer was ready."""


@dataclass(frozen=True, slots=True)
class Answer:
    """A generated answer of ``tokens`` tokens, and OpenAI's name of what ended it. The model read
    ``prompt_tokens`` of the prompt and none of the ``lost`` tokens before them. ``details`` are
    those of the whole answer, also where a stop text cut it."""

    text: str
    prompt_tokens: int
    lost: int
    tokens: int
    finish_reason: FinishReason
    details: DetailedAnswer | None = None


@dataclass(frozen=True, slots=True)
class Embeddings:
    """Unit vectors of images [N, Q, E] and of texts [M, E], each None without any; the Q-Former
    read ``tokens`` of the texts and of the instruction, which it reads with each image."""

    images: Tensor | None
    texts: Tensor | None
    tokens: int


def _overlap(text: str, stop: str) -> int:
    """Number of characters at the end of ``text`` with which ``stop`` begins."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)


@dataclass(eq=False, kw_only=True)
class Job:
    """One request: its images as pixels [F][3, S, S], the instruction, and the kind of result.

    ``future`` resolves to an ``Answer``; with ``candidates`` to their log-likelihoods, a list of
    floats; with ``look`` to the attention of the queries to the images [F, Q, G, G]; with
    ``explain``, a method, to an explanation of the response of ``instruction`` for each image; with
    ``drawing``, the arguments of ``Engine.draw``, to images; with ``texts`` to ``Embeddings``
    of the images, which the queries read with the instruction unless it is empty, and of the texts.
    ``decoding`` None is the engine's. An
    answer ends before the first of the texts ``stop``; with a ``seed`` the same answer is sampled
    again. With ``details`` the answer has them, and in the place of each token that many others.
    """

    pixels: tuple[Tensor, ...]
    instruction: str | Rendered
    decoding: Decoding | None = None
    seed: int | None = None
    stop: tuple[str, ...] = ()
    details: int | None = None
    candidates: tuple[str, ...] | None = None
    normalization: Normalization = "sum"
    look: bool = False
    explain: Method | None = None
    drawing: dict[str, Any] | None = None
    texts: tuple[str, ...] | None = None
    deadline: float = math.inf
    future: "Future[Any]" = field(default_factory=Future, init=False)
    _on_text: Callable[[str], None] | None = field(default=None, init=False)
    _sent: str = field(default="", init=False)
    stopped: bool = field(default=False, init=False)
    """Whether the answer has one of the texts ``stop``, or the job has failed."""
    failure: Exception | None = field(default=None, init=False)
    """Why this job failed, while others of its batch continue."""
    _generated: str = field(default="", init=False)
    _left: bool = field(default=False, init=False)

    @property
    def answers(self) -> bool:
        """Whether the result is an ``Answer``."""
        others = (self.drawing, self.candidates, self.explain, self.texts)
        return not self.look and all(other is None for other in others)

    @property
    def is_repeatable(self) -> bool:
        """Whether the answer is sampled by a seed."""
        return self.seed is not None and self.decoding is not None and self.decoding.do_sample

    @property
    def key(self) -> Hashable:
        """Jobs with equal keys can run in one batch; what is drawn or sampled by a seed is alone,
        since a batch shares its noise, and so are an explanation and embeddings, which are a
        batch by themselves."""
        if self.drawing is not None:
            return "draw", id(self)
        if self.explain is not None:
            return "explain", id(self)
        if self.texts is not None:
            return "embed", id(self)
        if self.is_repeatable:
            return "sample", id(self)
        if self.look:
            return "look", len(self.pixels)
        if self.candidates is not None:
            return "rank", len(self.pixels), self.normalization
        return "answer", len(self.pixels), self.decoding

    def listen(self, on_text: Callable[[str], None]) -> None:
        """Pass the pieces of the answer to ``on_text``, called from the model's thread."""
        self._on_text = on_text

    @property
    def is_read(self) -> bool:
        """Whether the answer is read as it grows."""
        return self._on_text is not None or bool(self.stop)

    def restart(self) -> None:
        """Generate the answer again: the listener gets what follows the text that it has."""
        self._generated, self.stopped = "", self.failure is not None

    def send(self, piece: str, last: bool = False) -> None:
        """Pass a piece of the answer to the listener, but nothing that a stop text may begin.

        Raises RuntimeError if the answer is generated again and differs from the text that the
        listener has.
        """
        self._generated += piece
        text = self.cut(self._generated)
        self.stopped = text != self._generated
        if not self.stopped and not last:
            text = text[: len(text) - max((_overlap(text, stop) for stop in self.stop), default=0)]
        if self._on_text is None or self._sent.startswith(text):
            return
        if not text.startswith(self._sent):
            raise RuntimeError("the answer differs from the text that was sent")
        piece, self._sent = text[len(self._sent) :], text
        self._on_text(piece)

    def cut(self, text: str) -> str:
        """``text`` up to the stop text that is complete first."""
        found = [(at + len(stop), at) for stop in self.stop if (at := text.find(stop)) >= 0]
        return text[: min(found)[1]] if found else text

    def leave(self) -> None:
        """Stop waiting for the result: the job is dropped, or ends early."""
        self._left = True

    @property
    def seconds_left(self) -> float:
        return max(0.0, self.deadline - time.monotonic())

    @property
    def gone(self) -> bool:
        """Whether nobody waits for the result any more."""
        return self._left or not self.seconds_left


@dataclass(eq=False)
class _Row:
    """A job whose answer grows beside others; ``text`` if someone reads it as it grows."""

    job: Job
    sample: Sample
    response: Response
    text: TextStream | None


class Batcher:
    """Answers jobs from any thread with one engine, of which it must be the only user.

    Args:
        max_batch: maximum number of jobs that run together; 1 is one request at a time.
        max_queue: maximum number of jobs that wait.
        on_batch: called with the size and the seconds of each batch and of each step.
        shared_bytes: maximum of what is kept for requests about the same images.
        others: images in whose place a detailed answer is read again, see ``Engine.answer``.
    """

    def __init__(
        self,
        engine: Engine,
        max_batch: int = 32,
        max_queue: int = 128,
        on_batch: Callable[[int, float], None] = lambda size, seconds: None,
        shared_bytes: int = 128 << 20,
        others: Sequence[ImageInput] = (),
    ) -> None:
        self.engine = engine
        self._others = engine.encoded(engine.samples(list(others), "")) if others else []
        self.max_batch, self.max_queue, self.on_batch = max_batch, max_queue, on_batch
        self._shared = Shared(engine.encode, engine.read, shared_bytes)
        self._jobs: list[Job] = []
        self._changed = threading.Condition()
        self._closed = False
        self._taken: list[Job] = []
        self._rows: list[_Row] = []
        self._running = engine.running()
        self._can_join, self._is_half = engine.can_join, engine.is_half
        self._started = False  # since the last step
        self._held = 0  # steps for which jobs have waited for more rows to be free
        self._batches_from = 0.0  # when whole batches may run beside the rows
        self._gives_way = False  # others run between two passes of an explanation
        self._thread = threading.Thread(target=self._work, name="batcher", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        """Jobs in the queue."""
        return len(self._jobs)

    @property
    def alive(self) -> bool:
        """Whether the thread runs."""
        return self._thread.is_alive()

    def submit(self, job: Job) -> "Future[Any]":
        """Queue a job. Raises QueueFull, also once the batcher is closed."""
        with self._changed:
            self._drop_gone()  # the model's thread may be busy
            if self._closed or len(self._jobs) >= self.max_queue:
                raise QueueFull
            self._jobs.append(job)
            self._changed.notify()
        return job.future

    def close(self) -> None:
        """Answer waiting jobs, refuse new ones, and end the thread."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    def _work(self) -> None:
        try:
            while (jobs := self._next()) or self._rows:
                start, size = time.monotonic(), len(jobs) or len(self._rows)
                self._taken = jobs
                if jobs:
                    self._run(jobs)
                else:
                    self._step()
                self.on_batch(size, time.monotonic() - start)
        finally:  # after an error nobody answers those that wait
            with self._changed:
                self._closed = True
                for job in (*self._taken, *(row.job for row in self._rows), *self._jobs):
                    if not job.future.done():
                        job.future.set_exception(Ended("the model's thread has ended"))

    def _next(self) -> list[Job]:
        """The jobs to run or to start next; empty when there are none: then rows grow by a token,
        or the batcher is closed."""
        with self._changed:
            while True:
                self._drop_gone()
                waiting = len(self._jobs)
                if jobs := self._take():
                    return jobs
                if len(self._jobs) < waiting:  # those that were taken are cancelled
                    continue
                if self._rows or self._closed:
                    return []
                self._changed.wait()

    def _drop_gone(self) -> None:
        gone = [job for job in self._jobs if job.gone]
        self._jobs = [job for job in self._jobs if job not in gone]
        for job in gone:
            if job.future.set_running_or_notify_cancel():
                job.future.set_exception(TooLate())

    def _take(self) -> list[Job]:
        """Remove the oldest job that can run now, and those that can run with it, from the queue;
        none while rows have to grow first."""
        keys = [self._key(job) for job in self._jobs]
        free = self.max_batch - len(self._rows)
        if not self._pays(keys.count(JOINS), free):
            free = 0
        batches = not self._rows or time.monotonic() >= self._batches_from
        ready = [
            key
            for job, key in zip(self._jobs, keys, strict=True)
            if (free if key == JOINS else batches)
            and not (self._gives_way and job.explain is not None)
        ]
        if not ready:
            return []
        most = free if ready[0] == JOINS else self.max_batch
        pairs = zip(self._jobs, keys, strict=True)
        jobs = [job for job, key in pairs if key == ready[0]][:most]
        self._jobs = [job for job in self._jobs if job not in jobs]
        # a future that runs can no longer be cancelled
        return [job for job in jobs if job.future.set_running_or_notify_cancel()]

    def _key(self, job: Job) -> Hashable:
        """`JOINS`, or the key of the whole batch in which a job can run."""
        single = (job.decoding or self.engine.decoding).num_beams == 1
        # in half precision other rows may round a token, and a seed promises the same answer
        varies = job.is_repeatable and self._is_half
        return JOINS if self._can_join and job.answers and single and not varies else job.key

    def _give_way(self, seconds: float) -> None:
        """Let others run for some time, in the middle of a job; no other explanation, which would
        give way as well."""
        taken, until = self._taken, time.monotonic() + seconds
        self._gives_way = True
        try:
            while time.monotonic() < until:
                with self._changed:
                    self._drop_gone()
                    jobs = self._take()
                self._taken = [*taken, *jobs]
                if jobs:
                    self._run(jobs)
                elif self._rows:
                    self._step()
                else:
                    break
        finally:
            self._gives_way, self._taken = False, taken

    def _pays(self, waiting: int, free: int) -> bool:
        """Whether to start ``waiting`` jobs in ``free`` rows now.

        Several prompts cost less together than one by one: a few jobs wait until a quarter of the
        rows is free, for as many steps at most. Those that run take a step between two starts.
        """
        quarter = max(1, self.max_batch // 4)
        if self._rows and self._started:
            return False
        if not self._rows or free >= min(waiting, quarter) or self._held >= quarter:
            self._held = 0
            return True
        self._held += free > 0
        return False

    def _run(self, jobs: Sequence[Job]) -> None:
        """Run jobs as a batch, or start them; one that fails stops no other."""
        ready: list[Job] = []
        samples: list[Sample] = []
        for job in jobs:
            try:
                if job.drawing is None and job.texts is None:
                    samples.append(self._sample(job))
                ready.append(job)
            except Exception as error:
                job.future.set_exception(error)
        if ready and self._key(ready[0]) == JOINS:
            self._start(ready, samples)
        elif ready:
            start = time.monotonic()
            self._run_samples(ready, samples)
            self._batches_from = 2 * time.monotonic() - start

    def _sample(self, job: Job) -> Sample:
        """What the model reads; equal images have equal keys."""
        keys = tuple(
            hashlib.blake2b(pixels.contiguous().numpy().data).hexdigest() for pixels in job.pixels
        )
        return self.engine.sample(keys, job.pixels, job.instruction)

    def _start(self, jobs: Sequence[Job], samples: Sequence[Sample]) -> None:
        """Read the prompts of jobs, and let their answers grow beside those that run."""
        try:
            prompts = self._shared.prompts(samples)
        except Exception as error:
            if len(jobs) == 1:
                jobs[0].future.set_exception(error)
                return
            for job, sample in zip(jobs, samples, strict=True):
                self._start([job], [sample])
            return
        rows = []
        for job, sample in zip(jobs, samples, strict=True):
            decoding = job.decoding or self.engine.decoding
            if decoding.do_sample and job.seed is None:  # the same answer if it is sampled again
                job.seed = secrets.randbits(63)
            response = Response(decoding, self.engine.ends, job.seed or 0)
            is_read = job.is_read
            text = TextStream(self.engine.tokens, self.engine.ends) if is_read else None
            rows.append(_Row(job, sample, response, text))
        self._rows += rows
        self._started = True
        self._grow(rows, lambda: self._running.start(prompts, [row.response for row in rows]))

    def _step(self) -> None:
        """Let all answers that run grow by a token, without those that nobody waits for."""
        for row in self._rows:
            if row.job.gone:
                row.response.ended = True
                row.job.future.set_exception(TooLate())
        self._rows = [row for row in self._rows if not row.response.ended]
        self._started = False
        self._grow(self._rows, self._running.step)

    def _grow(self, rows: Sequence[_Row], grow: Callable[[], None]) -> None:
        """Call ``grow``, which adds a token to each of ``rows``, and resolve the futures of those
        that end. If it fails, all that run are answered one by one."""
        try:
            grow()
        except Exception:
            rows, self._rows, self._running = self._rows, [], self.engine.running()
            self._taken = [row.job for row in rows]
            for row in rows:
                row.job.restart()
                self._run_samples([row.job], [row.sample])
            return
        for row in rows:
            self._read(row)
        self._rows = [row for row in self._rows if not row.response.ended]
        if not self._rows:  # an idle server keeps no keys and values
            self._running = self.engine.running()

    def _read(self, row: _Row) -> None:
        """Send what is new of an answer, and resolve its future if it ends."""
        job, response, text = row.job, row.response, row.text
        if text is not None:
            for token in response.ids[len(text.ids) :]:
                _send(job, lambda token=token: text.add(token))
        response.ended = response.ended or job.stopped
        if not response.ended:
            return
        if text is not None and job.failure is None:
            _send(job, lambda: text.rest(response.ids), last=True)
        try:
            if job.failure is not None:
                raise job.failure
            sample = row.sample
            if job.details is not None:
                (sample,) = self._shared.with_features([sample])
            answer = self._answer(job, sample, response.ids, response.decoding)
        except Exception as error:
            job.future.set_exception(error)
        else:
            job.future.set_result(answer)

    def _run_samples(self, jobs: Sequence[Job], samples: Sequence[Sample]) -> None:
        try:
            results = self._results(jobs, samples)
        except InterruptedError:
            results = [TooLate()] * len(jobs)
        except Exception as error:
            if len(jobs) > 1:
                for job, sample in zip(jobs, samples, strict=True):
                    job.restart()
                    self._run_samples([job], [sample])
                return
            results = [error]
        for job, result in zip(jobs, results, strict=True):
            if isinstance(result, Exception):
                job.future.set_exception(result)
            else:
                job.future.set_result(result)

    def _results(self, jobs: Sequence[Job], samples: Sequence[Sample]) -> Sequence[Any]:
        """One result per job, an exception for one that failed.

        Raises InterruptedError once nobody waits for any of them.
        """
        engine, first = self.engine, jobs[0]

        def check_waiting() -> None:
            if all(job.gone for job in jobs):
                raise InterruptedError

        if first.drawing is not None:  # alone in its batch, see ``Job.key``
            text = Rendered.of(first.instruction).prompt
            return [engine.draw(text, **first.drawing, on_step=check_waiting)]
        if first.texts is not None:
            return [_embed(engine.embedder, first, first.texts)]
        if first.explain is not None:
            last = time.monotonic()

            def share() -> None:
                nonlocal last
                check_waiting()
                if first.explain == "occlusion":  # the others are short, and watch each pass
                    self._give_way(time.monotonic() - last)
                last = time.monotonic()

            return [engine.explain_sample(samples[0], first.explain, share)]
        samples = self._shared.with_features(samples)
        if first.look:
            return list(engine.look(samples))
        if first.candidates is not None:
            candidates = [job.candidates or () for job in jobs]
            return engine.rank_samples(samples, candidates, first.normalization, check_waiting)
        texts = [TextStream(engine.tokens, engine.ends) for _ in jobs]

        def on_tokens(tokens: list[int]) -> list[bool]:
            check_waiting()
            for job, text, token in zip(jobs, texts, tokens, strict=True):
                if not job.stopped:
                    _send(job, lambda text=text, token=token: text.add(token))
            return [job.stopped for job in jobs]

        decoding = first.decoding or engine.decoding
        with torch.random.fork_rng(enabled=first.seed is not None):
            if first.seed is not None:  # of a search it changes nothing
                torch.manual_seed(first.seed)
            responses = engine.respond(samples, decoding, on_tokens)
        for job, text, ids in zip(jobs, texts, responses, strict=True):
            if job.failure is None:
                _send(job, lambda text=text, ids=ids: text.rest(ids), last=True)
        return [
            job.failure or self._answer(job, sample, ids, decoding)
            for job, sample, ids in zip(jobs, samples, responses, strict=True)
        ]

    def _answer(self, job: Job, sample: Sample, ids: list[int], decoding: Decoding) -> Answer:
        engine = self.engine
        whole = engine.tokens.decode(ids)
        text = job.cut(whole)
        full = len(ids) >= decoding.max_new_tokens and text == whole
        details = None
        if job.details is not None:
            ended = text == whole and not full
            (details,) = engine.detail([sample], [ids], [ended], self._others, job.details)
        return Answer(
            text=text,
            prompt_tokens=len(sample.prompt_ids),
            lost=engine.lost_tokens(job.instruction),
            tokens=len(ids),
            finish_reason="length" if full else "stop",
            details=details,
        )


def _embed(embedder: Embedder, job: Job, texts: tuple[str, ...]) -> Embeddings:
    instruction = Rendered.of(job.instruction).prompt or None
    read = [*texts, *([instruction] * len(job.pixels) if instruction else ())]
    return Embeddings(
        embedder.embed(images=job.pixels, instruction=instruction) if job.pixels else None,
        embedder.embed(texts=texts) if texts else None,
        int(embedder.ids(read)[1].sum()) if read else 0,
    )


def _send(job: Job, read: Callable[[], str], last: bool = False) -> None:
    """Send the text that ``read`` returns. An error is the job's failure, not that of its batch."""
    try:
        job.send(read(), last)
    except Exception as error:
        job.failure, job.stopped = error, True
