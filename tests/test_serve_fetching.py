"""Pictures by URL: what is refused, and that a connection goes only where it was checked.

In these tests 127.0.0.1 plays a public address and 127.0.0.2 a private one.
"""

from __future__ import annotations

import asyncio
import gzip
import ipaddress
import re
import socket
import ssl
from contextlib import asynccontextmanager

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("httpx")

import idle_loop
from fluxfire.errors import FluxfireError
from fluxfire.serve import fetching
from fluxfire.serve.allowed_hosts import FetchRefusedError, is_public, read_allow_list
from fluxfire.serve.fetching import fetch, look_up

PUBLIC, PRIVATE = "127.0.0.1", "127.0.0.2"
PICTURE = b"\x89PNG " + bytes(range(256))


def answer(body=PICTURE, status="200 OK", **headers):
    """A whole answer of HTTP; with a length unless told otherwise."""
    given_headers = {"Content-Length": len(body), "Connection": "close"} | {
        key.replace("_", "-"): value for key, value in headers.items()
    }
    lines = [f"{key}: {value}" for key, value in given_headers.items() if value is not None]
    return "\r\n".join([f"HTTP/1.1 {status}", *lines, "", ""]).encode() + body


def redirect(where, status=302):
    return answer(b"", f"{status} Elsewhere", Location=where)


class Web:
    """Servers on both addresses of one port, with an answer for each path and a log."""

    def __init__(self):
        self.answers = {}
        self.requests = []
        self.asked_names = []
        self.records = {"example.org": [[PUBLIC]]}
        self.port = 0

    async def resolver(self, host, port):
        """Give a name's next record, and its last one ever after."""
        self.asked_names.append(host)
        records = self.records.get(host)
        if records is None:
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return records.pop(0) if len(records) > 1 else records[0]

    @staticmethod
    def public(address):
        return str(address) == PUBLIC

    async def _serve(self, reader, writer):
        try:
            head = (await reader.readuntil(b"\r\n\r\n")).decode()
            address = writer.get_extra_info("sockname")[0]
            path = head.split()[1]
            self.requests.append((address, path, head))
            what = self.answers[path]
            if callable(what):
                await what(writer)
            else:
                writer.write(what)
                await writer.drain()
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()

    @asynccontextmanager
    async def running(self, tls=None):
        first = await asyncio.start_server(self._serve, PUBLIC, 0, ssl=tls)
        self.port = first.sockets[0].getsockname()[1]
        second = await asyncio.start_server(self._serve, PRIVATE, self.port, ssl=tls)
        try:
            yield self
        finally:
            first.close()
            second.close()

    async def fetch(self, path, host="example.org", scheme="http", **options):
        known = {
            "allowed": [f"{scheme}://example.org:{self.port}"],
            "max_bytes": 1000,
            "seconds": 5,
            "resolver": self.resolver,
            "public": self.public,
        }
        return await fetch(f"{scheme}://{host}:{self.port}{path}", **known | options)


def run(test, answers=(), records=(), tls=None):
    """Run `test(web)` while the servers answer."""

    async def main():
        web = Web()
        web.answers |= dict(answers)
        web.records |= dict(records)
        async with web.running(tls):
            return await test(web), web

    return idle_loop.run(asyncio.wait_for(main(), 3600), network=0.1)


def refused(test, answers=(), records=()):
    """Run `test(web)`, which must be refused: why, and what the servers saw."""

    async def expected(web):
        with pytest.raises(FetchRefusedError) as caught:
            await test(web)
        return caught.value

    return run(expected, answers, records)


def refused_without_network(url, allowed, **options):
    async def no_lookup(host, port):
        pytest.fail(f"{host} was looked up")

    options = {"max_bytes": 10, "seconds": 5, "resolver": no_lookup} | options
    with pytest.raises(FetchRefusedError) as caught:
        asyncio.run(fetch(url, allowed=allowed, **options))
    return caught.value


def test_fetches_what_is_allowed_and_asks_plainly(monkeypatch):
    monkeypatch.setenv("HTTP_PROXY", f"http://{PRIVATE}:1")
    monkeypatch.setenv("ALL_PROXY", f"http://{PRIVATE}:1")
    body, web = run(lambda web: web.fetch("/a.png?b=1"), {"/a.png?b=1": answer()})
    assert body == PICTURE
    ((address, _, head),) = web.requests
    headers = dict(line.split(": ", 1) for line in head.strip().split("\r\n")[1:])
    assert address == PUBLIC
    assert headers["Host"] == f"example.org:{web.port}"
    assert headers["Accept-Encoding"] == "identity"
    assert headers["User-Agent"].startswith("fluxfire/")
    assert not {"Cookie", "Authorization", "Referer"} & headers.keys()


