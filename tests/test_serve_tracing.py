"""Spans, by OpenTelemetry's exporter into memory."""

from __future__ import annotations

import asyncio
import subprocess
import sys

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("opentelemetry.sdk")

import httpx
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from fluxfire.serve import Settings, create_app, tracing
from fluxfire.serve import supervisor as supervisor_module
from fluxfire.serve.wire import Batch, Failed
from test_serve_schema import InstantWorker

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
SENT = {"traceparent": f"00-{TRACE}-{PARENT}-01"}
PHASES = ["decoding", "waiting", "edit", "encoding", "storing"]


@pytest.fixture(scope="module")
def exporter():
    provider, made = TracerProvider(), InMemorySpanExporter()
    provider.add_span_processor(SimpleSpanProcessor(made))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trace, "_TRACER_PROVIDER", provider)  # it can be set in public only once
        yield made


@pytest.fixture(autouse=True)
def _fresh(exporter, monkeypatch):
    exporter.clear()
    monkeypatch.setattr(supervisor_module, "WorkerProcess", InstantWorker)


def talk(story, **settings):
    """Let a story talk to an application in this process."""

    async def run():
        app = create_app(Settings(**settings))
        transport = httpx.ASGITransport(app=app, client=("127.0.0.1", 1))
        async with (
            app.router.lifespan_context(app),
            httpx.AsyncClient(transport=transport, base_url="http://localhost") as client,
        ):
            return await story(client)

    return asyncio.run(run())


def spans_of(exporter):
    """Each span by its name, and the names in the order in which they began."""
    found = sorted(exporter.get_finished_spans(), key=lambda span: (span.start_time, span.end_time))
    return {span.name: span for span in found}, [span.name for span in found]


def test_an_edit_has_a_span_for_each_phase_below_its_clients(exporter):

    async def story(client):
        asked = {"prompt": "x", "steps": 3}
        response = await client.post("/inference", json=asked, headers=SENT)
        await client.get("/health")
        return response

    response = talk(story)
    assert response.status_code == 200
    spans, names = spans_of(exporter)
    assert names == ["POST /inference", *PHASES]
    top = spans["POST /inference"]
    assert top.kind == trace.SpanKind.SERVER
    assert f"{top.parent.span_id:016x}" == PARENT
    assert {f"{span.context.trace_id:032x}" for span in spans.values()} == {TRACE}
    assert top.attributes["http.response.status_code"] == 200
    assert top.attributes["http.route"] == "/inference"
    assert top.attributes["fluxfire.request_id"] == response.headers["x-request-id"]
    before = 0
    for name in PHASES:
        span = spans[name]
        assert span.parent.span_id == top.context.span_id
        assert before <= span.start_time <= span.end_time
        before = span.end_time
    assert spans["edit"].attributes["fluxfire.steps"] == 3
    assert spans["edit"].attributes["fluxfire.tries"] == 1
    assert all("x" not in span.attributes.values() for span in spans.values())  # the prompt


def test_without_a_trace_of_the_client_one_begins(exporter, monkeypatch):
    known = []
    monkeypatch.setattr(InstantWorker, "send", fail)

    async def story(client):
        job = (await client.post("/jobs", json={"prompt": "x"})).json()
        async with client.stream("GET", f"/jobs/{job['id']}/events") as events:
            known.extend([line async for line in events.aiter_lines()])

    talk(story)
    spans, _ = spans_of(exporter)
    begun = spans["POST /jobs"]
    assert begun.parent is None
    assert "storing" not in spans
    for name in ("decoding", "waiting", "edit"):  # as far as it came
        assert spans[name].parent.span_id == begun.context.span_id
    assert "GET /jobs/{job_id}/events" in spans
    assert '"failed"' in known[-2]


def fail(self, message):
    if isinstance(message, Batch):
        self.heard(Failed("edit-failed", "RuntimeError"))


def test_a_failure_of_the_service_is_an_error(exporter, monkeypatch):
    monkeypatch.setattr(InstantWorker, "send", fail)

    async def story(client):
        assert (await client.post("/inference", json={"prompt": "x"})).status_code == 500
        assert (await client.post("/inference", json={})).status_code == 422

    talk(story)
    served = [span for span in exporter.get_finished_spans() if "/inference" in span.name]
    told = [(s.attributes["http.response.status_code"], s.status.status_code) for s in served]
    assert told == [(500, trace.StatusCode.ERROR), (422, trace.StatusCode.UNSET)]


def test_a_provider_of_the_users_own_stays(monkeypatch):
    mine = trace.get_tracer_provider()
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:9")
    tracing.configure()
    assert trace.get_tracer_provider() is mine


CONFIGURED = """
import sys
for name in sys.argv[1:]:
    sys.modules[name] = None
import logging
logging.basicConfig(format="%(message)s", stream=sys.stdout)
from fluxfire.serve import tracing
tracing.configure()
with tracing.request({b"x": b"y"}) as span:
    print(span.trace_id is not None)
tracing.record([tracing.Phase("edit", 1.0, 2.0)])
tracing.flush()
"""


@pytest.mark.parametrize(
    ("collector", "missing", "said"),
    [
        (False, (), ["False"]),
        (True, (), ["True"]),
        (False, ("opentelemetry",), ["False"]),
        (
            True,
            ("opentelemetry", "opentelemetry.sdk", "opentelemetry.exporter"),
            ["no spans are sent: ", "False"],
        ),
    ],
    ids=["not configured", "configured", "not installed", "configured, not installed"],
)
def test_spans_need_both_the_packages_and_a_collector(collector, missing, said, monkeypatch):
    monkeypatch.delenv("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", raising=False)
    monkeypatch.delenv("OTEL_EXPORTER_OTLP_ENDPOINT", raising=False)
    if collector:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "http://127.0.0.1:9/v1/traces")
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "1")
    command = [sys.executable, "-c", CONFIGURED, *missing]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    lines = [line for line in done.stdout.splitlines() if "127.0.0.1" not in line]
    assert len(lines) >= len(said)
    for line, start in zip(lines, said, strict=False):
        assert line.startswith(start)
    assert ('pip install "fluxfire[otel]"' in done.stdout) == (collector and bool(missing))
