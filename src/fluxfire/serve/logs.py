"""The service's log: a line for each request, with an id that every line about it has."""

from __future__ import annotations

import json
import logging
import re
import secrets
import time
from contextvars import ContextVar
from typing import Any, Literal

from starlette.types import ASGIApp, Message, Receive, Scope, Send

LogFormat = Literal["text", "json"]
request_id: ContextVar[str | None] = ContextVar("request_id", default=None)
"""The id of the request that this task works for. A job's is that of the request that began it."""

_log = logging.getLogger(__name__)
_ID = re.compile(rb"[\w.:-]{1,64}")
_HEADER = b"x-request-id"
_PROBES = {"/health", "/ready", "/metrics"}  # they come every few seconds
_FIELDS = ("method", "path", "status", "milliseconds")


class RequestLogMiddleware:
    """ASGI middleware that gives each request an id, and logs its end.

    A client may choose the id by the header X-Request-ID; each response has it. The line leaves the
    query out, since a stored picture's link is a secret.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle a request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        wanted = dict(scope["headers"]).get(_HEADER, b"")
        name = wanted.decode() if _ID.fullmatch(wanted) else secrets.token_hex(8)
        token, began, status = request_id.set(name), time.perf_counter(), 500

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = [*message.get("headers", ()), (_HEADER, name.encode())]
                message = {**message, "headers": headers}
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        finally:
            if scope["path"] not in _PROBES:
                milliseconds = round(1000 * (time.perf_counter() - began))
                facts = (scope["method"], scope["path"], status, milliseconds)
                fields = dict(zip(_FIELDS, facts, strict=True))
                _log.info("%s %r %d in %d ms", *facts, extra={"fields": fields})
            request_id.reset(token)


class TextFormatter(logging.Formatter):
    """Writes `2026-11-28T04:30:01.123 INFO 8f14e45fceea167a message`; a dash without a request."""

    def format(self, record: logging.LogRecord) -> str:
        """Return a record as text."""
        text = super().format(record)
        return f"{_time(record)} {record.levelname} {request_id.get() or '-'} {text}"


class JsonFormatter(logging.Formatter):
    """Writes a JSON object on one line: time, level, logger, request, message and their fields."""

    def format(self, record: logging.LogRecord) -> str:
        """Return a record as JSON."""
        facts = {
            "time": _time(record),
            "level": record.levelname,
            "logger": record.name,
            "request": request_id.get(),
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
