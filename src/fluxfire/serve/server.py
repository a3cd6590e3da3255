"""The server process: binds its address early, and shuts down on signals."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
import threading
import time

import uvicorn
from fastapi import FastAPI

from fluxfire.errors import FluxfireError
from fluxfire.serve import logs
from fluxfire.serve.connections import ConnectionGuard, most_connections
from fluxfire.serve.settings import Settings

_SHUTDOWN_SECONDS = 5  # at least, to write the last responses
_POLL_SECONDS = 0.1  # between checks for a second Ctrl-C
_BACKLOG = 64


class Server(uvicorn.Server):
    """A uvicorn server that drains the engine before it closes connections.

    A second Ctrl-C ends the process at once, without waiting for requests or threads.
    """

    def __init__(self, app: FastAPI, drain_seconds: float) -> None:
        # A short backlog: where descriptors run out, asyncio logs an error for each place in it.
        log_config = logs.config(app.state.settings.log_format)
        super().__init__(
            uvicorn.Config(app, backlog=_BACKLOG, log_config=log_config, access_log=False)
        )
        self._app, self._drain_seconds = app, drain_seconds
        self._guard: asyncio.Task[None] | None = None

    def run(self, sockets: list[socket.socket] | None = None) -> None:
        """Serve until a signal stops the server."""
        # A closed terminal and some supervisors send SIGHUP: it would end the process undrained.
        hangup = getattr(signal, "SIGHUP", None)
        if hangup is not None and threading.current_thread() is threading.main_thread():
            signal.signal(hangup, self.handle_exit)
        try:
            super().run(sockets)
        finally:
            if self.force_exit:
                sys.stderr.flush()
                # Python would wait for threads that still store pictures.
                os._exit(128 + signal.SIGINT)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start to listen, and to end connections that send no request."""
        await super().startup(sockets)
        seconds = self._app.state.settings.head_seconds
        guard = ConnectionGuard(self.server_state.connections, seconds, most_connections())
        self._guard = asyncio.create_task(guard.watch())

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Drain and shut down; after a second Ctrl-C, shut down at once."""
        if self._guard is not None:
            self._guard.cancel()
        ending = asyncio.create_task(self._drain_and_shut_down(sockets))
        while not ending.done() and not self.force_exit:
            await asyncio.wait({ending}, timeout=_POLL_SECONDS)
        if self.force_exit:
            self._app.state.engine.close()
            self._app.state.engine.kill_workers()
            if answering := self.server_state.tasks:  # they get a refusal and can send it
                await asyncio.wait(answering, timeout=1.0)
            for connection in list(self.server_state.connections):
                connection.transport.abort()  # else Python 3.12 and later wait for clients
        await ending

    async def _drain_and_shut_down(self, sockets: list[socket.socket] | None) -> None:
        began = time.monotonic()
        await self._app.state.engine.drain(self._drain_seconds)
        left = self._drain_seconds - (time.monotonic() - began)
        self.config.timeout_graceful_shutdown = max(_SHUTDOWN_SECONDS, round(left))
        await super().shutdown(sockets)
        if self.force_exit:  # then uvicorn skips the lifespan's shutdown
            await self.lifespan.shutdown()


def bind_socket(settings: Settings) -> socket.socket:
    """Bind the service's address, so that a conflict shows before the model is loaded.

    Args:
        settings: the service's settings.

    Raises:
        FluxfireError: another program uses the address, or this machine does not have it.
    """
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    # Only for IPPROTO_TCP does asyncio disable Nagle's algorithm, which delays responses by 40 ms.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((settings.host, settings.port))
        listener.listen(2048)
    except OSError as error:
        listener.close()
        raise FluxfireError(
            f"cannot listen on {settings.host}, port {settings.port}: {error.strerror or error}; "
            f"choose another --port or --host"
        ) from error
    return listener
