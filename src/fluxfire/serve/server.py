"""The service as a process: its address taken early, and its end by signals."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import sys
import time

import uvicorn
from fastapi import FastAPI

from fluxfire.errors import FluxfireError
from fluxfire.serve.settings import Settings

_LAST_WORDS = 5  # seconds to write the last answers, at least
_GLANCE = 0.1  # seconds between looks whether to end at once
_PROBES = {"/health", "/ready", "/metrics"}


class Server(uvicorn.Server):
    """uvicorn, which lets the engine answer what it took, before connections are closed.

    A second Ctrl-C ends it at once: nothing is waited for, neither by it nor by its threads.
    """

    def __init__(self, app: FastAPI, drain_seconds: float) -> None:
        super().__init__(uvicorn.Config(app))
        self._app, self._drain_seconds = app, drain_seconds
        logging.getLogger("uvicorn.access").addFilter(_is_no_probe)

    def run(self, sockets: list[socket.socket] | None = None) -> None:
        """Serve until told to stop."""
        try:
            super().run(sockets)
        finally:
            if self.force_exit:
                sys.stderr.flush()
                os._exit(
                    128 + signal.SIGINT
                )  # or a thread that stores a picture would be waited for

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """End in order, unless told meanwhile to end at once."""
        ending = asyncio.create_task(self._end(sockets))
        while not ending.done() and not self.force_exit:
            await asyncio.wait({ending}, timeout=_GLANCE)
        if self.force_exit:
            self._app.state.engine.close()
            if answering := self.server_state.tasks:  # that nothing will come of it
                await asyncio.wait(answering, timeout=1.0)
            for connection in list(self.server_state.connections):
                connection.transport.abort()  # Python 3.12 and later wait for clients else
        await ending

    async def _end(self, sockets: list[socket.socket] | None) -> None:
        began = time.monotonic()
        await self._app.state.engine.drain(self._drain_seconds)
        left = self._drain_seconds - (time.monotonic() - began)
        self.config.timeout_graceful_shutdown = max(_LAST_WORDS, round(left))
        await super().shutdown(sockets)
        if self.force_exit:  # which uvicorn takes for a reason to leave all as it is
            await self.lifespan.shutdown()


def listening(settings: Settings) -> socket.socket:
    """Take the address, before a model is loaded for nothing.

    Args:
        settings: the service's.

    Raises:
        FluxfireError: it is taken, or none of this machine's.
    """
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    # Asyncio turns Nagle's algorithm, which delays answers by 40 ms, off where TCP is named.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((settings.host, settings.port))
        listener.listen(2048)
    except OSError as error:
        listener.close()
        raise FluxfireError(
            f"cannot listen on {settings.host}, port {settings.port}: {error.strerror or error}; "
            f"give another --port or --host"
        ) from error
    return listener


def _is_no_probe(record: logging.LogRecord) -> bool:
    """Whether a line of the access log is worth one: probes come every few seconds."""
    path = record.args[2] if isinstance(record.args, tuple) else ""
    return str(path).partition("?")[0] not in _PROBES
