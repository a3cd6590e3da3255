"""Pictures fetched by URL, for people who may not be trusted.

A server that fetches what it is told to can be told to fetch from inside its own network:
the cloud's metadata service, a neighbour's database, itself. So only hosts on an allow-list
are asked, and only at public addresses. A name is looked up once, and the connection goes to
the very address that was checked: a second look-up could give another one (DNS rebinding).
"""

from __future__ import annotations

import asyncio
import functools
import ipaddress
import re
import socket
import ssl
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

import httpx

from fluxfire._version import __version__
from fluxfire.errors import FluxfireError
from fluxfire.serve.refusing import Refused

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Resolver = Callable[[str, int], Awaitable[Sequence[str]]]
"""Looks a host's name up, for a port: its addresses, or an OSError."""

MOST_REDIRECTS = 3
_MOST_ADDRESSES = 4  # that are tried, one after the other
_LONGEST_URL = 4096  # characters; signed links of object stores have up to some 2000
_QUOTED = 100  # characters of a host in a message
_PORTS = {"http": 80, "https": 443}
# What reaches a resolver under a wildcard is a plain name: not an address with a zone
# ("2001:db8::1%.example.org"), which would end like one.
_NAME = re.compile(r"[a-z0-9_-]+(\.[a-z0-9_-]+)*", re.ASCII)
_REDIRECTS = frozenset({301, 302, 303, 307, 308})
# Of IPv6 only global unicast is public, which leaves out all that wraps an IPv4 address
# (mapped, compatible, NAT64) or stays local. In it, and in IPv4, these are not.
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


class FetchRefused(Refused):
    """A URL is malformed (400), not allowed (403), too large (413), or gives nothing (424)."""


@dataclass(frozen=True)
class Origin:
    """What one entry of an allow-list allows.

    Attributes:
        scheme: http or https.
        host: a name or an address; one that begins with "*." stands for all names below.
        port: the only one.
    """

    scheme: str
    host: str
    port: int

    def covers(self, scheme: str, host: str, port: int) -> bool:
        """Tell whether a URL with these is allowed."""
        if (scheme, port) != (self.scheme, self.port):
            return False
        if not self.host.startswith("*."):
            return host == self.host
        return host.endswith(self.host[1:]) and _NAME.fullmatch(host) is not None


def read_allow_list(entries: Sequence[str]) -> tuple[Origin, ...]:
    """Read an allow-list.

    Args:
        entries: each "host", "host:port" or either after "https://" or "http://", the former
            where neither stands; the host may begin with "*.", for all names below it.

    Raises:
        FluxfireError: an entry is none of these.
    """
    return tuple(_origin(entry.strip()) for entry in entries)


def is_public(address: Address) -> bool:
    """Tell whether an address is one of the public Internet, and surely nothing else."""
    if isinstance(address, ipaddress.IPv6Address):
        wide = address in _GLOBAL_UNICAST
    else:
        wide = address.is_global and not (address.is_multicast or address.is_reserved)
    return wide and not any(address in network for network in _NOT_PUBLIC)


async def look_up(host: str, port: int) -> Sequence[str]:
    """Look a host's addresses up as the system does."""
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
    """Fetch a file from a host that is allowed.

    At most `MOST_REDIRECTS` redirects are followed, each checked like the first URL. Proxies
    of the environment are not used: they would look names up on their own.

    Args:
        url: the file's URL.
        allowed: the allow-list, as `read_allow_list` reads it.
        max_bytes: how large the file may be.
        seconds: how long all of it may take, look-ups and redirects included.
        resolver: looks names up.
        public: which addresses may be connected to.
        tls: whose certificates to believe; by default those of certifi's list.

    Returns:
        The file's bytes.

    Raises:
        FetchRefused: it is not allowed, too large, or cannot be had.
        FluxfireError: the allow-list cannot be read.
    """
    origins = read_allow_list(allowed)
    tls = tls or _default_tls()
    target = url
    try:
        async with asyncio.timeout(seconds):
            for _ in range(MOST_REDIRECTS + 1):
                checked = _checked(target, origins)
                addresses = await _addresses(checked, resolver, public)
                answer = await _ask(checked, addresses, max_bytes, seconds, tls)
                if isinstance(answer, bytes):
                    return answer
                target = answer
    except TimeoutError:
        raise _failed(f"fetching the image took more than {seconds:g} seconds") from None
    raise _failed(f"the image's URL redirects more than {MOST_REDIRECTS} times")


def _origin(entry: str) -> Origin:
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
        '"images.example.org", "*.example.org" or "http://localhost:8000"'
    )


def _is_host(text: str) -> bool:
    return _NAME.fullmatch(text) is not None or _is_address(text)


def _is_address(text: str) -> bool:
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True