@pytest.mark.parametrize(
    ("address", "public"),
    [
        ("8.8.8.8", True),
        ("2606:4700::1111", True),
        ("2001:4860:4860::8888", True),
        ("0.0.0.0", False),
        ("10.1.2.3", False),
        ("100.64.0.1", False),  # carrier-grade NAT
        ("127.0.0.1", False),
        ("169.254.169.254", False),  # metadata of clouds
        ("168.63.129.16", False),
        ("172.16.0.1", False),
        ("172.31.255.255", False),
        ("192.0.0.9", False),
        ("192.0.2.1", False),
        ("192.88.99.1", False),
        ("192.168.0.1", False),
        ("198.18.0.1", False),
        ("203.0.113.1", False),
        ("224.0.0.1", False),
        ("240.0.0.1", False),
        ("255.255.255.255", False),
        ("::", False),
        ("::1", False),
        ("::ffff:8.8.8.8", False),
        ("::ffff:127.0.0.1", False),
        ("::8.8.8.8", False),
        ("64:ff9b::8.8.8.8", False),  # NAT64
        ("64:ff9b:1::1", False),
        ("100::1", False),
        ("2001::1", False),  # Teredo
        ("2001:db8::1", False),
        ("2002:808:808::1", False),  # 6to4
        ("3fff::1", False),
        ("4000::1", False),
        ("fc00::1", False),
        ("fd00:ec2::254", False),
        ("fe80::1", False),
        ("fe80::1%eth0", False),
        ("fec0::1", False),
        ("ff02::1", False),
        ("ff0e::1", False),
    ],
)
def test_which_addresses_are_public(address, public):
    assert is_public(ipaddress.ip_address(address)) is public


@given(st.ip_addresses())
def test_what_python_calls_private_is_never_public(address):
    if not address.is_global or address.is_multicast or address.is_reserved:
        assert not is_public(address)


@settings(deadline=None)
@given(st.ip_addresses(v=4), st.sampled_from(["::ffff:0:0", "::", "64:ff9b::", "64:ff9b:1::"]))
def test_no_wrapped_address_is_public(address, around):
    assert not is_public(ipaddress.IPv6Address(int(ipaddress.IPv6Address(around)) | int(address)))


@pytest.mark.parametrize(
    ("url", "allowed"),
    [
        ("https://example.org/x", ["example.com"]),
        ("https://example.org/x", ["http://example.org"]),
        ("http://example.org/x", ["example.org"]),
        ("https://example.org:8443/x", ["example.org"]),
        ("https://example.org/x", ["example.org:8443"]),
        ("https://example.org./x", ["example.org"]),
        ("https://sub.example.org/x", ["example.org"]),
        ("https://example.org/x", ["*.example.org"]),
        ("https://badexample.org/x", ["*.example.org"]),
        ("https://example.org.evil.com/x", ["example.org", "*.example.org"]),
        ("https://evil.com/example.org", ["example.org"]),
        ("https://evil.com\\.example.org/x", ["*.example.org"]),
        ("https://1.1.1.1%00.example.org/x", ["*.example.org"]),
        ("https://[2001:db8::1%25x.example.org]/x", ["*.example.org"]),
        ("https://a b.example.org/x", ["*.example.org"]),
        ("https://xn--exmple-cua.org/", ["example.org"]),
    ],
)
def test_other_origins_are_refused_before_any_lookup(url, allowed):
    error = refused_without_network(url, allowed)
    assert (error.status, error.code) in {
        (403, "image-url-not-allowed"),
        (400, "image-url-invalid"),
    }


def test_an_empty_list_refuses_everything_and_says_how_to_allow():
    error = refused_without_network("https://example.org/x", [])
    assert (error.status, error.code) == (403, "image-url-not-allowed")
    assert "allow-list is empty" in str(error)
    assert '"images.example.org"' in str(error)


