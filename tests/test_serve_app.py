"""The application without a worker: what its responses say, whatever the pipeline does."""

from __future__ import annotations

import asyncio
import json
import re
import sqlite3
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("httpx")

import httpx

from fluxfire.errors import FluxfireError
from fluxfire.serve import Settings, create_app
from fluxfire.serve import app as app_module
from fluxfire.serve.job_store import JobStore
from fluxfire.serve.jobs import Jobs
from fluxfire.serve.metrics import Metrics
from fluxfire.serve.storage import fresh_name
from fluxfire.serve.store_watch import StoreWatch

SECRET = "a secret of many characters"


def ask(app, method, path, **options):
    """Send a request to an application that is not started."""

    async def story():
        transport = httpx.ASGITransport(app=app, client=("127.0.0.1", 1))
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            return await client.request(method, path, **options)

    return asyncio.run(story())


def policy(app):
    text = ask(app, "GET", "/").headers["content-security-policy"]
    return dict(part.split(" ", 1) for part in text.split("; "))


class Bucket:
    """A store elsewhere."""

    def __init__(self, url):
        self._url = url

    def check(self):
        pass

    def url(self, name):
        return f"{self._url}/bucket/{name}?signature=1"


@pytest.mark.parametrize("address", ["http://127.0.0.1:9000", "https://store.example.org"])
def test_the_page_may_load_pictures_from_the_store(monkeypatch, address):
    monkeypatch.setattr(app_module, "open_storage", lambda *_, **__: Bucket(address))
    told = policy(create_app(Settings(storage="s3://bucket")))
    assert address in told["img-src"].split()
    assert told["connect-src"] == "'self'"


def test_without_a_store_elsewhere_the_page_loads_nothing_from_others(tmp_path):
    for storage in (None, str(tmp_path)):
        told = policy(create_app(Settings(storage=storage)))
        assert told["connect-src"] == told["script-src"] == "'self'"
        assert told["img-src"] == "'self' data: blob: https:"


def test_a_link_answers_to_head_and_has_a_name(tmp_path):
    app = create_app(Settings(storage=str(tmp_path), secret=SECRET))
    name = fresh_name("PNG")
    app.state.storage.put(name, b"picture", "image/png")
    link = app.state.storage.url(name)
    for method, content in (("GET", b"picture"), ("HEAD", b"")):
        response = ask(app, method, link)
        assert (response.status_code, response.content) == (200, content)
        assert response.headers["content-disposition"] == f'inline; filename="{name}"'
        assert response.headers["content-length"] == "7"


def test_behind_a_prefix_the_docs_find_their_description():
    app = create_app(Settings(public_url="https://example.org/edit/"))
    page = ask(app, "GET", "/docs").text
    assert re.search(r"url: ['\"]/edit/openapi.json", page)
    assert ask(app, "GET", "/openapi.json").json()["servers"] == [{"url": "/edit"}]


def test_a_body_with_two_lengths_is_refused():
    headers = {"Content-Length": "5", "Transfer-Encoding": "chunked"}
    response = ask(create_app(Settings()), "POST", "/inference", headers=headers, content=b"x")
    assert response.status_code == 400
    assert response.json()["error"]["code"] == "body-length-unclear"
    assert response.headers["connection"] == "close"


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"model": "/nonexistent"}, "there is no folder /nonexistent"),
        ({"jobs_file": Path("/")}, "the jobs in / cannot be used: "),
        ({"webhook_secret": "short"}, "webhook_secret must be whsec_"),
        ({"webhook_hosts": ("http://a/b",)}, "the allow-list of hosts has 'http://a/b'"),
    ],
)
def test_what_cannot_be_served_is_refused_before_anything_loads(settings, said):
    with pytest.raises(FluxfireError, match=said):
        create_app(Settings(**settings))


def test_metrics_tell_keys_stores_and_the_gpus_memory():
    metrics = Metrics()
    metrics.count_failure("edit-failed", "ann")
    metrics.count_failure("storage", None)
    metrics.count_store_failure("sweep")
    metrics.count_webhook("given-up")
    gpu = {"allocated": 3, "reserved": 4, "total": 5}
    engine = SimpleNamespace(waiting=1, running=2, state="ready", gpu_bytes=gpu)
    lines = metrics.text(engine).decode().splitlines()
    for line in (
        'fluxfire_edits_total{key="ann",outcome="edit-failed"} 1.0',
        'fluxfire_edits_total{key="",outcome="storage"} 1.0',
        'fluxfire_store_failures_total{action="put"} 1.0',
        'fluxfire_store_failures_total{action="sweep"} 1.0',
        'fluxfire_webhooks_total{outcome="given-up"} 1.0',
        'fluxfire_gpu_memory_bytes{kind="reserved"} 4.0',
    ):
        assert line in lines
    assert "fluxfire_ready 1.0" in lines
    assert "fluxfire_ready 0.0" in metrics.text(engine, stores=False).decode().splitlines()


def test_with_a_store_that_failed_it_is_alive_but_not_ready(tmp_path):
    app = create_app(Settings(storage=str(tmp_path)))
    app.state.engine = SimpleNamespace(state="ready", facts=None, trouble=None)
    app.state.service = SimpleNamespace(store_watch=StoreWatch(app.state.storage))
    assert ask(app, "GET", "/ready").status_code == 200
    app.state.service.store_watch.note_failure()
    response = ask(app, "GET", "/ready")
    assert (response.status_code, response.json()["status"]) == (503, "no-store")
    assert ask(app, "GET", "/health").status_code == 200  # a restart would not help


def test_a_store_that_cannot_be_read_is_counted(tmp_path):
    app = create_app(Settings(storage=str(tmp_path / "in"), secret=SECRET))
    link = app.state.storage.url(name := fresh_name("PNG"))
    (tmp_path / "in" / name).mkdir()
    response = ask(app, "GET", link)
    assert (response.status_code, response.json()["error"]["code"]) == (503, "storage")
    engine = SimpleNamespace(waiting=0, running=0, state="ready", gpu_bytes={})
    text = app.state.metrics.text(engine).decode()
    assert 'fluxfire_store_failures_total{action="read"} 1.0' in text


def test_the_description_names_the_fields_of_jobs():
    told = ask(create_app(Settings()), "GET", "/openapi.json").json()["paths"]

    def fields(path):
        body = told[path]["post"]["requestBody"]["content"]["application/json"]["schema"]
        return set(body["properties"])

    assert fields("/jobs") - fields("/inference") == {"webhook_url"}
    names = {one["name"] for one in told["/jobs"]["post"]["parameters"]}
    assert "idempotency-key" in names
    assert json.dumps(told).count("webhook_url") >= 2  # in a form, too


def test_a_database_that_fails_is_told_without_its_place(tmp_path, caplog):
    app = create_app(Settings())
    store = JobStore(tmp_path / "jobs")
    app.state.jobs = Jobs(SimpleNamespace(settings=Settings()), store)
    sqlite3.connect(tmp_path / "jobs").execute("DROP TABLE jobs").connection.close()
    response = ask(app, "GET", "/jobs/a")
    assert (response.status_code, response.json()["error"]["code"]) == (503, "jobs")
    assert str(tmp_path) not in response.text
    assert f"the jobs in {tmp_path / 'jobs'} failed: no such table" in caplog.text
