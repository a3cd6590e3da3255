"""Who is kept out of a service that wants no keys: other machines, and pages of other sites."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from fluxfire.serve.problems import problem
from fluxfire.serve.refusing import Refused

_NAMES = ("localhost", "127.0.0.1", "[::1]")
_READING = ("GET", "HEAD", "OPTIONS")


class OnlyThisMachine:
    """ASGI middleware that serves programs of this machine, and the service's own page.

    A page elsewhere can have a browser on this machine send requests: by a name of its own that
    leads here (which the Host header shows), or to this address (which Origin shows; a browser
    lets it read no answer, but the edit would be made).
    """

    def __init__(self, app: ASGIApp, host: str, origins: Iterable[str]) -> None:
        self._app = app
        self._names = (*_NAMES, f"[{host}]" if ":" in host else host)
        self._origins = tuple(origins)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle a request, or refuse it."""
        refusal = self._refusal(scope) if scope["type"] == "http" else None
        if refusal is None:
            await self._app(scope, receive, send)
        else:
            await problem(refusal.status, refusal.code, str(refusal))(scope, receive, send)

    def _refusal(self, scope: Scope) -> Refused | None:
        headers = Headers(scope=scope)
        client, host = scope.get("client"), headers.get("host", "")
        if client is not None and not _is_here(client[0]):
            return Refused(
                f"{client[0]} is another machine, and this service has no keys: start it with some",
                status=403, code="keys-needed",
            )  # fmt: skip
        if _without_port(host).lower().rstrip(".") not in self._names:
            return Refused(
                "the Host header names none of this machine's own names",
                status=400, code="host-unknown",
            )  # fmt: skip
        if scope["method"] not in _READING and self._is_elsewhere(headers, host):
            return Refused(
                "the request comes from a page of another site; the service must be started with "
                "that site as an origin, or with keys",
                status=403, code="origin-not-allowed",
            )  # fmt: skip
        return None

    def _is_elsewhere(self, headers: Headers, host: str) -> bool:
        """Whether a page of another site asks; what is no browser names no origin."""
        origin = headers.get("origin")
        if origin is None:
            return headers.get("sec-fetch-site") == "cross-site"
        return origin not in self._origins and _site(origin) != host.lower()


def _site(origin: str) -> str | None:
    try:
        return urlsplit(origin).netloc.lower()
    except ValueError:  # such as http://[
        return None


def _is_here(address: str) -> bool:
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:  # a name, which only a caller within this process gives
        return True


def _without_port(host: str) -> str:
    return host if host.endswith("]") else host.rpartition(":")[0] or host
