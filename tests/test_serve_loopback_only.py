"""Who may use a service that wants no keys."""

from __future__ import annotations

import asyncio

import pytest

httpx = pytest.importorskip("httpx")
pytest.importorskip("fastapi")

from starlette.responses import PlainTextResponse  # noqa: E402

from fluxfire.serve.loopback_only import LoopbackOnlyMiddleware  # noqa: E402

APP = LoopbackOnlyMiddleware(PlainTextResponse("made"), "127.0.0.1", ["https://ours.example"])


def ask(method="POST", client="127.0.0.1", app=APP, **headers):
    async def asked():
        transport = httpx.ASGITransport(app, client=(client, 1))
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1:8000") as c:
            named = {name.replace("_", "-"): value for name, value in headers.items()}
            return await c.request(method, "/inference", headers=named)

    return asyncio.run(asked())


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"origin": "http://127.0.0.1:8000"},
        {"origin": "https://ours.example"},
        {"host": "localhost:9", "origin": "http://localhost:9"},
        {"host": "[::1]:8000"},
        {"host": "[::1]"},
        {"host": "localhost"},
        {"host": "LocalHost.:8000", "origin": "http://localhost.:8000"},
        {"sec_fetch_site": "same-origin"},
    ],
)
def test_this_machine_and_its_pages_are_served(headers):
    assert ask(**headers).text == "made"
    assert ask(client="::1", **headers).text == "made"


@pytest.mark.parametrize(
    ("headers", "status", "code"),
    [
        ({"host": "evil.example"}, 400, "host-unknown"),
        ({"host": "localhost.evil.example:8000"}, 400, "host-unknown"),
        ({"host": ""}, 400, "host-unknown"),
        ({"origin": "https://evil.example"}, 403, "origin-not-allowed"),
        ({"origin": "http://127.0.0.1:9000"}, 403, "origin-not-allowed"),
        ({"origin": "https://ours.example:444"}, 403, "origin-not-allowed"),
        ({"origin": "http://["}, 403, "origin-not-allowed"),
        ({"origin": "null"}, 403, "origin-not-allowed"),
        ({"sec_fetch_site": "cross-site"}, 403, "origin-not-allowed"),
        ({"client": "192.168.1.7"}, 403, "keys-needed"),
        ({"client": "2001:db8::1"}, 403, "keys-needed"),
    ],
)
def test_others_are_not(headers, status, code):
    response = ask(**headers)
    assert (response.status_code, response.json()["error"]["code"]) == (status, code)


def test_reading_is_left_to_the_browser_which_shows_other_sites_nothing():
    assert ask("GET", origin="https://evil.example").text == "made"


def test_an_address_of_its_own_is_a_name_too():
    app = LoopbackOnlyMiddleware(PlainTextResponse("made"), "::1", [])
    assert ask(app=app, host="[::1]:1").text == "made"
    app = LoopbackOnlyMiddleware(PlainTextResponse("made"), "127.0.0.9", [])
    assert ask(app=app, host="127.0.0.9:1").text == "made"
