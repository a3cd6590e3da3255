"""Middleware that limits the size of request bodies."""

from __future__ import annotations

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fluxfire.serve.errors import RefusedError


class MaxBodySizeMiddleware:
    """ASGI middleware that refuses a body with more than `most` bytes, while it arrives."""

    def __init__(self, app: ASGIApp, most: int) -> None:
        self._app, self._most = app, most

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle a request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        left = self._most

        async def limited() -> Message:
            nonlocal left
            message = await receive()
            left -= len(message.get("body", b""))
            if left < 0 or _content_length(scope) > self._most:
                raise RefusedError(
                    f"the body has more than {self._most} bytes", status=413, code="body-too-large"
                )
            return message

        await self._app(scope, limited, send)


def _content_length(scope: Scope) -> int:
    """Return the body's Content-Length; 0 without one."""
    for name, value in scope["headers"]:
        if name == b"content-length" and value.isdigit():
            return int(value)
    return 0
