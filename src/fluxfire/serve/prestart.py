"""A web application that is started, and ready, before its server asks for it."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any, TypeAlias

from fluxfire.serve.deployment import DeploymentError

_READY_POLL = 0.2  # seconds
_OK = 200

Message: TypeAlias = MutableMapping[str, Any]
Receive: TypeAlias = Callable[[], Awaitable[Message]]
Send: TypeAlias = Callable[[Message], Awaitable[None]]
Web: TypeAlias = Callable[[Message, Receive, Send], Awaitable[None]]


class Started:
    """A web application that is started before its server asks for it.

    Modal starts one when a container is ready for requests; a worker that takes a minute to load
    is better started before, and waited for.
    """

    def __init__(self, web: Web) -> None:
        self._web = web
        self._state: dict[str, Any] = {}
        self._asked: asyncio.Queue[Message] = asyncio.Queue()
        self._answers: asyncio.Queue[Message] = asyncio.Queue()
        self._lifespan: asyncio.Future[None] | None = None

    async def start(self, seconds: float) -> None:
        """Start it, and wait until it is ready.

        Args:
            seconds: how long at most.

        Raises:
            DeploymentError: it cannot be started, or is not ready in time.
        """
        scope = {"type": "lifespan", "asgi": {"version": "3.0"}, "state": self._state}
        running = self._web(scope, self._asked.get, self._answers.put)
        self._lifespan = asyncio.ensure_future(running)
        status = None
        try:
            async with asyncio.timeout(seconds):
                await self._ask("startup")
                # Nothing in an ASGI application tells when it gets ready.
                while (status := await self._status("/ready")) != _OK:
                    if await self._status("/health") != _OK:
                        raise DeploymentError("the service cannot work; its log says why")
                    await asyncio.sleep(_READY_POLL)
        except TimeoutError:
            self._lifespan.cancel()
            raise DeploymentError(
                f"the service was not ready after {seconds:g} s (the last answer of /ready: "
                f"{status}); its log says what it waits for"
            ) from None

    async def stop(self) -> None:
        """Stop it, once its server is gone."""
        if self._lifespan is not None and not self._lifespan.done():
            await self._ask("shutdown")
            await self._lifespan

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Answer a request; to be started again, say that it was."""
        if scope["type"] != "lifespan":
            await self._web(
                {**scope, "state": {**scope.get("state", {}), **self._state}}, receive, send
            )
            return
        for what in ("startup", "shutdown"):
            await receive()
            await send({"type": f"lifespan.{what}.complete"})

    async def _ask(self, what: str) -> None:
        """Send an event, and wait for its answer."""
        await self._asked.put({"type": f"lifespan.{what}"})
        answer = await self._answers.get()
        if answer["type"] != f"lifespan.{what}.complete":
            raise DeploymentError(f"{what} failed: {answer.get('message') or 'no reason is given'}")

    async def _status(self, path: str) -> int:
        """Get a path of the application, within this process, and return the answer's status."""
        scope: Message = {
            "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "GET",
            "scheme": "http", "path": path, "raw_path": path.encode(), "root_path": "",
            "query_string": b"", "headers": [(b"host", b"localhost")],
            "client": ("127.0.0.1", 0), "server": ("127.0.0.1", 80), "state": self._state,
        }  # fmt: skip
        statuses: list[int] = []

        async def receive() -> Message:
            return {"type": "http.request", "body": b"", "more_body": False}

        async def send(message: Message) -> None:
            if message["type"] == "http.response.start":
                statuses.append(message["status"])

        await self._web(scope, receive, send)
        return statuses[0]
