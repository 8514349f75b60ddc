"""Counters of one server, in the format of Prometheus."""

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

BATCH_SIZES = (1, 2, 4, 8, 16, 32, 64)


class Metrics:
    """Each instance has its own registry: two applications in a process do not share counters."""

    def __init__(self, waiting: Callable[[], int]) -> None:
        self.registry = registry = CollectorRegistry()
        self._requests = Counter(
            "instructblip_requests", "Requests", ["route", "status"], registry=registry
        )
        self._seconds = Histogram(
            "instructblip_request_seconds", "Time of a request", ["route"], registry=registry
        )
        self._batch_size = Histogram(
            "instructblip_batch_size",
            "Requests answered together",
            buckets=BATCH_SIZES,
            registry=registry,
        )
        self._batch_seconds = Histogram(
            "instructblip_batch_seconds", "Time of a batch", registry=registry
        )
        queue = Gauge("instructblip_waiting", "Requests waiting", registry=registry)
        queue.set_function(waiting)
        self.tokens = Counter("instructblip_generated_tokens", "Tokens answered", registry=registry)

    def request(self, route: str, status: int, seconds: float) -> None:
        """Count a finished request; ``route`` is its pattern, never a path that a client made."""
        self._requests.labels(route, str(status)).inc()
        self._seconds.labels(route).observe(seconds)

    def batch(self, size: int, seconds: float) -> None:
        self._batch_size.observe(size)
        self._batch_seconds.observe(seconds)

    def text(self) -> bytes:
        return generate_latest(self.registry)