def _checked(text: str, origins: Sequence[Origin]) -> httpx.URL:
    """Read a URL, and refuse it unless the allow-list has its origin."""
    if not origins:
        raise _not_allowed(
            "this server fetches no images by URL, since its allow-list is empty; send the image "
            'itself, or have the server\'s operator allow its host, such as "images.example.org"'
        )
    if len(text) > _LONGEST_URL:
        raise _malformed(f"it has more than {_LONGEST_URL} characters")
    try:
        url = httpx.URL(text)
        host = url.raw_host.decode("ascii")
    except (httpx.InvalidURL, ValueError) as error:
        raise _malformed(str(error)) from None
    if url.scheme not in _PORTS or not host:
        raise _malformed("it does not begin with https:// and a host")
    if url.userinfo:
        raise _malformed("it has a user or a password in it")
    port = url.port or _PORTS[url.scheme]
    if not any(origin.covers(url.scheme, host, port) for origin in origins):
        shown = f"{url.scheme}://{host[:_QUOTED]}:{port}"
        raise _not_allowed(
            f"images are not fetched from {shown}, which is not on the server's allow-list; send "
            "the image itself, or have the server's operator allow it"
        )
    return url


async def _addresses(
    url: httpx.URL, resolver: Resolver, public: Callable[[Address], bool]
) -> list[Address]:
    """Look a URL's host up, and refuse it unless every address is public."""
    host = url.raw_host.decode("ascii")
    try:
        found = await resolver(host, url.port or _PORTS[url.scheme])
        addresses = [ipaddress.ip_address(address) for address in dict.fromkeys(found)]
    except TimeoutError:
        raise
    except (OSError, ValueError):  # Of a name that DNS cannot have: a UnicodeError.
        addresses = []
    if not addresses:
        raise _failed(f"the image's host {host[:_QUOTED]} has no address")
    # The address is not told: whoever asks need not learn how the network inside looks.
    if not all(public(address) for address in addresses):
        raise _not_allowed(
            f"the image's host {host[:_QUOTED]} has an address that is not public; images are "
            "fetched from the public Internet only"
        )
    return addresses[:_MOST_ADDRESSES]


async def _ask(
    url: httpx.URL, addresses: list[Address], max_bytes: int, seconds: float, tls: ssl.SSLContext
) -> bytes | str:
    """Ask the first address that can be connected to: for the file, or for where it is."""
    timeout = httpx.Timeout(seconds, connect=seconds / len(addresses))
    host = url.raw_host.decode("ascii")
    headers = {
        "Host": url.netloc.decode("ascii"),
        "Accept": "image/*",
        "Accept-Encoding": "identity",
        "User-Agent": f"fluxfire/{__version__}",
    }
    for address in addresses:
        # A client for each: none brings a cookie from one host to another.
        client = httpx.AsyncClient(verify=tls, trust_env=False, timeout=timeout)
        # The URL holds the address, so nothing is looked up any more; Host and TLS (both
        # the name asked for and the certificate's) keep the name.
        pinned = url.copy_with(host=str(address))
        names = {"sni_hostname": host}
        try:
            async with (
                client,
                client.stream("GET", pinned, headers=headers, extensions=names) as response,
            ):
                if response.status_code in _REDIRECTS:
                    return str(url.join(response.headers.get("Location", "")))
                return await _body(response, max_bytes)
        except (httpx.ConnectError, httpx.ConnectTimeout):
            continue
        except (httpx.HTTPError, httpx.InvalidURL, ValueError) as error:
            reason = type(error).__name__
            raise _failed(
                f"the image's host {host[:_QUOTED]} did not answer well ({reason})"
            ) from (None)
    raise _failed(f"the image's host {host[:_QUOTED]} cannot be connected to")


async def _body(response: httpx.Response, max_bytes: int) -> bytes:
    """Read a body as it comes, and stop where there is too much of it."""
    if response.status_code != httpx.codes.OK:
        raise _failed(f"the image's host answered with the status {response.status_code}")
    encoding = response.headers.get("Content-Encoding", "identity")
    if encoding.lower() != "identity":
        raise _failed(f"the image's host answered in the encoding {encoding[:_QUOTED]!r}")
    body = bytearray()
    # What Content-Length says only spares the reading; it may lie.
    told = int(response.headers.get("Content-Length", 0))
    if told <= max_bytes:
        async for part in response.aiter_raw():
            body += part
            if len(body) > max_bytes:
                break
        else:
            return bytes(body)
    raise FetchRefused(
        f"the image has more than {max_bytes} bytes; send a smaller one",
        status=413,
        code="image-too-large",
    )


@functools.cache
def _default_tls() -> ssl.SSLContext:
    # Once: reading all the certificates takes long enough to hold other requests up.
    return httpx.create_ssl_context(trust_env=False)


def _malformed(reason: str) -> FetchRefused:
    return FetchRefused(
        f"the image's URL cannot be used: {reason}", status=400, code="image-url-invalid"
    )


def _not_allowed(message: str) -> FetchRefused:
    return FetchRefused(message, status=403, code="image-url-not-allowed")


def _failed(message: str) -> FetchRefused:
    # Not 502 or 504: to load balancers these say that this very server is ill.
    return FetchRefused(message, status=424, code="image-url-failed")
