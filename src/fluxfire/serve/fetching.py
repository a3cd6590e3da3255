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
import re
import socket
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass

import httpx

from fluxfire._version import __version__
from fluxfire.errors import FluxfireError
from fluxfire.serve.errors import RefusedError

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Resolver = Callable[[str, int], Awaitable[Sequence[str]]]
"""Resolves a host and a port to addresses, or raises OSError."""

MOST_REDIRECTS = 3
_MOST_ADDRESSES = 4  # tried one after the other
_LONGEST_URL = 4096  # characters; signed links of object stores have up to about 2000
_QUOTED = 100  # most characters of a host in a message
_PORTS = {"http": 80, "https": 443}
# Only a plain name may match a wildcard. An address with a zone ("2001:db8::1%.example.org") would
# match by its end.
_NAME = re.compile(r"[a-z0-9_-]+(\.[a-z0-9_-]+)*", re.ASCII)
_REDIRECTS = frozenset({301, 302, 303, 307, 308})
# In IPv6 only global unicast is public. That excludes local addresses, and addresses that wrap an
# IPv4 address (mapped, compatible, NAT64). The networks below are not public either.
_GLOBAL_UNICAST = ipaddress.IPv6Network("2000::/3")
_NOT_PUBLIC = tuple(
    ipaddress.ip_network(network)
    for network in (
        "192.0.0.0/24",  # protocol assignments
        "192.88.99.0/24",  # 6to4 relays
        "168.63.129.16/32",  # Azure's own services, seen only from inside
        "2001::/23",  # protocol assignments, Teredo among them
        "2001:db8::/32",  # documentation
        "2002::/16",  # 6to4, wraps an IPv4 address
        "3fff::/20",  # documentation
    )
)


class FetchRefusedError(RefusedError):
    """A URL is malformed (400), not allowed (403), too large (413) or cannot be fetched (424)."""


@dataclass(frozen=True)
class Origin:
    """One entry of an allow-list.

    Attributes:
        scheme: http or https.
        host: a name or an address; "*.example.org" matches all names below example.org.
        port: the port number.
    """

    scheme: str
    host: str
    port: int

    def covers(self, scheme: str, host: str, port: int) -> bool:
        """Return whether the entry allows a URL with this scheme, host and port."""
        if (scheme, port) != (self.scheme, self.port):
            return False
        if not self.host.startswith("*."):
            return host == self.host
        return host.endswith(self.host[1:]) and _NAME.fullmatch(host) is not None


def read_allow_list(entries: Sequence[str]) -> tuple[Origin, ...]:
    """Read an allow-list.

    Args:
        entries: each "host" or "host:port", after "https://" (the default) or "http://". The host
            may begin with "*." to match all names below it.

    Raises:
        FluxfireError: an entry has another form.
    """
    return tuple(_read_entry(entry.strip()) for entry in entries)


def is_public(address: Address) -> bool:
    """Return whether an address is certainly one of the public Internet."""
    if isinstance(address, ipaddress.IPv6Address):
        wide = address in _GLOBAL_UNICAST
    else:
        wide = address.is_global and not (address.is_multicast or address.is_reserved)
    return wide and not any(address in network for network in _NOT_PUBLIC)


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
                parsed = _check_url(target, origins)
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


def check_url(text: str, allowed: Sequence[str]) -> httpx.URL:
    """Parse a URL, and refuse it unless the allow-list has its host. It resolves no name.

    Args:
        text: the URL.
        allowed: the allow-list, as `read_allow_list` reads it.

    Raises:
        FetchRefusedError: the URL is malformed or not allowed.
    """
    return _check_url(text, read_allow_list(allowed))


def _read_entry(entry: str) -> Origin:
    scheme, mark, rest = entry.partition("://")
    if not mark:
        scheme, rest = "https", entry
    try:
        url = httpx.URL(f"{scheme}://{rest}")
        host = url.raw_host.decode("ascii")
        plain = scheme in _PORTS and not url.userinfo and url.raw_path == b"/"
        if plain and not url.fragment and _is_host(host.removeprefix("*.")):
            return Origin(scheme, host, url.port or _PORTS[scheme])
    except (httpx.InvalidURL, ValueError):
        pass
    raise FluxfireError(
        f"the allow-list of hosts has {entry!r}; an entry is a host such as "
        '"images.example.org", "*.example.org" or "http://images.example.org:8080"'
    )


def _is_host(text: str) -> bool:
    return _NAME.fullmatch(text) is not None or _is_address(text)


def _is_address(text: str) -> bool:
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True


def _check_url(text: str, origins: Sequence[Origin]) -> httpx.URL:
    """Parse a URL, and refuse it unless the allow-list has its origin."""
    if not origins:
        raise _not_allowed_error(
            "this server fetches no images by URL, since its allow-list is empty; send the image "
            'itself, or have the server\'s operator allow its host, such as "images.example.org"'
        )
    if len(text) > _LONGEST_URL:
        raise _malformed_error(f"it has more than {_LONGEST_URL} characters")
    try:
        url = httpx.URL(text)
        host = url.raw_host.decode("ascii")
    except (httpx.InvalidURL, ValueError) as error:
        raise _malformed_error(str(error)) from None
    if url.scheme not in _PORTS or not host:
        raise _malformed_error("it does not begin with https:// and a host")
    if url.userinfo:
        raise _malformed_error("it has a user or a password in it")
    port = url.port or _PORTS[url.scheme]
    if not any(origin.covers(url.scheme, host, port) for origin in origins):
        shown = f"{url.scheme}://{host[:_QUOTED]}:{port}"
        raise _not_allowed_error(
            f"images are not fetched from {shown}, which is not on the server's allow-list; send "
            "the image itself, or have the server's operator allow it"
        )
    return url


async def _look_up_public(
    url: httpx.URL, resolver: Resolver, public: Callable[[Address], bool]
) -> list[Address]:
    """Resolve a URL's host, and refuse it unless every address is public."""
    host = url.raw_host.decode("ascii")
    try:
        found = await resolver(host, url.port or _PORTS[url.scheme])
        addresses = [ipaddress.ip_address(address) for address in dict.fromkeys(found)]
    except TimeoutError:
        raise
    except (OSError, ValueError):  # a UnicodeError for a name that DNS cannot have
        addresses = []
    if not addresses:
        raise _failed_error(f"the image's host {host[:_QUOTED]} has no address")
    # The message leaves the address out, so that clients learn nothing about the network inside.
    if not all(public(address) for address in addresses):
        raise _not_allowed_error(
            f"the image's host {host[:_QUOTED]} has an address that is not public; images are "
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
                f"the image's host {host[:_QUOTED]} failed to answer ({reason})"
            ) from (None)
    raise _failed_error(f"the image's host {host[:_QUOTED]} cannot be connected to")


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
        raise _failed_error(f"the image's host answered in the encoding {encoding[:_QUOTED]!r}")
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


def _malformed_error(reason: str) -> FetchRefusedError:
    return FetchRefusedError(
        f"the image's URL cannot be used: {reason}", status=400, code="image-url-invalid"
    )


def _not_allowed_error(message: str) -> FetchRefusedError:
    return FetchRefusedError(message, status=403, code="image-url-not-allowed")


def _failed_error(message: str) -> FetchRefusedError:
    # Not 502 or 504: load balancers would take them for a failure of this server.
    return FetchRefusedError(message, status=424, code="image-url-failed")
