"""What the service counts, in Prometheus' format. Each service has a registry of its own."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fluxfire.serve.engine import Engine
from fluxfire.serve.schema import EditAnswer

_SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100)
_PICTURES = (1, 2, 3, 4, 8, 16)


class Metrics:
    """Counters and histograms."""

    def __init__(self) -> None:
        known = self._registry = CollectorRegistry()
        self._answers = Counter(
            "fluxfire_requests", "Requests answered", ("route", "status"), registry=known
        )
        self._phases = Histogram(
            "fluxfire_phase_seconds", "Seconds of an edit, by phase", ("phase",),
            buckets=_SECONDS, registry=known,
        )  # fmt: skip
        self._steps = Counter(
            "fluxfire_steps", "Denoising steps, by what was left out", ("kind",), registry=known
        )
        self._batches = Histogram(
            "fluxfire_batch_pictures", "Pictures made at once", buckets=_PICTURES, registry=known
        )
        self._restarts = Counter("fluxfire_worker_restarts", "Workers that died", registry=known)
        self._waiting = Gauge("fluxfire_requests_waiting", "Requests in the queue", registry=known)
        self._running = Gauge(
            "fluxfire_requests_running", "Requests with the worker", registry=known
        )
        self._ready = Gauge("fluxfire_ready", "Whether requests are taken", registry=known)

    def answered(self, route: str, status: int) -> None:
        """Count an answer."""
        self._answers.labels(route, str(status)).inc()

    def edited(self, answer: EditAnswer) -> None:
        """Count what an edit took."""
        for phase, seconds in answer.timings:
            self._phases.labels(phase).observe(seconds)
        for kind in answer.steps:
            self._steps.labels(kind).inc()

    def batch(self, pictures: int, seconds: float) -> None:  # noqa: ARG002 - as the engine tells
        """Count a batch."""
        self._batches.observe(pictures)

    def restarted(self) -> None:
        """Count a worker that died."""
        self._restarts.inc()

    def text(self, engine: Engine) -> bytes:
        """Write all of it, with what the engine is doing now."""
        self._waiting.set(engine.waiting)
        self._running.set(engine.running)
        self._ready.set(engine.state == "ready")
        return generate_latest(self._registry)


class Counted:
    """ASGI middleware that counts answers by route and status."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app, self._metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle a request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        status = 500  # unless an answer begins

        async def seen(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, seen)
        finally:
            route = scope.get("route")  # its own path, which has no ids in it
            self._metrics.answered(getattr(route, "path", "other"), status)
