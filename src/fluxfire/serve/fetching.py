"""Fetches pictures by URL for untrusted clients.

A client could make the server fetch from inside its own network: the cloud's metadata service, a
database, the server itself (SSRF). So the server fetches only from hosts on an allow-list, and only
at public addresses. It resolves a name once and connects to the address that it checked: a second
look-up could return another address (DNS rebinding).
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import ipaddress
import socket
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence

import httpx

from fluxfire._version import __version__
from fluxfire.serve.allowed_hosts import (
    PORTS,
    QUOTED,
    Address,
    FetchRefusedError,
    check_url,
    check_url_against,
    is_public,
    not_allowed_error,
    read_allow_list,
)

Resolver = Callable[[str, int], Awaitable[Sequence[str]]]
"""Resolves a host and a port to addresses, or raises OSError."""

MOST_REDIRECTS = 3
_MOST_ADDRESSES = 4  # tried one after the other
_REDIRECTS = frozenset({301, 302, 303, 307, 308})


async def look_up(host: str, port: int) -> Sequence[str]:
    """Resolve a host with the system's resolver."""
    found = await asyncio.get_running_loop().getaddrinfo(
        host, port, type=socket.SOCK_STREAM, flags=socket.AI_ADDRCONFIG
    )
    return [str(entry[4][0]) for entry in found]


async def fetch(
    url: str,
    *,
    allowed: Sequence[str],
    max_bytes: int,
    seconds: float,
    resolver: Resolver = look_up,
    public: Callable[[Address], bool] = is_public,
    tls: ssl.SSLContext | None = None,
) -> bytes:
    """Fetch a file from an allowed host.

    It follows at most `MOST_REDIRECTS` redirects and checks each like the first URL. It ignores the
    environment's proxies, because they would resolve names themselves.

    Args:
        url: the file's URL.
        allowed: the allow-list, as `read_allow_list` reads it.
        max_bytes: the most bytes that the file may have.
        seconds: time limit for everything, including look-ups and redirects.
        resolver: resolves names.
        public: returns whether it may connect to an address.
        tls: the trusted certificates; certifi's list by default.

    Returns:
        The file's bytes.

    Raises:
        FetchRefusedError: the URL is not allowed, or its file is too large or cannot be fetched.
        FluxfireError: the allow-list cannot be read.
    """
    origins = read_allow_list(allowed)
    tls = tls or _default_tls()
    target = url
    try:
        async with asyncio.timeout(seconds):
            for _ in range(MOST_REDIRECTS + 1):
                parsed = check_url_against(target, origins)
                addresses = await _look_up_public(parsed, resolver, public)
                answer = await _request(parsed, addresses, max_bytes, seconds, tls)
                if isinstance(answer, bytes):
                    return answer
                target = answer
    except TimeoutError:
        raise _failed_error(f"fetching the image took more than {seconds:g} seconds") from None
    raise _failed_error(f"the image's URL redirects more than {MOST_REDIRECTS} times")


async def post(
    url: str,
    body: bytes,
    headers: Mapping[str, str],
    *,
    allowed: Sequence[str],
    seconds: float,
    resolver: Resolver = look_up,
    public: Callable[[Address], bool] = is_public,
    tls: ssl.SSLContext | None = None,
) -> int:
    """Post a body to an allowed host, under the rules of `fetch`, but follow no redirect.

    Args:
        url: where to post.
        body: what to post.
        headers: further headers.
        allowed: the allow-list, as `read_allow_list` reads it.
        seconds: time limit for everything.
        resolver: resolves names.
        public: returns whether it may connect to an address.
        tls: the trusted certificates; certifi's list by default.

    Returns:
        The status of the response.

    Raises:
        FetchRefusedError: the URL is not allowed, or its host cannot be reached.
    """
    parsed = check_url(url, allowed)
    try:
        async with asyncio.timeout(seconds):
            addresses = await _look_up_public(parsed, resolver, public)
            limits = httpx.Timeout(seconds, connect=seconds / len(addresses))
            for address in addresses:
                try:
                    async with _exchange(
                        "POST",
                        parsed,
                        address,
                        limits=limits,
                        tls=tls or _default_tls(),
                        headers=headers,
                        content=body,
                    ) as response:
                        return response.status_code
                except (httpx.ConnectError, httpx.ConnectTimeout):
                    continue
    except TimeoutError:
        raise _failed_error(f"the host took more than {seconds:g} seconds") from None
    except (httpx.HTTPError, httpx.InvalidURL, ValueError) as error:
        raise _failed_error(f"the host failed to answer ({type(error).__name__})") from None
    raise _failed_error("the host cannot be connected to")


