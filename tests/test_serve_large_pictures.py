"""Large pictures: they are decoded outside the server, which keeps nothing of their memory."""

from __future__ import annotations

import asyncio
import io
import os
import subprocess
import sys

import pytest
from PIL import Image

pytest.importorskip("fastapi")

from fluxfire.serve import decoding, decoding_process
from fluxfire.serve import service as service_module
from fluxfire.serve.decoding import PictureRefusedError
from fluxfire.serve.decoding_process import decode_apart
from fluxfire.serve.request_body import SentRequest
from fluxfire.serve.schema import EditRequest
from fluxfire.serve.service import Service
from fluxfire.serve.settings import Settings
from fluxfire.serve.wire import RawPicture
from thinned import ALL

MEMORY = """
import asyncio, sys
import psutil
from fluxfire.serve.request_body import SentRequest
from fluxfire.serve.schema import EditRequest
from fluxfire.serve.service import Service
from fluxfire.serve.settings import Settings

async def story():
    service = Service(Settings(), None, None)
    size, n = (int(sys.argv[1]), int(sys.argv[2])), int(sys.argv[3])
    files = [open(path, "rb").read() for path in sys.argv[4:]]
    me = psutil.Process()
    before = me.memory_info().rss
    highest = before
    async def watch():
        nonlocal highest
        while True:
            highest = max(highest, me.memory_info().rss)
            await asyncio.sleep(0.05)
    watching = asyncio.create_task(watch())
    sent = [SentRequest(EditRequest(prompt="x"), files[i % len(files)]) for i in range(n)]
    for part in range(0, n, 4):
        made = await asyncio.gather(*map(service._picture, sent[part:part + 4]))
        assert all(each.width * each.height <= 4_194_304 for each in made)
    del made
    watching.cancel()
    print((me.memory_info().rss - before) >> 20, (highest - before) >> 20)

asyncio.run(story())
"""


def file_of(mode, kind, size):
    file = io.BytesIO()
    Image.new(mode, size, (1, 2, 3, 100)[: len(mode)]).save(file, kind, quality=10)
    return file.getvalue()


def grown(tmp_path, size, n):
    """MiB by which a server's memory is higher after pictures, and was at most."""
    paths = []
    for mode, kind in (("RGBA", "WEBP"), ("RGB", "JPEG"), ("RGBA", "PNG")):
        paths.append(tmp_path / kind)
        paths[-1].write_bytes(file_of(mode, kind, size))
    command = [sys.executable, "-c", MEMORY, *map(str, (*size, n, *paths))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return [int(word) for word in done.stdout.split()]


def test_pictures_of_twelve_megapixels_leave_no_memory_behind(tmp_path):
    after, highest = grown(tmp_path, (4000, 3000), 4)
    assert after <= 100
    assert highest <= 150


@pytest.mark.slow
def test_pictures_of_fifty_megapixels_leave_no_memory_behind(tmp_path):
    after, highest = grown(tmp_path, (8000, 6250), 20 if ALL else 6)
    assert after <= 200
    assert highest <= 250


def test_it_is_the_same_picture_wherever_it_is_decoded():
    file = io.BytesIO()
    Image.effect_noise((2400, 2000), 60).convert("RGB").save(file, "PNG")
    whole = decoding.decode(file.getvalue(), max_pixels=10**7)
    apart = asyncio.run(decode_apart(file.getvalue(), 10**7))
    assert apart == RawPicture.of(decoding.scale_down(whole))


def test_what_is_wrong_is_told_by_the_other_process():
    whole = file_of("RGB", "PNG", (2400, 2000))
    with pytest.raises(PictureRefusedError, match="damaged or incomplete") as refusal:
        asyncio.run(decode_apart(whole[: len(whole) // 2], 10**7))
    assert (refusal.value.status, refusal.value.code) == (400, "image-damaged")


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_too_many_pixels_start_no_process(monkeypatch, kind):
    monkeypatch.setattr(service_module, "decode_apart", lambda *_: pytest.fail("it was started"))
    sent = SentRequest(EditRequest(prompt="x"), file_of("RGB", kind, (2400, 2000)))
    with pytest.raises(PictureRefusedError, match="the limits are 1000000 pixels"):
        asyncio.run(Service(Settings(max_pixels=10**6), None, None)._picture(sent))


def test_a_process_that_the_system_ends_refuses_the_picture(monkeypatch):
    monkeypatch.setattr(decoding_process.sys, "executable", "/bin/false")
    with pytest.raises(PictureRefusedError, match="more memory than the server has") as refusal:
        asyncio.run(decode_apart(b"x", 1))
    assert refusal.value.status == 413


def test_cancelling_ends_the_process(monkeypatch, tmp_path):
    slow = tmp_path / "slow"
    slow.write_text(f"#!/bin/sh\necho $$ > {tmp_path}/pid\nexec sleep 3600\n")
    slow.chmod(0o700)
    monkeypatch.setattr(decoding_process.sys, "executable", str(slow))

    async def story():
        decoding_it = asyncio.create_task(decode_apart(b"x", 1))
        while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        decoding_it.cancel()
        with pytest.raises(asyncio.CancelledError):
            await decoding_it
        number = int((tmp_path / "pid").read_text())
        while True:  # until the system has ended it
            try:
                os.kill(number, 0)
            except ProcessLookupError:
                return
            await asyncio.sleep(0.01)

    asyncio.run(story())
