"""The service over real HTTP, with Spark behind it."""

from __future__ import annotations

import base64
import contextlib
import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pytest
from PIL import Image

pytest.importorskip("fastapi")
httpx = pytest.importorskip("httpx")
uvicorn = pytest.importorskip("uvicorn")

from fluxfire.bench import held_out  # noqa: E402
from fluxfire.serve import Settings, create_app  # noqa: E402
from fluxfire.serve.keys import new_key  # noqa: E402
from fluxfire.serve.quality_levels import default_passes, describe_level, settings_by_level  # noqa: E402

EXAMPLE = held_out(1)[0]
PATIENCE = 1800
"""Seconds for what takes 20 at most, on a busy machine; only what never comes needs so many."""
PORTRAIT = Image.effect_noise((96, 160), 60).convert("RGB")


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def until(condition, what):
    """Wait for something, for as long as a busy machine may need."""
    ends = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < ends, f"{what}: not within {PATIENCE} s"
        time.sleep(0.02)


@contextlib.contextmanager
def running(**settings):
    """A service in a thread, ready; yields a client of it."""
    port = free_port()
    # Neither a slow request nor a worker that a test holds is to be given up.
    patient = {"request_seconds": 2 * PATIENCE, "hang_seconds": 2 * PATIENCE}
    app = create_app(Settings(port=port, **patient, **settings))
    server = uvicorn.Server(uvicorn.Config(app, port=port, log_level="warning"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=PATIENCE) as client:
        client.app = app
        try:
            until(
                lambda: (
                    not thread.is_alive()
                    or (server.started and app.state.engine.state != "starting")
                ),
                "the service has started",
            )
            assert thread.is_alive()
            assert app.state.engine.state == "ready", app.state.engine.trouble
            yield client
        finally:
            server.should_exit = True
            thread.join(PATIENCE)


@pytest.fixture(scope="module")
def client(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    with running(max_bytes=100_000, max_queue=3, storage=None) as made:
        made.folder = folder
        yield made


def file_of(picture, kind="PNG"):
    file = io.BytesIO()
    picture.save(file, kind)
    return file.getvalue()


def body(picture=EXAMPLE.picture, **fields):
    image = {"image": base64.b64encode(file_of(picture)).decode()} if picture else {}
    return {"prompt": EXAMPLE.instruction, "steps": 2, "seed": 7, **image, **fields}


def pictures(answer):
    urls = [image["data_url"] for image in answer["images"]]
    files = [base64.b64decode(url.partition(",")[2]) for url in urls]
    return [np.asarray(Image.open(io.BytesIO(file)).convert("RGB"), np.int16) for file in files]


def edit(client, **fields):
    response = client.post("/inference", json=body(**fields))
    assert response.status_code == 200, response.text
    return response.json()


@contextlib.contextmanager
def half_a_request(url, kind=b"application/json", start=b"{"):
    """A connection whose request the service is reading, and the rest never comes.

    The service answers 100 once it reads the body, which is known thus, and not guessed. Yields
    what it says after that.
    """
    address = httpx.URL(url)
    with (
        socket.create_connection((address.host, address.port), timeout=PATIENCE) as line,
        line.makefile("rb") as heard,
    ):
        line.sendall(
            b"POST /inference HTTP/1.1\r\nHost: 127.0.0.1\r\nExpect: 100-continue\r\nContent-Type: "
            + kind
            + b"\r\nContent-Length: 1000\r\n\r\n"
            + start
        )
        assert b" 100 " in heard.readline()
        assert heard.readline() == b"\r\n"
        yield heard


def problem(response, status, code, said):
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert error["code"] == code
    assert said in error["message"]


def test_the_articles_own_call(client):
    text = (
        '{"prompt": "A majestic dragon breathing rainbow fire", "num_images": 1, '
        '"width": 1024, "height": 1024, "steps": 28}'
    )
    headers = {"Content-Type": "application/json"}
    answer = client.post("/inference", content=text, headers=headers).json()
    (image,) = answer["images"]
    assert (image["width"], image["height"]) == (128, 128)
    assert image["data_url"].startswith("data:image/png;base64,")
    assert (image["filepath"], image["url"]) == (None, None)
    assert len(answer["steps"]) == 28
    assert answer["total_time"] >= answer["inference_time"] > 0


def test_a_seed_makes_the_same_picture_whatever_way_the_picture_comes(client):
    answer = edit(client, quality="faithful")
    (first,) = pictures(answer)
    assert answer["seed"] == 7
    form = {k: str(v) for k, v in body(picture=None).items()} | {"quality": "faithful"}
    file = {"image": ("x.png", file_of(EXAMPLE.picture), "image/png")}
    url = "data:image/png;base64," + body()["image"]
    for response in (
        client.post("/inference", data=form, files=file),
        client.post("/inference", json=body(picture=None, quality="faithful", image=url)),
        client.post("/inference", json=body(picture=None, quality="faithful", image_url=url)),
    ):
        assert response.status_code == 200, response.text
        assert np.array_equal(pictures(response.json())[0], first)
    assert not np.array_equal(pictures(edit(client, quality="faithful", seed=8))[0], first)
    assert edit(client, seed=None)["seed"] != edit(client, seed=None)["seed"]


def test_several_pictures_are_those_of_the_seeds_that_follow(client):
    both = edit(client, num_images=2, quality="faithful")
    assert [image["seed"] for image in both["images"]] == [7, 8]
    for made, seed in zip(pictures(both), (7, 8), strict=True):
        (alone,) = pictures(edit(client, seed=seed, quality="faithful"))
        assert np.abs(made - alone).max() <= 2


def test_quality_by_request(client):
    assert client.get("/about").json()["qualities"] == [
        {"name": name, "about": describe_level(settings)}
        for name, settings in settings_by_level(default_passes("cpu")).items()
    ]
    faithful = edit(client, quality="faithful", steps=12)
    assert (faithful["quality"], set(faithful["steps"])) == ("faithful", {"computed"})
    fast = edit(client, quality="fast", steps=12)
    assert fast["quality"] == "fast"
    assert fast["hit_rate"] == pytest.approx(fast["steps"].count("hit") / 12)
    assert fast["hit_rate"] > 0


def test_nothing_is_skipped_unless_asked_for(client):
    assert client.get("/about").json()["quality"] == "faithful"
    usually = edit(client, steps=12)
    assert (usually["quality"], usually["hit_rate"]) == ("faithful", 0)
    assert usually["steps"] == ["computed"] * 12
    skipping = edit(client, steps=12, quality="balanced")
    assert skipping["quality"] == "balanced"
    assert "hit" in skipping["steps"]
    assert not np.array_equal(pictures(skipping)[0], pictures(usually)[0])


@pytest.mark.parametrize("kind", ["PNG", "JPG", "WEBP"])
def test_formats(client, kind):
    answer = edit(client, output_format=kind, output_quality=50)
    name = answer["images"][0]["filename"]
    assert name.endswith(f".{kind.lower()}")
    file = base64.b64decode(answer["images"][0]["data_url"].partition(",")[2])
    assert Image.open(io.BytesIO(file)).format == {"JPG": "JPEG"}.get(kind, kind)


def test_a_picture_keeps_its_shape_unless_another_is_wished_for(client):
    (image,) = edit(client, picture=PORTRAIT)["images"]
    assert (image["width"], image["height"]) == (96, 160)
    (image,) = edit(client, picture=PORTRAIT, width=1024, height=512)["images"]
    assert image["width"] > image["height"]


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"prompt": ""}, "prompt"),
        ({"prompt": "x" * 2001}, "prompt"),
        ({"seed": -1}, "seed"),
        ({"seed": 2**32}, "seed"),
        ({"true_cfg_scale": 20.5}, "true_cfg_scale"),
        ({"guidance_scale": -0.1}, "guidance_scale"),
        ({"height": 240}, "height"),
        ({"width": 1040}, "width"),
        ({"width": 500}, "width"),
        ({"steps": 0}, "steps"),
        ({"steps": 51}, "steps"),
        ({"num_images": 5}, "num_images"),
        ({"output_format": "GIF"}, "output_format"),
        ({"output_quality": 0}, "output_quality"),
        ({"quality": "best"}, "quality"),
        ({"unknown": 1}, "unknown"),
        ({"image_url": "https://example.org/a.png"}, "image and image_url exclude each other"),
    ],
)
def test_bounds(client, fields, named):
    problem(client.post("/inference", json=body(**fields)), 422, "invalid-request", named)


