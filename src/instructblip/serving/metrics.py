"""Counters of one server, in the format of Prometheus."""

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest


class Metrics:
    """A registry of its own, so that two applications in one process do not share counters."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._requests = Counter(
            "instructblip_requests", "Requests", ["route", "status"], registry=self.registry
        )
        self._seconds = Histogram(
            "instructblip_request_seconds", "Time of a request", ["route"], registry=self.registry
        )
        self._batch_size = Histogram(
            "instructblip_batch_size",
            "Requests answered together",
            buckets=(1, 2, 4, 8, 16, 32, 64),
            registry=self.registry,
        )
        self._batch_seconds = Histogram(
            "instructblip_batch_seconds", "Time of a batch", registry=self.registry
        )
        self._waiting = Gauge("instructblip_waiting", "Requests waiting", registry=self.registry)
        self.tokens = Counter(
            "instructblip_generated_tokens", "Tokens answered", registry=self.registry
        )

    def request(self, route: str, status: int, seconds: float) -> None:
        """Count one finished request; ``route`` is its pattern, never a path that a client made."""
        self._requests.labels(route, str(status)).inc()
        self._seconds.labels(route).observe(seconds)

    def batch(self, size: int, seconds: float) -> None:
        self._batch_size.observe(size)
        self._batch_seconds.observe(seconds)

    def follow_queue(self, waiting: Callable[[], int]) -> None:
        self._waiting.set_function(waiting)

    def text(self) -> bytes:
        return generate_latest(self.registry)
