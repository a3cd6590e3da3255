"""Prometheus metrics. Each service has its own registry."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from starlette.types import ASGIApp, Message, Receive, Scope, Send

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
            "fluxfire_edits", "Edits that ended, jobs included", ("outcome",), registry=registry
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
        self._ready = Gauge("fluxfire_ready", "Whether requests are taken", registry=registry)

    def count_response(self, route: str, status: int) -> None:
        """Count a response by route and status."""
        self._answers.labels(route, str(status)).inc()

    def count_failure(self, code: str) -> None:
        """Count an edit without a result, by the code of its error."""
        self._edits.labels(code).inc()

    def count_edit(self, answer: EditAnswer) -> None:
        """Record the seconds and steps of an edit."""
        self._edits.labels("done").inc()
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

    def text(self, engine: Engine) -> bytes:
        """Return all metrics as text, with the engine's current state."""
        self._waiting.set(engine.waiting)
        self._running.set(engine.running)
        self._ready.set(engine.state == "ready")
        return generate_latest(self._registry)


class MetricsMiddleware:
    """ASGI middleware that counts responses by route and status."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app, self._metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle a request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        status = 500  # until a response starts

        async def send_and_note(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, send_and_note)
        finally:
            route = scope.get("route")  # its path is a template without ids
            self._metrics.count_response(getattr(route, "path", "other"), status)