WRONG_URL, INVALID = "image-url-not-allowed", "invalid-request"
PLAIN, JSON = {"content-type": "text/plain"}, {"content-type": "application/json"}
BROKEN_FORM = {"content-type": "multipart/form-data"}
NO_PICTURE = "image-format-unsupported"


@pytest.mark.parametrize(
    ("sent", "status", "code"),
    [
        ({"content": b"{", "headers": JSON}, 400, "not-json"),
        ({"content": b"[1]", "headers": JSON}, 422, INVALID),
        ({"content": b"{}"}, 415, "body-format-unsupported"),
        ({"data": {"prompt": "x"}, "files": {"image": ("a.png", b"")}}, 415, NO_PICTURE),
        ({"content": b"x", "headers": BROKEN_FORM}, 400, "bad-request"),
        ({"content": b"x", "headers": PLAIN}, 415, "body-format-unsupported"),
        ({"json": {"prompt": "x", "image": "!!"}}, 400, "image-malformed"),
        ({"json": {"prompt": "x", "image": "aGVsbG8="}}, 415, "image-format-unsupported"),
        ({"json": {"prompt": "x", "image_url": "http://127.0.0.1/x"}}, 403, WRONG_URL),
        ({"json": {"prompt": "x", "image_url": "file:///etc/passwd"}}, 403, WRONG_URL),
        ({"data": {"prompt": "x", "steps": "no"}, "files": {"image": b"a"}}, 422, INVALID),
        ({"data": {"prompt": "x"}, "files": {"prompt": b"a"}}, 422, INVALID),
    ],
)
def test_what_is_wrong_is_said_in_one_form(client, sent, status, code):
    response = client.post("/inference", **sent)
    assert response.status_code == status, response.text
    assert response.json()["error"]["code"] == code