@pytest.mark.parametrize(
    "url",
    [
        "",
        "example.org/x",
        "//example.org/x",
        "file:///etc/passwd",
        "ftp://example.org/x",
        "gopher://example.org/",
        "data:image/png;base64,AAAA",
        "https:///x",
        "https://",
        "https://user@example.org/x",
        "https://user:hidden@example.org/x",
        "https://exam\nple.org/",
        "https://example.org:port/",
        "https://[::1/x",
        "https://example.org/" + "x" * 5000,
    ],
)
def test_malformed_urls_are_refused(url):
    error = refused_without_network(url, ["example.org"])
    assert (error.status, error.code) == (400, "image-url-invalid")
    assert "hidden" not in str(error)


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(["", "https://", "http://", "https://example.org"]), st.text())
def test_any_text_is_fetched_or_refused(head, tail):
    async def nowhere(host, port):
        assert host == "example.org"
        raise OSError("no network here")

    with pytest.raises(FetchRefusedError):
        asyncio.run(
            fetch(head + tail, allowed=["example.org"], max_bytes=9, seconds=5, resolver=nowhere)
        )


@pytest.mark.parametrize(
    ("entry", "covered", "others"),
    [
        ("example.org", ("https", "example.org", 443), ("http", "example.org", 80)),
        ("Example.ORG:8443", ("https", "example.org", 8443), ("https", "example.org", 443)),
        ("http://example.org", ("http", "example.org", 80), ("https", "example.org", 443)),
        ("*.example.org", ("https", "a.b.example.org", 443), ("https", "example.org", 443)),
        ("http://*.example.org:81", ("http", "a.example.org", 81), ("http", "a.example.org", 80)),
        (" https://exämple.org ", ("https", "xn--exmple-cua.org", 443), ("https", "exmple", 443)),
        ("[2606:4700::1111]:444", ("https", "2606:4700::1111", 444), ("https", "1.1.1.1", 444)),
    ],
)
def test_entries_of_the_allow_list(entry, covered, others):
    (origin,) = read_allow_list([entry])
    assert origin.covers(*covered)
    assert not origin.covers(*others)


@pytest.mark.parametrize(
    "entry",
    [
        "",
        "*",
        "*.",
        "a*.org",
        "ftp://example.org",
        "example.org/path",
        "u@example.org",
        "a b.org",
        "example.org?x",
        "example.org#x",
        "example.org:x",
        "https://",
        "a.*.org",
    ],
)
def test_other_entries_are_errors(entry):
    with pytest.raises(FluxfireError, match="the allow-list of hosts has") as caught:
        read_allow_list([entry])
    recommended = re.findall('"(.+?)"', str(caught.value))
    for origin in read_allow_list(recommended):
        assert origin.host.endswith("example.org")  # and no host inside, which is never fetched
    assert len(recommended) == 3


@pytest.mark.parametrize("addresses", [[PRIVATE], [PUBLIC, PRIVATE], [PRIVATE, PUBLIC], ["::1"]])
def test_every_address_must_be_public(addresses):
    error, web = refused(lambda web: web.fetch("/"), {"/": answer()}, {"example.org": [addresses]})
    assert (error.status, error.code) == (403, "image-url-not-allowed")
    assert PRIVATE not in str(error)
    assert web.requests == []


def test_the_real_check_refuses_loopback():
    error, web = refused(lambda web: web.fetch("/", public=is_public), {"/": answer()})
    assert error.code == "image-url-not-allowed"
    assert web.requests == []


@pytest.mark.parametrize("host", ["127.0.0.1", "2130706433", "0x7f.1", "localhost"])
def test_the_systems_lookup_knows_loopback_in_any_spelling(host):
    error = refused_without_network(f"https://{host}/", [host], resolver=look_up)
    assert error.code == "image-url-not-allowed"
    assert "not public" in str(error)


@pytest.mark.parametrize("addresses", [[], None])
def test_names_without_addresses(addresses):
    records = {"example.org": None if addresses is None else [addresses]}
    error, _ = refused(lambda web: web.fetch("/"), records=records)
    assert (error.status, error.code) == (424, "image-url-failed")
    assert "has no address" in str(error)


def test_names_that_dns_cannot_have():
    name = "a" * 70 + ".example.org"
    error = refused_without_network(f"https://{name}/", ["*.example.org"], resolver=look_up)
    assert "has no address" in str(error)