async def _look_up_public(
    url: httpx.URL, resolver: Resolver, public: Callable[[Address], bool]
) -> list[Address]:
    """Resolve a URL's host, and refuse it unless every address is public."""
    host = url.raw_host.decode("ascii")
    try:
        found = await resolver(host, url.port or PORTS[url.scheme])
        addresses = [ipaddress.ip_address(address) for address in dict.fromkeys(found)]
    except TimeoutError:
        raise
    except (OSError, ValueError):  # a UnicodeError for a name that DNS cannot have
        addresses = []
    if not addresses:
        raise _failed_error(f"the image's host {host[:QUOTED]} has no address")
    # The message leaves the address out, so that clients learn nothing about the network inside.
    if not all(public(address) for address in addresses):
        raise not_allowed_error(
            f"the image's host {host[:QUOTED]} has an address that is not public; images are "
            "fetched from the public Internet only"
        )
    return addresses[:_MOST_ADDRESSES]


async def _request(
    url: httpx.URL, addresses: list[Address], max_bytes: int, seconds: float, tls: ssl.SSLContext
) -> bytes | str:
    """Request the URL from the first reachable address; return the file, or a redirect's URL."""
    limits = httpx.Timeout(seconds, connect=seconds / len(addresses))
    host = url.raw_host.decode("ascii")
    headers = {"Accept": "image/*", "Accept-Encoding": "identity"}
    for address in addresses:
        try:
            async with _exchange(
                "GET", url, address, limits=limits, tls=tls, headers=headers
            ) as response:
                if response.status_code in _REDIRECTS:
                    return str(url.join(response.headers.get("Location", "")))
                return await _body(response, max_bytes)
        except (httpx.ConnectError, httpx.ConnectTimeout):
            continue
        except (httpx.HTTPError, httpx.InvalidURL, ValueError) as error:
            reason = type(error).__name__
            raise _failed_error(
                f"the image's host {host[:QUOTED]} failed to answer ({reason})"
            ) from (None)
    raise _failed_error(f"the image's host {host[:QUOTED]} cannot be connected to")


@contextlib.asynccontextmanager
async def _exchange(
    method: str,
    url: httpx.URL,
    address: Address,
    *,
    limits: httpx.Timeout,
    tls: ssl.SSLContext,
    headers: Mapping[str, str],
    content: bytes | None = None,
) -> AsyncIterator[httpx.Response]:
    """Send one request to one address, and yield the response."""
    named = {"Host": url.netloc.decode("ascii"), "User-Agent": f"fluxfire/{__version__}"}
    # The URL has the address, so nothing resolves the name again. The Host header and TLS (SNI and
    # the certificate check) use the name.
    pinned = url.copy_with(host=str(address))
    names = {"sni_hostname": url.raw_host.decode("ascii")}
    # A new client for each request, so that no cookie goes from one host to another.
    async with (
        httpx.AsyncClient(verify=tls, trust_env=False, timeout=limits) as client,
        client.stream(
            method, pinned, headers={**headers, **named}, content=content, extensions=names
        ) as response,
    ):
        yield response


async def _body(response: httpx.Response, max_bytes: int) -> bytes:
    """Read a body piece by piece, and stop when it has too many bytes."""
    if response.status_code != httpx.codes.OK:
        raise _failed_error(f"the image's host answered with the status {response.status_code}")
    encoding = response.headers.get("Content-Encoding", "identity")
    if encoding.lower() != "identity":
        raise _failed_error(f"the image's host answered in the encoding {encoding[:QUOTED]!r}")
    body = bytearray()
    # Content-Length may be wrong. If it is too large, this refuses the file without reading it.
    announced = int(response.headers.get("Content-Length", 0))
    if announced <= max_bytes:
        async for part in response.aiter_raw():
            body += part
            if len(body) > max_bytes:
                break
        else:
            return bytes(body)
    raise FetchRefusedError(
        f"the image has more than {max_bytes} bytes; send a smaller one",
        status=413,
        code="image-too-large",
    )


@functools.cache
def _default_tls() -> ssl.SSLContext:
    # Cached, because reading all certificates takes long enough to delay other requests.
    return httpx.create_ssl_context(trust_env=False)


def _failed_error(message: str) -> FetchRefusedError:
    # Not 502 or 504: load balancers would take them for a failure of this server.
    return FetchRefusedError(message, status=424, code="image-url-failed")
