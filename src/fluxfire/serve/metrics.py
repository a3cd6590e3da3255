"""Prometheus metrics. Each service has its own registry."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from fluxfire.serve.engine import Engine
from fluxfire.serve.schema import EditAnswer

_SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100, 200, 400)
_PICTURES = (1, 2, 3, 4, 8, 16)


class Metrics:
    """The counters, histograms and gauges of one service."""

    def __init__(self) -> None:
        registry = self._registry = CollectorRegistry()
        self._answers = Counter(
            "fluxfire_requests", "Requests answered", ("route", "status"), registry=registry
        )
        self._phases = Histogram(
            "fluxfire_phase_seconds",
            "Seconds of an edit, by phase",
            ("phase",),
            buckets=_SECONDS,
            registry=registry,
        )
        self._edits = Counter(
            "fluxfire_edits",
            "Edits that ended, jobs included, by outcome and by the name of the key",
            ("outcome", "key"),
            registry=registry,
        )
        self._steps = Counter(
            "fluxfire_steps", "Denoising steps, by what was left out", ("kind",), registry=registry
        )
        self._batches = Histogram(
            "fluxfire_batch_pictures", "Pictures made at once", buckets=_PICTURES, registry=registry
        )
        self._restarts = Counter("fluxfire_worker_restarts", "Workers that died", registry=registry)
        self._waiting = Gauge(
            "fluxfire_requests_waiting", "Requests in the queue", registry=registry
        )
        self._running = Gauge(
            "fluxfire_requests_running", "Requests with the worker", registry=registry
        )
        self._store = Counter(
            "fluxfire_store_failures",
            "Failures of the store, by what it should do",
            ("action",),
            registry=registry,
        )
        self._webhooks = Counter(
            "fluxfire_webhooks", "Webhooks that ended", ("outcome",), registry=registry
        )
        self._gpu = Gauge(
            "fluxfire_gpu_memory_bytes",
            "Memory of the worker's GPU: allocated, reserved by torch, and total",
            ("kind",),
            registry=registry,
        )
        self._ready = Gauge("fluxfire_ready", "Whether requests are taken", registry=registry)

    def count_response(self, route: str, status: int) -> None:
        """Count a response by route and status."""
        self._answers.labels(route, str(status)).inc()

    def count_failure(self, code: str, owner: str | None) -> None:
        """Count an edit without a result, by the code of its error and the name of its key."""
        self._edits.labels(code, owner or "").inc()
        if code == "storage":
            self.count_store_failure("put")

    def count_store_failure(self, action: str) -> None:
        """Count a failure of the store to put, read or sweep pictures."""
        self._store.labels(action).inc()

    def count_webhook(self, outcome: str) -> None:
        """Count a webhook that was delivered, or given up."""
        self._webhooks.labels(outcome).inc()

    def count_edit(self, answer: EditAnswer, owner: str | None) -> None:
        """Record the seconds and steps of an edit, and the name of its key."""
        self._edits.labels("done", owner or "").inc()
        for phase, seconds in answer.timings:
            self._phases.labels(phase).observe(seconds)
        for kind in answer.steps:
            self._steps.labels(kind).inc()

    def count_batch(self, pictures: int, seconds: float) -> None:  # noqa: ARG002 - the engine passes both
        """Record the size of a batch."""
        self._batches.observe(pictures)

    def count_restart(self) -> None:
        """Count a worker's death."""
        self._restarts.inc()

    def text(self, engine: Engine, *, stores: bool = True) -> bytes:
        """Return all metrics as text, with the engine's current state.

        Args:
            engine: the service's engine.
            stores: whether the store takes pictures, or there is none.
        """
        self._waiting.set(engine.waiting)
        self._running.set(engine.running)
        self._ready.set(stores and engine.state == "ready")
        for kind, n in engine.gpu_bytes.items():
            self._gpu.labels(kind).set(n)
        return generate_latest(self._registry)