def test_rebinding_a_name_changes_nothing(monkeypatch):
    # The name leads to a private address as soon as it was looked up once.
    looked_up = []
    real = socket.getaddrinfo
    monkeypatch.setattr(
        socket, "getaddrinfo", lambda host, *a, **k: looked_up.append(host) or real(host, *a, **k)
    )
    records = {"example.org": [[PUBLIC], [PRIVATE]]}
    body, web = run(lambda web: web.fetch("/"), {"/": answer()}, records)
    assert body == PICTURE
    assert web.asked_names == ["example.org"]
    assert {address for address, *_ in web.requests} == {PUBLIC}
    assert "example.org" not in looked_up


def test_rebinding_between_redirects_is_refused():
    records = {"example.org": [[PUBLIC], [PRIVATE]]}
    answers = {"/": redirect("/secret"), "/secret": answer(b"secret")}
    error, web = refused(lambda web: web.fetch("/"), answers, records)
    assert error.code == "image-url-not-allowed"
    assert [request[:2] for request in web.requests] == [(PUBLIC, "/")]


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_redirects_are_followed(status):
    answers = {"/": redirect("b/c?d", status), "/b/c?d": redirect("/e"), "/e": answer()}
    body, web = run(lambda web: web.fetch("/"), answers)
    assert body == PICTURE
    assert [path for _, path, _ in web.requests] == ["/", "/b/c?d", "/e"]
    assert len(web.asked_names) == 3


def test_redirects_bring_no_cookies():
    def cookie(where):
        return answer(b"", "302 Elsewhere", Location=where, Set_Cookie="a=b")

    _, web = run(lambda web: web.fetch("/"), {"/": cookie("/b"), "/b": answer()})
    assert "cookie" not in web.requests[1][2].lower()


@pytest.mark.parametrize("hops", [3, 4])
def test_redirects_are_counted(hops):
    answers = {f"/{at}": redirect(f"/{at + 1}") for at in range(hops)} | {f"/{hops}": answer()}
    if hops == 3:
        assert run(lambda web: web.fetch("/0"), answers)[0] == PICTURE
        return
    error, web = refused(lambda web: web.fetch("/0"), answers)
    assert (error.status, error.code) == (424, "image-url-failed")
    assert len(web.requests) == 4


@pytest.mark.parametrize(
    ("where", "status"),
    [
        ("http://evil.example:{port}/x", 403),
        ("http://127.0.0.2:{port}/x", 403),
        ("http://169.254.169.254/latest/meta-data", 403),
        ("https://example.org:{port}/x", 403),
        ("http://example.org/x", 403),
        ("http://private.example.org:{port}/x", 403),
        ("file:///etc/passwd", 400),
        ("http://user:password@example.org:{port}/x", 400),
        ("http://[::1", 424),
    ],
)
def test_redirects_are_checked_like_the_first_url(where, status):
    async def test(web):
        web.answers["/"] = redirect(where.format(port=web.port))
        allowed = [f"http://{host}:{web.port}" for host in ("example.org", "*.example.org")]
        return await web.fetch("/", allowed=allowed)

    error, web = refused(test, {"/x": answer()}, {"private.example.org": [[PRIVATE]]})
    assert error.status == status
    assert [request[:2] for request in web.requests] == [(PUBLIC, "/")]


def test_a_file_of_just_the_size_is_taken():
    assert run(lambda web: web.fetch("/", max_bytes=len(PICTURE)), {"/": answer()})[0] == PICTURE


async def nearly_endless(writer):
    writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
    for _ in range(10_000):
        writer.write(b"400\r\n" + bytes(1024) + b"\r\n")
        await writer.drain()
    writer.write(b"nothing that ends it")  # so that reading all of it is another error


@pytest.mark.parametrize(
    "what",
    [
        answer(bytes(1001)),
        answer(b"", Content_Length=10**12),
        answer(bytes(5000), Content_Length=None),  # until the connection closes
        nearly_endless,
    ],
)
def test_too_large_files_are_refused(what):
    error, _ = refused(lambda web: web.fetch("/"), {"/": what})
    assert (error.status, error.code) == (413, "image-too-large")


def test_a_length_too_small_cuts_what_comes():
    body, _ = run(lambda web: web.fetch("/"), {"/": answer(bytes(5000), Content_Length=10)})
    assert body == bytes(10)


