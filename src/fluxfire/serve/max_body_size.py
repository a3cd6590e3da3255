"""Middleware that limits the size of request bodies."""

from __future__ import annotations

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fluxfire.serve.errors import RefusedError
from fluxfire.serve.problems import problem_response

_MOST_UNREAD = 2**16  # bytes that a connection may go on with
_MOST_AT_ONCE = 4


class MaxBodySizeMiddleware:
    """ASGI middleware that refuses a body with more than `most` bytes, while it arrives.

    A response that comes before the body's end closes the connection: the server would read the
    rest for as long as the client sends, although nobody wants it. All bodies that are arriving
    may have four times as many bytes together: they lie in memory before they have a place in the
    queue.
    """

    def __init__(self, app: ASGIApp, most: int) -> None:
        self._app, self._most = app, most
        self._arriving = 0  # bytes of all bodies whose end has not come yet

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle a request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        if {b"transfer-encoding", b"content-length"} <= dict(scope["headers"]).keys():
            # Two servers may see two different ends of this body, and take the rest of it for a
            # request of somebody else (RFC 9112, 6.1).
            answer = problem_response(
                400,
                "body-length-unclear",
                "the request has both Content-Length and Transfer-Encoding; send one of them",
                {"Connection": "close"},
            )
            await answer(scope, receive, send)
            return
        length = _content_length(scope)
        read, ended = 0, length == 0

        async def limited() -> Message:
            nonlocal read, ended
            too_large = RefusedError(
                f"the body has more than {self._most} bytes", status=413, code="body-too-large"
            )
            if length is not None and length > self._most:
                raise too_large  # before the server asks for the body by 100 Continue
            message = await receive()
            size = len(message.get("body", b""))
            read += size
            self._arriving += size
            if not ended and not message.get("more_body", False):
                ended = True
                self._arriving -= read
            if read > self._most:
                raise too_large
            if self._arriving > _MOST_AT_ONCE * self._most:
                raise RefusedError(
                    "too many large requests arrive at once; try again later",
                    status=429,
                    code="queue-full",
                )
            return message

        async def closing(message: Message) -> None:
            little = length is not None and length - read <= _MOST_UNREAD
            if message["type"] == "http.response.start" and not ended and not little:
                headers = [*message.get("headers", ()), (b"connection", b"close")]
                message = {**message, "headers": headers}
            await send(message)

        try:
            await self._app(scope, limited, closing)
        finally:
            if not ended:
                self._arriving -= read


def _content_length(scope: Scope) -> int | None:
    """Return the body's length in bytes: 0 without a body, None if only its end will tell."""
    headers = dict(scope["headers"])
    if b"transfer-encoding" in headers:
        return None
    value = headers.get(b"content-length", b"")
    return int(value) if value.isdigit() else 0
