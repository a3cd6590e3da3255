"""The service's log: what a line holds, and what it must not."""

from __future__ import annotations

import asyncio
import json
import logging

import pytest

pytest.importorskip("fastapi")

from fluxfire.serve import logs
from fluxfire.serve.logs import RequestLogMiddleware, request_id, trace_id


def ask(
    path="/files/a.png",
    *,
    query=b"signature=secret",
    sent_id=None,
    fails=False,
    trace=None,
    on_end=lambda route, status: None,
):
    """Send a request through the middleware; return the id in the response."""
    seen = []

    async def app(scope, receive, send):
        logging.getLogger("fluxfire.serve.test").warning("within")
        if fails:
            raise OSError("broken")
        await send({"type": "http.response.start", "status": 418, "headers": []})

    async def send(message):
        seen.append(dict(message["headers"])[b"x-request-id"].decode())

    headers = [] if sent_id is None else [(b"x-request-id", sent_id)]
    if trace is not None:
        headers.append((b"traceparent", trace))
    scope = {"type": "http", "method": "GET", "path": path, "query_string": query}
    asyncio.run(RequestLogMiddleware(app, on_end)({**scope, "headers": headers}, None, send))
    assert (request_id.get(), trace_id.get()) == (None, None)
    return seen[0]


@pytest.fixture
def lines():
    """Lines as the service writes them, in either format."""
    logger, made = logging.getLogger("fluxfire.serve"), []
    usual = logger.level

    def collect(formatter):
        handler = logging.Handler()
        handler.emit = lambda record: made.append(formatter().format(record))
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
        handlers.append(handler)
        return made

    handlers = []
    yield collect
    for handler in handlers:
        logger.removeHandler(handler)
    logger.setLevel(usual)  # this forgets, too, which records the logger would write


def test_a_request_has_one_id_in_its_lines_and_its_response(lines):
    made = lines(logs.JsonFormatter)
    name = ask()
    within, end = map(json.loads, made)
    assert within["request"] == end["request"] == name
    assert (end["method"], end["path"], end["status"]) == ("GET", "/files/a.png", 418)
    assert end["milliseconds"] >= 0
    assert "secret" not in str(made)
    assert ask() != name


def test_a_clients_own_id_is_kept_if_it_is_harmless():
    assert ask(sent_id=b"trace:1.a-b") == "trace:1.a-b"
    for odd in (b"two words", b"x" * 65, b"", b"a\nb", b"\xff"):
        assert ask(sent_id=odd).isalnum()


def test_probes_are_not_logged_and_failures_are(lines):
    made = lines(logs.TextFormatter)
    ask("/health")
    assert [line for line in made if "within" not in line] == []
    with pytest.raises(OSError, match="broken"):
        ask("/inference", fails=True)
    assert "'/inference' 500 in" in made[-1]
    assert made[-1].split()[1] == "INFO"


def test_lines_are_one_line_of_json_with_a_traceback(lines):
    made = lines(logs.JsonFormatter)
    try:
        int("odd\ntext")
    except ValueError:
        logging.getLogger("fluxfire.serve.test").exception("it failed\n")
    assert "\n" not in made[0]
    told = json.loads(made[0])
    assert "ValueError" in told["traceback"]
    assert "\n" in told["traceback"]
    assert told["request"] is None


TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"


@pytest.mark.parametrize("formatter", [logs.JsonFormatter, logs.TextFormatter])
def test_a_clients_trace_is_in_its_lines(lines, formatter):
    made = lines(formatter)
    ask(sent_id=b"a", trace=f"00-{TRACE}-00f067aa0ba902b7-01".encode())
    assert len(made) == 2
    for line in made:
        if formatter is logs.JsonFormatter:
            assert json.loads(line)["trace"] == TRACE
        else:
            assert line.split()[2] == f"a/{TRACE}"


def test_odd_traces_are_left_out(lines):
    made = lines(logs.JsonFormatter)
    for odd in (b"", b"00-xyz-00f067aa0ba902b7-01", TRACE.encode(), b"\xff" * 55):
        ask(trace=odd)
    assert {json.loads(line)["trace"] for line in made} == {None}


def test_each_end_is_reported_with_its_status():
    ends = []
    ask("/health", on_end=lambda *end: ends.append(end))
    with pytest.raises(OSError, match="broken"):
        ask(fails=True, on_end=lambda *end: ends.append(end))
    assert ends == [("other", 418), ("other", 500)]
