"""Middleware for a service without keys: refuses other machines and other sites' pages."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from fluxfire.serve.errors import RefusedError
from fluxfire.serve.problems import problem_response

_LOOPBACK_NAMES = ("localhost", "127.0.0.1", "[::1]")
_SAFE_METHODS = ("GET", "HEAD", "OPTIONS")


class LoopbackOnlyMiddleware:
    """ASGI middleware that serves only programs of this machine and the service's own page.

    Another site's page can make a browser on this machine send requests. It can use its own host
    name that resolves to this machine (the Host header shows that), or this machine's address (the
    Origin header shows that; the browser hides the response from the page, but the service would
    still edit).
    """

    def __init__(self, app: ASGIApp, host: str, origins: Iterable[str]) -> None:
        self._app = app
        self._names = (*_LOOPBACK_NAMES, f"[{host}]" if ":" in host else host)
        self._origins = tuple(origins)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle a request, or refuse it."""
        refusal = self._refusal(scope) if scope["type"] == "http" else None
        if refusal is None:
            await self._app(scope, receive, send)
        else:
            await problem_response(refusal.status, refusal.code, str(refusal))(scope, receive, send)

    def _refusal(self, scope: Scope) -> RefusedError | None:
        headers = Headers(scope=scope)
        client, host = scope.get("client"), headers.get("host", "")
        if client is not None and not _is_loopback(client[0]):
            return RefusedError(
                f"{client[0]} is another machine, and this service has no keys: start it with keys",
                status=403,
                code="keys-needed",
            )
        if _without_port(host).lower().rstrip(".") not in self._names:
            return RefusedError(
                "the Host header is not a name of this machine",
                status=400,
                code="host-unknown",
            )
        if scope["method"] not in _SAFE_METHODS and self._is_cross_site(headers, host):
            return RefusedError(
                "the request comes from a page of another site; start the service with "
                "that site as an origin, or with keys",
                status=403,
                code="origin-not-allowed",
            )
        return None

    def _is_cross_site(self, headers: Headers, host: str) -> bool:
        """Whether another site's page sent the request; programs send no Origin header."""
        origin = headers.get("origin")
        if origin is None:
            return headers.get("sec-fetch-site") == "cross-site"
        return origin not in self._origins and _site(origin) != host.lower()


def _site(origin: str) -> str | None:
    try:
        return urlsplit(origin).netloc.lower()
    except ValueError:  # for example "http://["
        return None


def _is_loopback(address: str) -> bool:
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:  # a name; only a caller within this process gives one
        return True


def _without_port(host: str) -> str:
    return host if host.endswith("]") else host.rpartition(":")[0] or host
