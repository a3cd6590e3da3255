"""The service's log: a line for each request, with an id that every line about it has."""

from __future__ import annotations

import json
import logging
import re
import secrets
import time
from collections.abc import Callable
from contextlib import nullcontext
from contextvars import ContextVar
from typing import Any, Literal

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fluxfire.serve import tracing
from fluxfire.serve.tracing import RequestSpan

LogFormat = Literal["text", "json"]
request_id: ContextVar[str | None] = ContextVar("request_id", default=None)
"""The id of the request that this task works for. A job's is that of the request that began it."""
trace_id: ContextVar[str | None] = ContextVar("trace_id", default=None)
"""The trace that the client's traceparent names (W3C Trace Context), or that begins here."""

_log = logging.getLogger(__name__)
_ID = re.compile(rb"[\w.:-]{1,64}")
_HEADER = b"x-request-id"
_TRACEPARENT = re.compile(rb"[0-9a-f]{2}-([0-9a-f]{32})-[0-9a-f]{16}-[0-9a-f]{2}(-.*)?")
_PROBES = {"/health", "/ready", "/metrics"}  # they come every few seconds
_FIELDS = ("method", "path", "status", "milliseconds")


class RequestLogMiddleware:
    """ASGI middleware that gives each request an id, and logs and reports its end.

    A client may choose the id by the header X-Request-ID; each response has it. The line leaves the
    query out, since a stored picture's link is a secret.
    """

    def __init__(
        self,
        app: ASGIApp,
        on_end: Callable[[str, int], None] = lambda route, status: None,  # noqa: ARG005
    ) -> None:
        """Wrap an application.

        Args:
            app: the application.
            on_end: callback with the route and the status of each request that ended. A route is
                a path without ids, such as `/jobs/{job_id}`, or "other".
        """
        self._app, self._on_end = app, on_end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle a request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        sent = dict(scope["headers"])
        wanted = sent.get(_HEADER, b"")
        parent = _TRACEPARENT.fullmatch(sent.get(b"traceparent", b""))
        name = wanted.decode() if _ID.fullmatch(wanted) else secrets.token_hex(8)
        probe = scope["path"] in _PROBES
        began, status = time.perf_counter(), 500

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = [*message.get("headers", ()), (_HEADER, name.encode())]
                message = {**message, "headers": headers}
            await send(message)

        with nullcontext(RequestSpan()) if probe else tracing.request(sent) as span:
            trace = parent[1].decode() if parent else span.trace_id
            tokens = request_id.set(name), trace_id.set(trace)
            try:
                await self._app(scope, receive, send_with_id)
            finally:
                route = getattr(scope.get("route"), "path", "other")
                self._on_end(route, status)
                span.end(scope["method"], route, status, name)
                if not probe:
                    milliseconds = round(1000 * (time.perf_counter() - began))
                    facts = (scope["method"], scope["path"], status, milliseconds)
                    fields = dict(zip(_FIELDS, facts, strict=True))
                    _log.info("%s %r %d in %d ms", *facts, extra={"fields": fields})
                request_id.reset(tokens[0])
                trace_id.reset(tokens[1])


class TextFormatter(logging.Formatter):
    """Writes `2026-11-28T04:30:01.123Z INFO 8f14e45fceea167a message`.

    A dash stands for the id where there is no request. A trace follows the id after a slash.
    """

    def format(self, record: logging.LogRecord) -> str:
        """Return a record as text."""
        text = super().format(record)
        name, trace = request_id.get() or "-", trace_id.get()
        return f"{_time(record)} {record.levelname} {name}{f'/{trace}' if trace else ''} {text}"


class JsonFormatter(logging.Formatter):
    """Writes a JSON object on one line: time, level, logger, request, trace, message, fields."""

    def format(self, record: logging.LogRecord) -> str:
        """Return a record as JSON."""
        facts = {
            "time": _time(record),
            "level": record.levelname,
            "logger": record.name,
            "request": request_id.get(),
            "trace": trace_id.get(),
            "message": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            facts["traceback"] = self.formatException(record.exc_info)
        return json.dumps(facts, ensure_ascii=False)


def config(kind: LogFormat) -> dict[str, Any]:
    """Return the configuration of uvicorn's and fluxfire's logs, for `logging.config.dictConfig`.

    Args:
        kind: how a line is written.
    """
    formatter = TextFormatter if kind == "text" else JsonFormatter
    lines = {"handlers": ["stderr"], "level": "INFO"}
    return {
        "version": 1,
        "disable_existing_loggers": False,
        "formatters": {"lines": {"()": formatter}},
        "handlers": {
            "stderr": {
                "class": "logging.StreamHandler",
                "formatter": "lines",
                "stream": "ext://sys.stderr",
            }
        },
        "loggers": {"uvicorn": {**lines, "propagate": False}, "fluxfire.serve": lines},
    }


def _time(record: logging.LogRecord) -> str:
    """Return a record's time in UTC."""
    whole = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
    return f"{whole}.{int(record.msecs):03d}Z"