def test_fields_that_are_none_are_named(client):
    sent = {"data": {"prompt": "x", "foo": "1"}}
    nothing = {"image": ("", b"")}
    problem(
        client.post("/inference", files=nothing, **sent),
        422,
        INVALID,
        "unknown fields: foo; the fields are",
    )
    many = {"prompt": "x"} | {f"k{n}": 0 for n in range(3000)}
    response = client.post("/inference", json=many)
    problem(response, 422, INVALID, "unknown fields: k0, k1, k2, k3, k4 and 2995 more; the fields")
    assert len(response.content) < 1000
    for parts in ({f"k{n}": 0 for n in range(10_000)}, [0] * 30_000):
        response = client.post("/inference", json=parts)
        problem(response, 400, "not-json", "the body has too many parts")
    quotes = body(prompt='"' * 2000, negative_prompt="," * 2000, true_cfg_scale=2, steps=1)
    assert client.post("/inference", json=quotes).status_code == 200
    sent = {"data": {"prompt": "x"}, "files": {"picture": b"a"}}
    problem(client.post("/inference", **sent), 422, INVALID, "send the picture in the field image")


def test_bodies_are_limited_while_they_come(client):
    most = 4 * -(-100_000 // 3) + 2**20
    kind = {"content-type": "application/json"}
    response = client.post("/inference", content=b" " * (most + 1), headers=kind)
    problem(response, 413, "body-too-large", "the body has more than")

    def unannounced():
        for _ in range(most // 65536 + 2):
            yield b" " * 65536

    response = client.post("/inference", content=unannounced(), headers=kind)
    problem(response, 413, "body-too-large", "the body has more than")
    large = Image.effect_noise((300, 300), 90).convert("RGB")
    file = {"image": ("x.png", file_of(large), "image/png")}
    response = client.post("/inference", data={"prompt": "x"}, files=file)
    problem(response, 413, "image-too-large", "the limit is 100000")


def raw(client, head):
    """What the service answers to a request without its body, until it closes the connection."""
    url = client.base_url
    with socket.create_connection((url.host, url.port), timeout=PATIENCE) as line:
        line.sendall(b"POST /inference HTTP/1.1\r\nHost: 127.0.0.1\r\n" + head + b"\r\n\r\n")
        heard = b""
        with contextlib.suppress(ConnectionError):
            while part := line.recv(65536):
                heard += part
        return heard


@pytest.mark.parametrize(
    ("head", "status"),
    [
        (b"Content-Type: text/plain\r\nTransfer-Encoding: chunked", b" 415 "),
        (b"Content-Type: text/plain\r\nContent-Length: 1000000", b" 415 "),
        (b"Content-Type: application/json\r\nContent-Length: 99999999", b" 413 "),
        (
            b"Content-Type: application/json\r\nExpect: 100-continue\r\nContent-Length: 99999999",
            b" 413 ",
        ),
        (b"Content-Length: 5\r\nTransfer-Encoding: chunked", b" 400 "),
    ],
)
def test_a_refused_body_is_not_read_on(client, head, status):
    heard = raw(client, head)  # the body's end never comes: only the service ends this
    assert heard.startswith(b"HTTP/1.1" + status), heard
    assert b"connection: close" in heard.lower()


def test_a_small_refused_body_leaves_the_connection_open(client):
    for _ in range(2):
        response = client.post("/inference", content=b"x", headers={"content-type": "text/plain"})
        assert response.status_code == 415
        assert "connection" not in response.headers


def test_no_redirection_goes_where_the_client_says(client):
    assert client.get("/about/", follow_redirects=False).status_code == 404


def test_a_job_from_its_beginning_to_its_end(client):
    job = client.post("/jobs", json=body(steps=4)).raise_for_status().json()
    assert job["status"] in {"queued", "running"}
    events = []
    with client.stream("GET", f"/jobs/{job['id']}/events") as stream:
        assert stream.headers["content-type"].startswith("text/event-stream")
        events += [json.loads(x[6:]) for x in stream.iter_lines() if x.startswith("data: ")]
    assert events[-1]["status"] == "done"
    steps = [event["step"] for event in events]
    assert steps == sorted(steps)
    assert events[-1]["result"] == client.get(f"/jobs/{job['id']}").json()["result"]
    assert np.array_equal(pictures(events[-1]["result"])[0], pictures(edit(client, steps=4))[0])
    problem(client.get("/jobs/none"), 404, "job-unknown", "there is no such job")
    (image,) = events[-1]["result"]["images"]
    response = client.get(f"/jobs/{job['id']}/images/0")
    assert response.headers["content-type"] == "image/png"
    assert response.headers["content-disposition"] == f'inline; filename="{image["filename"]}"'
    assert response.content == base64.b64decode(image["data_url"].partition(",")[2])
    problem(client.get(f"/jobs/{job['id']}/images/1"), 404, "image-unknown", "no picture 1")


def test_a_body_that_does_not_come_is_given_up(client, monkeypatch):
    monkeypatch.setitem(vars(client.app.state.settings), "request_seconds", 0.5)
    with half_a_request(client.base_url) as heard:
        assert b" 408 " in heard.readline()


def test_hanging_up_while_sending_is_no_fault_of_the_service(client):
    def gone():
        told = re.search(r'route="/inference",status="499"} (\d+)', client.get("/metrics").text)
        return int(told[1]) if told else 0

    before = gone()
    for kind, start in (
        (b"application/json", b"{"),
        (b"multipart/form-data; boundary=x", b"--x\r\nContent-Disposition: form-data; name=prompt"),
    ):
        with half_a_request(client.base_url, kind, start):
            pass
    until(lambda: gone() >= before + 2, "both are noticed")
    assert gone() == before + 2
    assert 'status="500"' not in client.get("/metrics").text


def test_jobs_are_counted_as_other_edits_are(client):
    def computed():
        line = next(
            line
            for line in client.get("/metrics").text.splitlines()
            if line.startswith('fluxfire_steps_total{kind="computed"}')
        )
        return float(line.split()[-1])

    edit(client, steps=3, quality="faithful")
    before = computed()
    job = client.post("/jobs", json=body(steps=3, quality="faithful")).json()
    with client.stream("GET", f"/jobs/{job['id']}/events") as stream:
        stream.read()
    assert computed() == before + 3


def test_an_idempotent_edit_is_made_once(client):
    def made():
        return re.findall(r'fluxfire_edits_total{key="",outcome="done"} (.*)', text())

    def text():
        return client.get("/metrics").text

    sent = body(seed=None)
    headers = {"Idempotency-Key": "one"}
    first = client.post("/inference", json=sent, headers=headers).raise_for_status().json()
    before = made()
    again = client.post("/inference", json=sent, headers=headers)
    assert again.json() == first
    job = client.post("/jobs", json=sent, headers=headers).json()
    assert (job["status"], job["result"]) == ("done", first)
    assert made() == before
    response = client.post("/inference", json=sent | {"steps": 3}, headers=headers)
    problem(response, 422, "idempotency-key-reused", "came with another request before")
    wrong = {"prompt": "x", "image": "aGVsbG8="}
    for _ in range(2):
        response = client.post("/inference", json=wrong, headers={"Idempotency-Key": "two"})
        problem(response, 415, "image-format-unsupported", "neither PNG nor JPEG nor WebP")


def test_a_job_can_be_cancelled_and_a_failed_one_says_why(client, held):
    with held(worker_pid(client)):  # or it may be done before it is cancelled
        job = client.post("/jobs", json=body()).json()
        assert client.delete(f"/jobs/{job['id']}").json()["status"] == "cancelled"
    assert client.get(f"/jobs/{job['id']}").json()["error"]["code"] == "cancelled"
    job = client.post("/jobs", json={"prompt": "x", "image": "aGVsbG8="}).json()
    with client.stream("GET", f"/jobs/{job['id']}/events") as stream:
        last = [line for line in stream.iter_lines() if line.startswith("event: ")][-1]
    assert last == "event: failed"
    assert client.get(f"/jobs/{job['id']}").json()["error"]["code"] == "image-format-unsupported"
    until_idle(client)


def test_the_client_of_the_documentation(client, tmp_path, monkeypatch):
    page = Path(__file__).parent.parent / "docs/pages/how-to/serve.md"
    code = page.read_text().split("```py\n")[1].split("```")[0]
    assert "http://127.0.0.1:8000" in code
    monkeypatch.chdir(tmp_path)
    EXAMPLE.picture.save("photo.jpg")
    exec(code.replace("http://127.0.0.1:8000", str(client.base_url)), {})
    assert Image.open("night.png").size == (128, 128)


def until_idle(client):
    engine = client.app.state.engine
    until(lambda: not (engine.running or engine.waiting), "nothing is left to do")


def test_a_client_that_hangs_up_frees_the_worker(client, held):
    engine, address = client.app.state.engine, ("127.0.0.1", client.base_url.port)
    asked = json.dumps(body(steps=50, num_images=4, quality="faithful")).encode()
    with socket.create_connection(address, timeout=PATIENCE) as line:
        line.sendall(
            b"POST /inference HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
            b"Content-Length: %d\r\n\r\n%s" % (len(asked), asked)
        )
        until(lambda: engine.running, "it is with the worker")
        (ticket,) = engine._running.values()
        until(lambda: ticket.step, "it has made a step")
        # How fast the service notices is not the question, so the worker waits for that.
        with held(worker_pid(client)):
            line.close()
            until(ticket.done.done, "the service notices")
    assert getattr(ticket.done.exception(), "code", None) == "cancelled"
    until_idle(client)
    assert 0 < ticket.step < ticket.steps == 50


def test_a_full_queue_says_when_to_come_back(client, held):
    engine = client.app.state.engine
    with held(worker_pid(client)):  # or jobs may be done before the queue is full
        # Of different kinds, or they would be made together.
        jobs = [client.post("/jobs", json=body(guidance_scale=n)) for n in range(5)]
        assert [job.status_code for job in jobs] == [202] * 4 + [429]
        problem(jobs[-1], 429, "queue-full", "requests wait already")
        assert int(jobs[-1].headers["retry-after"]) >= 1
        until(lambda: (engine.running, engine.waiting) == (1, 3), "all pictures are read")
        response = client.post("/inference", json=body())
        problem(response, 429, "queue-full", "requests wait already")
        assert int(response.headers["retry-after"]) >= 1
        for job in jobs[:4]:
            client.delete(f"/jobs/{job.json()['id']}")
    until_idle(client)


def worker_pid(client):
    """Of this service's own: an earlier one's may still be ending."""
    return client.app.state.engine._supervisor._worker._process.pid


def test_a_killed_worker_is_replaced_and_the_request_answered(client, held):
    engine = client.app.state.engine
    before = worker_pid(client)
    with ThreadPoolExecutor(1) as pool:
        with held(before):  # or the edit may be over before it is killed
            answer = pool.submit(client.post, "/inference", json=body(quality="faithful"))
            until(lambda: engine.running, "it is with the worker")
            (ticket,) = engine._running.values()
            os.kill(before, signal.SIGKILL)
        assert answer.result().status_code == 200
    assert ticket.tries == 2
    assert worker_pid(client) != before
    counted = client.get("/metrics").text
    assert "fluxfire_worker_restarts_total 1.0" in counted
    assert 'fluxfire_requests_total{route="/inference",status="200"}' in counted
    assert 'fluxfire_steps_total{kind="computed"}' in counted


def test_other_sites_and_other_names_are_not_served(client):
    response = client.get("/about", headers={"Origin": "https://example.org"})
    assert "access-control-allow-origin" not in response.headers
    assert client.get("/about", headers={"Host": "example.org"}).status_code == 400
    assert client.get("/health").json() == {
        "status": "ok",
        "gpu_available": False,
        "message": None,
    }
    assert client.get("/ready").status_code == 200
    for path in ("/", "/health", "/ready"):
        assert client.head(path).status_code == 200
    foreign = {"Origin": "https://example.org"}
    for path in ("/inference", "/jobs"):
        response = client.post(path, json=body(), headers=foreign)
        problem(response, 403, "origin-not-allowed", "a page of another site")
    assert client.get("/page/../app.py").status_code == 404
    problem(client.get("/nothing"), 404, "not-found", "Not Found")


def test_keys_storage_and_a_deadline(tmp_path, held):
    (ann, of_ann), (bob, of_bob) = new_key("ann"), new_key("bob")
    keys = tmp_path / "keys"
    keys.write_text(f"{of_ann}\n{of_bob}\n")
    outside = "https://example.org/edit/"
    with running(
        keys_file=keys, passes="none", storage=str(tmp_path / "made"), public_url=outside
    ) as client:
        assert client.get("/health").status_code == 200
        assert client.get("/").status_code == 200
        for headers, code, said in (
            ({}, "key-wanted", "this service needs a key"),
            ({"Authorization": f"Basic {ann}"}, "key-wanted", "this service needs a key"),
            ({"X-API-Key": "ff_wrong"}, "key-unknown", "this key is unknown"),
            ({"Authorization": "Bearer ff_wrong"}, "key-unknown", "this key is unknown"),
        ):
            response = client.post("/inference", json=body(), headers=headers)
            problem(response, 401, code, said)
            assert response.headers["www-authenticate"] == "Bearer"
        client.headers["Authorization"] = f"Bearer {ann}"
        large = base64.b64encode(file_of(Image.effect_noise((1200, 1000), 90))).decode()
        assert len(large) > 2**20  # which is where multipart parsers usually end a text field
        text = {"image": (None, large), "prompt": (None, "x"), "steps": (None, "1")}
        assert client.post("/inference", files=text).status_code == 200
        (image,) = edit(client)["images"]
        assert image["data_url"] is None
        assert image["url"].startswith("https://example.org/edit/files/")
        link = image["url"].removeprefix("https://example.org/edit")
        assert client.get(link).content[:4] == b"\x89PNG"
        counted = client.get("/metrics").text
        assert 'fluxfire_edits_total{key="ann",outcome="done"} 2.0' in counted
        wrong = link[:-1] + ("0" if link[-1] != "0" else "1")
        problem(client.get(wrong), 403, "link-invalid", "")
        response = client.post("/inference", json=body(quality="fast"))
        problem(response, 422, "quality-not-offered", "it offers faithful")
        service = client.app.state.service
        usually = service.settings
        # Only for the edit: on a busy machine, the body might not be read within that time, which
        # is another refusal. And the worker must not be faster.
        service.settings = replace(usually, request_seconds=0.5)
        with held(worker_pid(client)):
            response = client.post("/inference", json=body())
        service.settings = usually
        problem(response, 504, "deadline", "the request took more than 0.5 s")
        job = client.post("/jobs", json=body()).json()
        other = client.get(f"/jobs/{job['id']}", headers={"Authorization": f"Bearer {bob}"})
        problem(other, 404, "job-unknown", "there is no such job")


@contextlib.contextmanager
def command(*options):
    """The command, ready; yields its process and its address."""
    port = free_port()
    asked = [sys.executable, "-m", "fluxfire", "serve", "--port", str(port), *options]
    process = subprocess.Popen(asked, stderr=subprocess.PIPE, text=True)
    url = f"http://127.0.0.1:{port}"
    try:
        until(lambda: process.poll() is not None or is_ready(url), "the service is ready")
        assert process.poll() is None, process.stderr.read()
        yield process, url
    finally:
        process.kill()


def is_ready(url):
    with contextlib.suppress(httpx.TransportError):  # it does not even listen yet
        return httpx.get(f"{url}/ready", timeout=PATIENCE).status_code == 200
    return False


def counts(url, line):
    return f"\n{line}\n" in httpx.get(f"{url}/metrics", timeout=PATIENCE).text


def worker_of(process):
    """The id of a service's worker, which is not the only child that it has."""
    children = psutil.Process(process.pid).children()
    (worker,) = [child.pid for child in children if "spawn_main" in " ".join(child.cmdline())]
    return worker


def asked_while_it_is_stopped(process, url, held, *, goes_on, how=signal.SIGTERM):
    """What an edit that runs at a signal is answered, whether its worker then goes on or hangs."""
    worker = worker_of(process)
    with ThreadPoolExecutor(1) as pool, held(worker) as go_on:
        answer = pool.submit(httpx.post, f"{url}/inference", json=body(), timeout=PATIENCE)
        until(lambda: counts(url, "fluxfire_requests_running 1.0"), "it is with the worker")
        with half_a_request(url) as heard:
            process.send_signal(how)
            assert b" 503 " in heard.readline()
        if goes_on:
            go_on()
        answer.result()
        if not goes_on:
            process.wait(PATIENCE)
            until(lambda: gone(worker), "the worker, which hangs, has ended with its server")
    said = ended(process)
    assert process.returncode in {0, -signal.SIGTERM}  # uvicorn then ends as it was told to
    assert "ready: spark on cpu with FirstBlockCache" in said
    assert "quality faithful, unless a request asks for balanced or fast" in said
    assert "/metrics" not in said  # nor any other probe
    return answer.result()


def gone(pid):
    """Whether a process has ended, though perhaps nobody has asked for its status."""
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def ended(process):
    """What it said until its end."""
    _, said = process.communicate(timeout=PATIENCE)
    assert "Traceback" not in said
    return said


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_a_job_survives_a_restart(tmp_path, held, how):
    options = ["--jobs-file", str(tmp_path / "jobs"), "--drain", "1"]
    with command(*options) as (process, url), held(worker_of(process)):
        first, second = (
            httpx.post(f"{url}/jobs", json=body(seed=seed, steps=1), timeout=PATIENCE).json()["id"]
            for seed in (1, 2)
        )
        until(
            lambda: (
                httpx.get(f"{url}/jobs/{first}", timeout=PATIENCE).json()["status"] == "running"
            ),
            "it is with the worker",
        )
        process.send_signal(how)
        process.wait(PATIENCE)
    with command(*options) as (process, url):

        def shown(name):
            return httpx.get(f"{url}/jobs/{name}", timeout=PATIENCE).json()

        for name, seed in ((first, 1), (second, 2)):
            until(lambda name=name: shown(name)["status"] == "done", "it is made after all")
            assert shown(name)["result"]["seed"] == seed


def test_told_to_stop_it_answers_what_it_has_begun(held):
    with command("--drain", str(2 * PATIENCE)) as running:  # a closed terminal tells it so
        response = asked_while_it_is_stopped(*running, held, goes_on=True, how=signal.SIGHUP)
        assert response.status_code == 200


@pytest.mark.slow
def test_what_takes_longer_than_it_may_is_told_that_the_service_stops(held):
    with command("--drain", "1") as running:
        response = asked_while_it_is_stopped(*running, held, goes_on=False)
        problem(response, 503, "stopping", "the service is stopping")


@pytest.mark.slow
def test_told_twice_to_stop_it_waits_for_nothing(held):
    # It may drain for longer than this test waits for its end, and its worker does not go on.
    with (
        command("--drain", str(2 * PATIENCE)) as (process, url),
        ThreadPoolExecutor(1) as pool,
        held(worker_of(process)) as go_on,
    ):
        job = httpx.post(f"{url}/jobs", json=body(), timeout=PATIENCE).json()
        answer = pool.submit(httpx.post, f"{url}/inference", json=body(), timeout=PATIENCE)
        until(lambda: counts(url, "fluxfire_requests_waiting 1.0"), "one waits")
        process.send_signal(signal.SIGINT)

        def told(path):
            return httpx.get(f"{url}{path}", timeout=PATIENCE).json()["status"]

        until(lambda: told("/health") == "draining", "it is told")
        assert told(f"/jobs/{job['id']}") in {"queued", "running"}
        process.send_signal(signal.SIGINT)
        problem(answer.result(), 503, "stopping", "the service is stopping")
        assert process.wait(PATIENCE) == 130
        go_on()  # to its end, or what it could still say would be waited for
        ended(process)


def test_what_cannot_start_says_so_and_ends(tmp_path):
    wrong = [sys.executable, "-m", "fluxfire", "serve", "--port", str(free_port())]
    wrong += ["--model", str(tmp_path / "nothing")]
    done = subprocess.run(wrong, capture_output=True, text=True, check=False, timeout=PATIENCE)
    assert done.returncode == 2
    assert "error: there is no folder" in done.stderr
