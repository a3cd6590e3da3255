"""From a request to an answer, with an engine that does what the test says."""

from __future__ import annotations

import asyncio
import base64
import gc
import io
import threading
import weakref

import pytest
from PIL import Image

pytest.importorskip("fastapi")

import idle_loop
from fluxfire.serve import service as service_module
from fluxfire.serve.engine import QueueSlot, Ticket
from fluxfire.serve.errors import RefusedError
from fluxfire.serve.request_body import SentRequest, race
from fluxfire.serve.schema import EditRequest
from fluxfire.serve.service import Service
from fluxfire.serve.settings import Settings
from fluxfire.serve.wire import Facts, RawPicture, Result


class Watched(RawPicture):
    """Pixels of which it can be seen when they are let go of."""


class Engine:
    """Takes one request."""

    facts = Facts("spark", "cpu", (), {"faithful": "computes every step"}, "faithful")

    def __init__(self):
        self.place, self.ticket, self.left = QueueSlot(), None, False

    def reserve(self, level):
        return self.place

    def release(self, place):
        self.left = True

    def submit(self, ask, place):
        self.ticket = Ticket(1, ask, asyncio.get_running_loop().create_future())
        return self.ticket

    def cancel(self, ticket, why):
        ticket.done.set_exception(why)
        ticket.done.exception()


class Slow:
    """A store that keeps a picture waiting."""

    def __init__(self):
        self.begun, self.go_on = threading.Event(), threading.Event()

    def put(self, name, data, kind):
        self.begun.set()
        assert self.go_on.wait(600)

    def url(self, name):
        return f"/files/{name}"


def png():
    file = io.BytesIO()
    Image.new("RGB", (16, 16)).save(file, "PNG")
    return file.getvalue()


def sent_as(kind):
    if kind == "file":
        return SentRequest(EditRequest(prompt="x"), png())
    text = base64.b64encode(png()).decode()
    field = {"text": {"image": text}, "url": {"image_url": f"data:image/png;base64,{text}"}}[kind]
    return SentRequest(EditRequest(prompt="x", **field))


async def submitted(service):
    while service.engine.ticket is None:  # noqa: ASYNC110
        await asyncio.sleep(0.001)
    return service.engine.ticket


@pytest.mark.parametrize("kind", ["file", "text", "url"])
def test_a_request_that_waits_has_no_picture_but_its_pixels(kind):
    async def story():
        service, sent = Service(Settings(), Engine(), None), sent_as(kind)
        editing = asyncio.create_task(service.edit(sent))
        ticket = await submitted(service)
        assert (sent.file, sent.request.image, sent.request.image_url) == (None, None, None)
        assert ticket.request.picture.picture().size == (16, 16)
        editing.cancel()

    idle_loop.run(story())


@pytest.mark.parametrize("end", ["late", "failed", "cancelled"])
def test_an_edit_that_fails_keeps_no_pixels(monkeypatch, end):
    watched = []

    def decoded(file, max_pixels):
        watched.append(weakref.ref(made := Watched(16, 16, bytes(768))))
        return made

    monkeypatch.setattr(service_module, "_decode", decoded)

    async def stop():
        await asyncio.Event().wait()

    async def edit(service):
        try:
            await race(service.edit(sent_as("file")), stop())
        except RefusedError as refusal:
            return refusal.status

    async def story():
        service = Service(Settings(request_seconds=300), Engine(), None)
        editing = asyncio.create_task(edit(service))
        ticket = await submitted(service)
        assert watched[0]() is not None
        if end == "failed":
            ticket.done.set_exception(RefusedError("no", status=422, code="no"))
        elif end == "cancelled":
            editing.cancel()
        try:
            assert await editing == {"late": 504, "failed": 422}[end]
        except asyncio.CancelledError:
            assert end == "cancelled"
        assert service.engine.left
        service.engine.ticket = None

    gc.collect()
    gc.disable()  # which would find a circle in the end, after many a large picture
    try:
        idle_loop.run(story())
        assert watched[0]() is None
    finally:
        gc.enable()


def test_a_place_is_kept_until_the_pictures_are_stored():
    async def story():
        store = Slow()
        service = Service(Settings(), Engine(), store)
        editing = asyncio.create_task(service.edit(sent_as("file")))
        ticket = await submitted(service)
        ticket.done.set_result(Result((RawPicture(16, 16, bytes(768)),), ("computed",), 0.0))
        assert await asyncio.to_thread(store.begun.wait, 600)
        assert not service.engine.left
        store.go_on.set()
        answer = await editing
        assert answer.images[0].url.startswith("/files/")
        assert service.engine.left
        service.close()

    asyncio.run(story())
