"""A limit to how large a request's body may be, kept while it comes."""

from __future__ import annotations

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fluxfire.serve.refusing import Refused


class LimitedBodies:
    """ASGI middleware that lets no more than so many bytes of a body through."""

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
            if left < 0 or _announced(scope) > self._most:
                raise Refused(
                    f"the body has more than {self._most} bytes", status=413, code="body-too-large"
                )
            return message

        await self._app(scope, limited, send)


def _announced(scope: Scope) -> int:
    """The body's length as the client tells it; 0 if it does not."""
    for name, value in scope["headers"]:
        if name == b"content-length" and value.isdigit():
            return int(value)
    return 0
