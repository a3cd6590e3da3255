"""OpenTelemetry: a span for each request, and one for each phase of its edit.

Without OpenTelemetry, or where nobody has configured it, no span is recorded. A trace that the
client's traceparent names goes on here. A job's phases belong to the request that began it.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from fluxfire._version import __version__
from fluxfire.text import extra_hint

try:
    from opentelemetry import propagate, trace
except ImportError:
    trace = None

_log = logging.getLogger(__name__)
_ENDPOINTS = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
_SERVER_ERROR = 500
_FLUSH_MILLISECONDS = 5000


def configure() -> None:
    """Send spans to the collector that the environment names, if it names one.

    A script that has its own provider of spans keeps it.
    """
    if not any(map(os.environ.get, _ENDPOINTS)):
        return
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError as error:
        _log.warning("no spans are sent: %s is missing; %s", error.name, extra_hint("otel"))
        return
    if isinstance(trace.get_tracer_provider(), TracerProvider):
        return
    os.environ.setdefault("OTEL_SERVICE_NAME", "fluxfire")
    provider = TracerProvider()
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    trace.set_tracer_provider(provider)


def flush() -> None:
    """Send the spans that have ended. It may take seconds."""
    if trace is not None and (send := getattr(trace.get_tracer_provider(), "force_flush", None)):
        send(_FLUSH_MILLISECONDS)


class RequestSpan:
    """The span of an HTTP request.

    Attributes:
        trace_id: the trace's id in hexadecimal; None if no span is recorded.
    """

    def __init__(self, span: Any = None) -> None:
        self._span = span
        recorded = span is not None and span.is_recording()
        self.trace_id = f"{span.get_span_context().trace_id:032x}" if recorded else None

    def end(self, method: str, route: str, status: int, name: str) -> None:
        """Say how the request ended.

        Args:
            method: its method.
            route: its path without ids, or "other".
            status: the status of the response.
            name: the request's id.
        """
        if self._span is None:
            return
        self._span.update_name(f"{method} {route}")
        self._span.set_attributes(
            {
                "http.request.method": method,
                "http.route": route,
                "http.response.status_code": status,
                "fluxfire.request_id": name,
            }
        )
        if status >= _SERVER_ERROR:
            self._span.set_status(trace.StatusCode.ERROR)


@contextmanager
def request(headers: Mapping[bytes, bytes]) -> Iterator[RequestSpan]:
    """Record a request in a `with` block. It continues the trace that its headers name."""
    if trace is None:
        yield RequestSpan()
        return
    sent = {name.decode("latin-1"): value.decode("latin-1") for name, value in headers.items()}
    tracer = trace.get_tracer("fluxfire.serve", __version__)
    with tracer.start_as_current_span(
        "request", propagate.extract(sent), kind=trace.SpanKind.SERVER
    ) as span:
        yield RequestSpan(span)


@dataclass(frozen=True, slots=True)
class Phase:
    """A phase of an edit.

    Attributes:
        name: what it is called.
        began: when it began, as `time.perf_counter` counts.
        ended: when it ended.
        facts: what to know of it; None is left out.
    """

    name: str
    began: float
    ended: float
    facts: Mapping[str, str | float | None] = field(default_factory=dict)


def record(phases: Sequence[Phase]) -> None:
    """Record the phases of an edit that is over."""
    if trace is None:
        return
    offset = time.time() - time.perf_counter()
    tracer = trace.get_tracer("fluxfire.serve", __version__)
    for phase in phases:
        start, end = (int((moment + offset) * 1e9) for moment in (phase.began, phase.ended))
        span = tracer.start_span(phase.name, start_time=start)
        for fact, value in phase.facts.items():
            if value is not None:
                span.set_attribute(f"fluxfire.{fact}", value)
        span.end(end)
