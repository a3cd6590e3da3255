"""What is posted over the network: only to allowed hosts, and only at public addresses."""

from __future__ import annotations

import pytest

pytest.importorskip("httpx")

import idle_loop
from fluxfire.serve.allowed_hosts import FetchRefusedError
from fluxfire.serve.fetching import post
from test_serve_fetching import PRIVATE, PUBLIC, Web, answer, redirect


def posted(path, web, **answers):
    """Post to a path; return the status."""

    async def story():
        web.answers |= {f"/{name}": what for name, what in answers.items()}
        async with web.running():
            return await post(
                f"http://example.org:{web.port}{path}",
                b'{"id": 1}',
                {"webhook-id": "a", "Host": "of-a-client"},
                allowed=[f"http://example.org:{web.port}"],
                seconds=600,
                resolver=web.resolver,
                public=web.public,
            )

    return idle_loop.run(story(), network=5)


def test_it_posts_to_the_address_that_it_checked():
    web = Web()
    assert posted("/end", web, end=answer(status="204 No Content")) == 204
    ((address, path, head),) = web.requests
    assert (address, path) == (PUBLIC, "/end")
    assert head.startswith("POST /end HTTP/1.1")
    assert "webhook-id: a" in head
    assert f"host: example.org:{web.port}\r\n" in head.lower()
    assert "of-a-client" not in head
    assert web.asked_names == ["example.org"]


@pytest.mark.parametrize("addresses", [[PRIVATE], [PUBLIC, PRIVATE]])
def test_it_posts_to_no_private_address(addresses):
    web = Web()
    web.records["example.org"] = [addresses]
    with pytest.raises(FetchRefusedError, match="has an address that is not public"):
        posted("/end", web, end=answer())
    assert web.requests == []


def test_it_follows_no_redirect():
    web = Web()
    assert posted("/end", web, end=redirect("/inside"), inside=answer()) == 302
    assert [path for _, path, _ in web.requests] == ["/end"]


def test_a_host_that_breaks_off_is_told():
    async def nothing(writer):
        writer.close()

    with pytest.raises(FetchRefusedError, match="the host failed to answer"):
        posted("/end", Web(), end=nothing)
