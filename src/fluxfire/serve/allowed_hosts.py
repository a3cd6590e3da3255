"""Which hosts the service asks for untrusted clients, and at which addresses."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Sequence
from dataclasses import dataclass

import httpx

from fluxfire.errors import FluxfireError
from fluxfire.serve.errors import RefusedError

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
PORTS = {"http": 80, "https": 443}
QUOTED = 100
"""Most characters of a host in a message."""
_LONGEST_URL = 4096  # characters; signed links of object stores have up to about 2000
# Only a plain name may match a wildcard. An address with a zone ("2001:db8::1%.example.org") would
# match by its end.
_NAME = re.compile(r"[a-z0-9_-]+(\.[a-z0-9_-]+)*", re.ASCII)
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


def check_url(text: str, allowed: Sequence[str]) -> httpx.URL:
    """Parse a URL, and refuse it unless the allow-list has its host. It resolves no name.

    Args:
        text: the URL.
        allowed: the allow-list, as `read_allow_list` reads it.

    Raises:
        FetchRefusedError: the URL is malformed or not allowed.
    """
    return check_url_against(text, read_allow_list(allowed))


def check_url_against(text: str, origins: Sequence[Origin]) -> httpx.URL:
    """Do as `check_url`, with an allow-list that was read."""
    if not origins:
        raise not_allowed_error(
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
    if url.scheme not in PORTS or not host:
        raise _malformed_error("it does not begin with https:// and a host")
    if url.userinfo:
        raise _malformed_error("it has a user or a password in it")
    port = url.port or PORTS[url.scheme]
    if not any(origin.covers(url.scheme, host, port) for origin in origins):
        shown = f"{url.scheme}://{host[:QUOTED]}:{port}"
        raise not_allowed_error(
            f"images are not fetched from {shown}, which is not on the server's allow-list; send "
            "the image itself, or have the server's operator allow it"
        )
    return url


def _read_entry(entry: str) -> Origin:
    scheme, mark, rest = entry.partition("://")
    if not mark:
        scheme, rest = "https", entry
    try:
        url = httpx.URL(f"{scheme}://{rest}")
        host = url.raw_host.decode("ascii")
        plain = scheme in PORTS and not url.userinfo and url.raw_path == b"/"
        if plain and not url.fragment and _is_host(host.removeprefix("*.")):
            return Origin(scheme, host, url.port or PORTS[scheme])
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


def _malformed_error(reason: str) -> FetchRefusedError:
    return FetchRefusedError(
        f"the image's URL cannot be used: {reason}", status=400, code="image-url-invalid"
    )


def not_allowed_error(message: str) -> FetchRefusedError:
    """Return the error of a host or an address that the service does not ask."""
    return FetchRefusedError(message, status=403, code="image-url-not-allowed")
