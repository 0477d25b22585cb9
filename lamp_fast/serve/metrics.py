"""What a server counts, as Prometheus reads it."""

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest

CONTENT_TYPE = CONTENT_TYPE_LATEST

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256)


class Metrics:
    """Of one server.

    Args:
        waiting: how many pictures wait, asked when somebody looks.
        held: how many bytes of requests are held.
    """

    def __init__(self, waiting: Callable[[], float], held: Callable[[], float]) -> None:
        self._registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        self._requests = Counter(
            "lamp_requests", "Requests by path and status.", ("path", "status"), registry=registry
        )
        self._seconds = Histogram(
            "lamp_request_seconds",
            "From a request's head to its answer's.",
            ("path",),
            buckets=_SECONDS,
            registry=registry,
        )
        self._pictures = Counter(
            "lamp_pictures", "Pictures by what became of them.", ("outcome",), registry=registry
        )
        self._batches = Histogram(
            "lamp_batch_pictures", "Pictures a batch.", buckets=_SIZES, registry=registry
        )
        self._computing = Histogram(
            "lamp_batch_seconds", "Reading and computing a batch.", buckets=_SECONDS,
            registry=registry,
        )  # fmt: skip
        for name, about, look in (
            ("lamp_waiting_pictures", "Pictures that wait to be computed.", waiting),
            ("lamp_held_bytes", "Bytes that are reserved for requests.", held),
        ):
            Gauge(name, about, registry=registry).set_function(look)

    def request(self, path: str, status: int, seconds: float) -> None:
        """Count an answered request; ``path`` is one of the server's own."""
        self._requests.labels(path, str(status)).inc()
        self._seconds.labels(path).observe(seconds)

    def pictures(self, answered: int, unreadable: int) -> None:
        """Count what became of a request's pictures."""
        self._pictures.labels("answered").inc(answered)
        self._pictures.labels("unreadable").inc(unreadable)

    def batch(self, size: int, seconds: float) -> None:
        """Count a computed batch."""
        self._batches.observe(size)
        self._computing.observe(seconds)

    def text(self) -> bytes:
        """All of it, of :data:`CONTENT_TYPE`."""
        return generate_latest(self._registry)