@pytest.mark.parametrize(
    "what",
    [
        answer(Content_Length=len(PICTURE) + 5),
        answer(Content_Length="many"),
        answer(status="404 Not Found"),
        answer(status="206 Partial Content"),
        answer(status="304 Not Modified"),
        answer(gzip.compress(bytes(10**6))[:900], Content_Encoding="gzip"),
        answer(b"", "302 Elsewhere", Location="http://exa mple:port/"),
        b"not HTTP at all\r\n\r\n",
        b"",
    ],
)
def test_answers_that_are_none(what):
    error, _ = refused(lambda web: web.fetch("/"), {"/": what})
    assert (error.status, error.code) == (424, "image-url-failed")


async def drip(writer):
    writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 900\r\n\r\n")
    for _ in range(200):
        writer.write(b"x")
        await writer.drain()
        await asyncio.sleep(0.05)


async def drip_headers(writer):
    writer.write(b"HTTP/1.1 200 OK\r\n")
    for at in range(200):
        writer.write(f"X-{at}: x\r\n".encode())
        await writer.drain()
        await asyncio.sleep(0.05)


async def silent(writer):
    await asyncio.sleep(600)


async def slow_redirect(writer):
    await asyncio.sleep(0.2)
    writer.write(redirect("/"))
    await writer.drain()


@pytest.mark.parametrize("what", [drip, drip_headers, silent, slow_redirect])
def test_all_of_it_has_a_deadline(what):
    async def timed(web):
        clock = asyncio.get_running_loop().time
        began = clock()
        try:
            return await web.fetch("/", seconds=0.4)
        finally:
            web.took = clock() - began

    error, web = refused(timed, {"/": what})
    assert (error.status, error.code) == (424, "image-url-failed")
    assert web.took == pytest.approx(0.4, abs=0.001)


def test_lookups_count_towards_the_deadline():
    async def slow(host, port):
        await asyncio.sleep(600)

    error, _ = refused(lambda web: web.fetch("/", seconds=0.2, resolver=slow))
    assert "took more than 0.2 seconds" in str(error)


def test_cancelling_cancels():
    async def test(web):
        task = asyncio.create_task(web.fetch("/"))
        while not web.requests:  # noqa: ASYNC110 - the server's side knows no events
            await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    run(test, {"/": silent})


def test_the_next_address_is_tried_where_one_does_not_answer():
    def public(address):
        return str(address) in {PUBLIC, "127.0.0.3"}

    records = {"example.org": [["127.0.0.3", PUBLIC]]}
    body, _ = run(lambda web: web.fetch("/", public=public), {"/": answer()}, records)
    assert body == PICTURE
    records = {"example.org": [["127.0.0.3"]]}
    error, _ = refused(lambda web: web.fetch("/", public=public), {"/": answer()}, records)
    assert (error.status, "cannot be connected to" in str(error)) == (424, True)


@pytest.fixture(scope="module")
def authority():
    return pytest.importorskip("trustme").CA()


def tls_pair(authority, name, seen=None):
    server, client = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), ssl.create_default_context()
    authority.issue_cert(name).configure_cert(server)
    authority.configure_trust(client)
    if seen is not None:
        server.sni_callback = lambda _, asked, __: seen.append(asked)
    return server, client


def test_tls_is_for_the_name_though_the_connection_is_to_the_address(authority):
    seen = []
    server, client = tls_pair(authority, "example.org", seen)
    body, web = run(
        lambda web: web.fetch("/", scheme="https", tls=client), {"/": answer()}, tls=server
    )
    assert body == PICTURE
    assert seen == ["example.org"]
    assert f"Host: example.org:{web.port}" in web.requests[0][2]


@pytest.mark.parametrize("name", ["other.org", PUBLIC])
def test_certificates_of_another_name_are_not_believed(authority, name):
    server, client = tls_pair(authority, name)

    async def test(web):
        with pytest.raises(FetchRefusedError, match="cannot be connected to"):
            await web.fetch("/", scheme="https", tls=client)

    _, web = run(test, {"/": answer()}, tls=server)
    assert web.requests == []


def test_certificates_of_unknown_authorities_are_not_believed(authority, monkeypatch, tmp_path):
    # Not even when the environment names them: it is not ours to believe.
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "ca.pem"))
    fetching._default_tls.cache_clear()
    server, _ = tls_pair(authority, "example.org")

    async def test(web):
        with pytest.raises(FetchRefusedError, match="cannot be connected to"):
            await web.fetch("/", scheme="https")

    _, web = run(test, {"/": answer()}, tls=server)
    assert web.requests == []
