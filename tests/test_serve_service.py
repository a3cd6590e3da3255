"""From a request to an answer, with an engine that does what the test says."""

from __future__ import annotations

import asyncio
import base64
import errno
import gc
import io
import json
import tempfile
import threading
import weakref

import pytest
from PIL import Image

pytest.importorskip("fastapi")

pytest.importorskip("httpx")

import httpx
from fastapi import Request

import idle_loop
from fluxfire.serve import service as service_module
from fluxfire.serve.engine import QueueSlot, Ticket
from fluxfire.serve.errors import RefusedError
from fluxfire.serve.job_store import JobStore
from fluxfire.serve.jobs import Jobs
from fluxfire.serve.request_body import SentRequest, race, read_request
from fluxfire.serve.schema import EditRequest
from fluxfire.serve.service import Service
from fluxfire.serve.settings import Settings
from fluxfire.serve.storage import StorageError
from fluxfire.serve.wire import Facts, RawPicture, Result


class Watched(RawPicture):
    """Pixels of which it can be seen when they are let go of."""


class Engine:
    """Takes one request."""

    facts = Facts("spark", "cpu", (), {"faithful": "computes every step"}, "faithful")

    def __init__(self):
        self.place, self.ticket, self.left = QueueSlot(), None, False

    def reserve(self, level, owner=None):
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

    failures = []

    async def story():
        settings = Settings(request_seconds=300)
        service = Service(
            settings, Engine(), None, on_failure=lambda code, owner: failures.append(code)
        )
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
        service._pictures.shutdown()  # a thread holds its last result until it looks for work

    gc.collect()
    gc.disable()  # which would find a circle in the end, after many a large picture
    try:
        idle_loop.run(story())
        assert watched[0]() is None
        assert failures == [{"late": "deadline", "failed": "no"}.get(end, end)]
    finally:
        gc.enable()


class Broken:
    """A store that takes no pictures until it is mended."""

    mended, checks = False, 0

    def put(self, name, data, kind):
        raise StorageError("the disk is full")

    def check(self):
        self.checks += 1
        if not self.mended:
            raise StorageError("the disk is full")


def test_while_the_store_is_broken_nothing_is_made_in_vain():
    async def story():
        service = Service(Settings(), Engine(), store := Broken())
        watching = asyncio.create_task(service.store_watch.watch())
        editing = asyncio.create_task(service.edit(sent_as("file")))
        ticket = await submitted(service)
        ticket.done.set_result(Result((RawPicture(16, 16, bytes(768)),), ("computed",), 0.0))
        with pytest.raises(StorageError):
            await editing
        jobs = Jobs(service, JobStore(None))
        with pytest.raises(RefusedError, match="takes no pictures") as refusal:
            await jobs.reserve(sent_as("file"), None)
        assert (refusal.value.status, refusal.value.code) == (503, "storage")
        await asyncio.sleep(25)  # two checks
        assert store.checks == 2
        assert service.store_watch.failed
        store.mended = True
        await asyncio.sleep(10)
        await jobs.reserve(sent_as("file"), None)
        await asyncio.sleep(100)
        assert store.checks == 3  # a store that works is left alone
        watching.cancel()
        service.close()

    idle_loop.run(story())


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


FORM = (
    b'--x\r\nContent-Disposition: form-data; name="prompt"\r\n\r\nred\r\n--x\r\n'
    b'Content-Disposition: form-data; name="image"; filename="a.png"\r\n'
    b"Content-Type: image/png\r\n\r\n" + png() + b"\r\n--x--\r\n"
)
FORM_TYPE = "multipart/form-data; boundary=x"


def read(body, kind=FORM_TYPE, size=10**6):
    """Read a body that arrives in parts of a size."""
    parts = [body[at : at + size] for at in range(0, len(body), size)]
    messages = [{"type": "http.request", "body": part, "more_body": True} for part in parts]
    messages.append({"type": "http.request", "body": b"", "more_body": False})

    async def receive():
        return messages.pop(0)

    scope = {"type": "http", "headers": [(b"content-type", kind.encode())]}
    return asyncio.run(read_request(Request(scope, receive), 600))


def refused(body, kind=FORM_TYPE, size=10**6):
    with pytest.raises(RefusedError) as caught:
        read(body, kind, size)
    str(caught.value).encode()  # as the response will
    return caught.value.status, caught.value.code


@pytest.mark.parametrize("size", [1, 10**6])
@pytest.mark.parametrize(
    ("form", "kind"),
    [
        (FORM, FORM_TYPE),
        (FORM, 'Multipart/Form-Data; charset=utf-8; boundary="x"'),
        (FORM.removesuffix(b"\r\n"), FORM_TYPE),
        (b"\r\n" + FORM, FORM_TYPE),
        (FORM + b"an epilogue\r\n--x\r\n", FORM_TYPE),
    ],
)
def test_whole_forms_are_read(form, kind, size):
    sent = read(form, kind, size)
    assert (sent.request.prompt, sent.file) == ("red", png())


def test_a_form_of_httpx_is_read():
    sent = httpx.Request("POST", "http://a", data={"prompt": "red"}, files={"image": png()})
    assert read(sent.read(), sent.headers["content-type"], 50).file == png()


@pytest.mark.parametrize("size", [1, 10**6])
@pytest.mark.parametrize(
    "kept",
    [
        FORM.removesuffix(b"-\r\n"),
        FORM.removesuffix(b"--\r\n"),
        FORM.removesuffix(b"--\r\n") + b"\r\n",
        FORM.removesuffix(b"\r\n--x--\r\n"),
        FORM[: FORM.index(b"IHDR")],
        FORM[: FORM.index(b"IHDR")] + b"--x--",  # not at the start of a line
        FORM[: FORM.index(b"image/png")],
        FORM[: FORM.index(b"filename")],
        FORM[:10],
        b"",
    ],
)
def test_forms_without_their_end_are_refused(kept, size):
    assert refused(kept, size=size) == (400, "form-cut")


@pytest.mark.parametrize("body", [b"no form", FORM.replace(b"image", b"\r\n", 1)])
def test_other_forms_are_refused_too(body):
    assert refused(body) == (400, "bad-request")


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
def test_a_full_disk_is_told(monkeypatch, number):
    def write(*_):
        raise OSError(number, "as the test wants it")

    monkeypatch.setattr(tempfile.SpooledTemporaryFile, "write", write)
    if number == errno.EIO:
        with pytest.raises(OSError, match="as the test wants it"):
            read(FORM)
    else:
        assert refused(FORM) == (507, "disk-full")


@pytest.mark.parametrize(
    ("body", "why"),
    [
        (b'{"prompt": "a", "seed": 1, "seed": 2}', "the field seed was sent twice"),
        (b'{"prompt": "a", "prompt": "a"}', "the field prompt was sent twice"),
        (b'{"prompt": {"a": 1, "a": 2}}', "the field a was sent twice"),
        (b'{"\\ud800": 1, "\\ud800": 2}', r"the field \? was sent twice"),
        (b'{"%s": 1, "%s": 2}' % (b"a" * 999, b"a" * 999), "the field a{40} was sent twice"),
        (b'{"\\ud800": 1}', r"unknown fields: \?;"),
    ],
)
def test_json_keys_are_sent_once_and_named(body, why):
    with pytest.raises(RefusedError, match=why) as caught:
        read(body, "application/json")
    assert (caught.value.status, caught.value.code) == (422, "invalid-request")
    json.dumps(str(caught.value), ensure_ascii=False).encode()
