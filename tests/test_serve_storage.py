"""Where pictures are kept: a folder, and a bucket of a real S3 server on this machine."""

from __future__ import annotations

import os
import re
import threading
import time
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fluxfire.errors import FluxfireError
from fluxfire.serve.local_storage import LocalStorage
from fluxfire.serve.s3_storage import S3Storage
from fluxfire.serve.storage import LinkRefusedError, StorageError, fresh_name
from fluxfire.serve.stores import open_storage

SECRET = b"a secret of many bytes"
NAME = "20250131-0123456789abcdef0123456789abcdef.png"
WRONG_NAMES = [
    "",
    ".",
    "..",
    "../x.png",
    "/etc/passwd",
    "a.png",
    f"../{NAME}",
    f"sub/{NAME}",
    f"{NAME}\n",
    f"{NAME}\0",
    NAME.upper(),
    NAME.replace("png", "html"),
    f".{NAME}",
    f"{NAME}/",
    "..\\" + NAME,
    NAME.replace("2025", "٢٠٢٥"),
]


class Clock:
    def __init__(self):
        self.now = time.time()

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def local(tmp_path, clock):
    storage = LocalStorage(tmp_path, secret=SECRET, retention_seconds=3600, clock=clock)
    storage.check()
    return storage


def taken_apart(url):
    parts = urlsplit(url)
    query = parse_qs(parts.query, strict_parsing=True)
    assert sorted(query) == ["expires", "signature"]
    return parts.path, int(query["expires"][0]), query["signature"][0]


def read(storage, url):
    path, expires, signature = taken_apart(url)
    return storage.read(path.removeprefix("/files/"), expires, signature)


@pytest.mark.parametrize("file_format", ["PNG", "JPG", "WEBP"])
def test_names_are_fresh_and_say_the_format(file_format):
    names = {fresh_name(file_format) for _ in range(100)}
    assert len(names) == 100
    assert all(
        re.fullmatch(rf"\d{{8}}-[0-9a-f]{{32}}\.{file_format.lower()}", each) for each in names
    )


@pytest.mark.parametrize(
    ("file_format", "media_type"),
    [("PNG", "image/png"), ("JPG", "image/jpeg"), ("WEBP", "image/webp")],
)
def test_local_links_lead_to_what_was_stored(local, file_format, media_type):
    name = fresh_name(file_format)
    local.put(name, b"picture", media_type)
    assert taken_apart(local.url(name))[0] == f"/files/{name}"
    assert read(local, local.url(name)) == (b"picture", media_type)
    assert local.get(name) == b"picture"


def test_local_links_expire(local, clock):
    local.put(NAME, b"picture", "image/png")
    url = local.url(NAME)
    clock.now += 3598
    assert read(local, url)[0] == b"picture"
    clock.now += 2
    with pytest.raises(LinkRefusedError) as caught:
        read(local, url)
    assert (caught.value.status, caught.value.code) == (410, "link-expired")


def test_links_can_be_shorter_than_pictures_are_kept_but_not_longer(tmp_path, clock):
    for asked, granted in ((60, 60), (99_999, 3600), (None, 3600)):
        storage = LocalStorage(
            tmp_path, secret=SECRET, retention_seconds=3600, link_seconds=asked, clock=clock
        )
        assert taken_apart(storage.url(NAME))[1] == int(clock.now + granted)


def test_a_link_to_what_is_gone(local):
    with pytest.raises(LinkRefusedError) as caught:
        read(local, local.url(NAME))
    assert (caught.value.status, caught.value.code) == (404, "file-gone")
    with pytest.raises(LinkRefusedError, match="no longer kept"):
        local.get(NAME)


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_no_other_signature_is_good(tmp_path_factory, data):
    folder = tmp_path_factory.getbasetemp() / "signed"
    folder.mkdir(exist_ok=True)
    storage = LocalStorage(folder, secret=SECRET, retention_seconds=3600)
    storage.put(NAME, b"picture", "image/png")
    _, expires, signature = taken_apart(storage.url(NAME))
    assert storage.read(NAME, expires, signature)[0] == b"picture"
    at = data.draw(st.integers(0, len(signature) - 1))
    changed = signature[:at] + data.draw(st.characters()) + signature[at + 1 :]
    other = fresh_name("PNG")
    storage.put(other, b"another", "image/png")
    tries = [
        (NAME, expires, data.draw(st.text(max_size=70))),
        (NAME, expires, changed),
        (NAME, expires + data.draw(st.integers()), signature),
        (data.draw(st.one_of(st.text(), st.just(other))), expires, signature),
    ]
    for attempt in tries:
        if attempt == (NAME, expires, signature):
            continue
        with pytest.raises(LinkRefusedError) as caught:
            storage.read(*attempt)
        assert caught.value.status == 403


def test_another_secret_signs_otherwise(tmp_path, local):
    local.put(NAME, b"picture", "image/png")
    other = LocalStorage(tmp_path, secret=SECRET[::-1], retention_seconds=3600)
    with pytest.raises(LinkRefusedError, match="signature is wrong"):
        read(local, other.url(NAME))


@pytest.mark.parametrize("name", WRONG_NAMES)
def test_names_with_paths_are_refused(tmp_path, name):
    (tmp_path / "in").mkdir()
    storage = LocalStorage(tmp_path / "in", secret=SECRET, retention_seconds=60)
    with pytest.raises(StorageError):
        storage.put(name, b"picture", "image/png")
    with pytest.raises(StorageError):
        storage.url(name)
    # Even where somebody knows the secret.
    expires = int(time.time()) + 60
    with pytest.raises(StorageError):
        storage.read(name, expires, storage._signature(name, expires))
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


@pytest.mark.parametrize("step", ["fsync", "replace"])
@pytest.mark.parametrize("failure", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_what_fails_before_the_renaming_leaves_nothing(local, tmp_path, monkeypatch, step, failure):
    def fail(*_):
        raise failure

    monkeypatch.setattr(*((os, step, fail) if step == "fsync" else (Path, step, fail)))
    with pytest.raises((StorageError, KeyboardInterrupt)) as caught:
        local.put(NAME, b"picture", "image/png")
    if isinstance(failure, OSError):
        assert caught.type is StorageError
        assert "No space left on device" in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_what_a_crash_left_is_invisible_and_swept(local, tmp_path, clock, monkeypatch):
    # A process that dies runs nothing any more, so no clean-up either.
    monkeypatch.setattr(Path, "replace", lambda *_: None)
    monkeypatch.setattr(Path, "unlink", lambda *_, **__: None)
    local.put(NAME, b"picture", "image/png")
    monkeypatch.undo()
    (left,) = tmp_path.iterdir()
    with pytest.raises(LinkRefusedError, match="no longer kept"):
        read(local, local.url(NAME))
    with pytest.raises(StorageError):
        local.url(left.name)
    assert local.sweep() == 0
    assert left.exists()
    assert local.sweep(clock.now + 3601) == 0  # Half a picture is none.
    assert not left.exists()


def test_a_local_sweep_deletes_old_pictures_and_nothing_else(local, tmp_path, clock):
    old, young = fresh_name("PNG"), fresh_name("WEBP")
    for name in (old, young):
        local.put(name, b"picture", "image/png")
    others = [tmp_path / "holiday.png", tmp_path / "20250131-notes.txt"]
    for path in others:
        path.write_text("not ours")
    folder = tmp_path / fresh_name("JPG")
    folder.mkdir()
    link = tmp_path / fresh_name("JPG")
    link.symlink_to(others[0])
    for path in (tmp_path / old, *others, folder):
        os.utime(path, (clock.now - 4000, clock.now - 4000))
    assert local.sweep() == 1
    kept = {young, folder.name, link.name, *(path.name for path in others)}
    assert {path.name for path in tmp_path.iterdir()} == kept
    (tmp_path / young).unlink()
    os.utime(link, (clock.now - 4000, clock.now - 4000), follow_symlinks=False)
    assert local.sweep() == 0
    assert {path.name for path in tmp_path.iterdir()} == kept - {young}


def test_a_sweep_survives_another_one(local, tmp_path, clock, monkeypatch):
    local.put(NAME, b"picture", "image/png")
    unlink = Path.unlink
    monkeypatch.setattr(Path, "unlink", lambda path: (unlink(path), unlink(path)))
    assert local.sweep(clock.now + 4000) == 0
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_used(tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    storage = LocalStorage(file / "in", secret=SECRET, retention_seconds=60)
    for deed in (
        storage.check,
        storage.sweep,
        lambda: storage.put(NAME, b"", "image/png"),
        lambda: read(storage, storage.url(NAME)),
    ):
        with pytest.raises(StorageError, match="give the server a writable folder"):
            deed()


def test_check_makes_the_folder_and_leaves_nothing_in_it(tmp_path):
    storage = open_storage(
        str(tmp_path / "a" / "b"), secret=SECRET, retention_seconds=60, link_seconds=60
    )
    assert isinstance(storage, LocalStorage)
    storage.check()
    assert list((tmp_path / "a" / "b").iterdir()) == []


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("", "give a folder"),
        ("https://example.org/x", "give a folder"),
        ("file:///tmp", "give a folder"),
        ("s3://", "not a bucket's name"),
        ("s3://Bucket_", "not a bucket's name"),
        ("s3://key:hidden@bucket/x", "credentials in the environment"),
        (
            "s3://bucket/x?endpiont=https://example.org",
            "endpiont; the options are endpoint and region",
        ),
        ("s3://bucket/x?endpoint=example.org", "endpoint"),
    ],
)
def test_storages_that_make_no_sense(where, message):
    pytest.importorskip("boto3")
    with pytest.raises(StorageError, match=message) as caught:
        open_storage(where, secret=SECRET, retention_seconds=60, link_seconds=60)
    assert "hidden" not in str(caught.value)
    assert isinstance(caught.value, FluxfireError)


def test_settings_that_make_no_sense(tmp_path):
    with pytest.raises(StorageError, match="needs 16 bytes or more"):
        LocalStorage(tmp_path, secret=b"short", retention_seconds=60)
    for wrong in (0, -1, float("nan")):
        with pytest.raises(StorageError, match="one second or more"):
            LocalStorage(tmp_path, secret=SECRET, retention_seconds=wrong)
        with pytest.raises(StorageError, match="one second or more"):
            LocalStorage(tmp_path, secret=SECRET, retention_seconds=60, link_seconds=wrong or -1)


# A bucket.


@pytest.fixture(scope="module")
def s3():
    """A whole S3 server on loopback, by moto, with the client that makes its buckets."""
    moto_server = pytest.importorskip("moto.server")
    boto3 = pytest.importorskip("boto3")
    server = moto_server.ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    endpoint = f"http://{host}:{port}"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ACCESS_KEY_ID", "test")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "test")
        patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        patch.setenv("AWS_CONFIG_FILE", os.devnull)
        for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_REGION", "AWS_DEFAULT_REGION"):
            patch.delenv(name, raising=False)
        yield endpoint, boto3.client("s3", endpoint_url=endpoint, region_name="us-east-1")
    server.stop()


@pytest.fixture
def bucket(s3, request):
    name = f"bucket-{os.urandom(4).hex()}"
    s3[1].create_bucket(Bucket=name)
    return name


def s3_storage(endpoint, bucket, prefix="some/place", **options):
    settings = {"retention_seconds": 3600, "link_seconds": 600} | options
    return S3Storage(bucket, prefix, endpoint=endpoint, region="us-east-1", **settings)


def keys(s3, bucket):
    return {entry["Key"] for entry in s3[1].list_objects_v2(Bucket=bucket).get("Contents", ())}


def test_a_bucket_keeps_pictures_with_links_that_work(s3, bucket):
    httpx = pytest.importorskip("httpx")
    storage = open_storage(
        f"s3://{bucket}/some/place/?endpoint={s3[0]}&region=auto",
        secret=SECRET,
        retention_seconds=3600,
        link_seconds=600,
    )
    assert isinstance(storage, S3Storage)
    storage.check()
    assert keys(s3, bucket) == set()
    storage.put(NAME, b"picture", "image/png")
    assert keys(s3, bucket) == {f"some/place/{NAME}"}
    assert storage.get(NAME) == b"picture"
    with pytest.raises(LinkRefusedError, match="no longer kept"):
        storage.get(fresh_name("PNG"))
    url = storage.url(NAME)
    answer = httpx.get(url, trust_env=False, timeout=600)
    assert (answer.status_code, answer.content) == (200, b"picture")
    assert answer.headers["Content-Type"] == "image/png"
    query = parse_qs(urlsplit(url).query)
    assert query["X-Amz-Expires"] == ["600"]
    assert query["X-Amz-Algorithm"] == ["AWS4-HMAC-SHA256"]
    assert "/auto/s3/" in query["X-Amz-Credential"][0]


@pytest.mark.parametrize(
    ("link", "retention", "granted"), [(60, 3600, 60), (7200, 3600, 3600), (1e9, 1e9, 604_800)]
)
def test_links_to_a_bucket_are_no_longer_than_they_can_be(s3, link, retention, granted):
    storage = s3_storage(s3[0], "bucket", link_seconds=link, retention_seconds=retention)
    assert parse_qs(urlsplit(storage.url(NAME)).query)["X-Amz-Expires"] == [str(granted)]


@pytest.mark.parametrize("name", WRONG_NAMES)
def test_a_bucket_takes_no_other_names(s3, name):
    storage = s3_storage(s3[0], "bucket")
    with pytest.raises(StorageError, match="not a picture's name"):
        storage.put(name, b"", "image/png")
    with pytest.raises(StorageError, match="not a picture's name"):
        storage.get(name)
    with pytest.raises(StorageError, match="not a picture's name"):
        storage.url(name)


@pytest.mark.parametrize("prefix", ["", "some/place"])
def test_a_sweep_of_a_bucket_deletes_old_pictures_and_nothing_else(s3, bucket, prefix, monkeypatch):
    models = pytest.importorskip("moto.s3.models")
    storage = s3_storage(s3[0], bucket, prefix)
    before = f"{prefix}/" if prefix else ""
    old = [fresh_name("PNG") for _ in range(7)]
    young = [fresh_name("JPG") for _ in range(3)]
    for name in old + young:
        storage.put(name, b"picture", "image/png")
    others = {f"{before}notes.txt", f"{before}deeper/{NAME}", f"elsewhere/{NAME}"}
    for key in others:
        s3[1].put_object(Bucket=bucket, Key=key, Body=b"not ours")
    aged = datetime.now(UTC) - timedelta(hours=2)
    stored = models.s3_backends["123456789012"]["aws"].buckets[bucket].keys
    for key in {before + name for name in old} | others:
        stored[key].last_modified = aged.replace(tzinfo=None)
    # Three at a time, so there are several pages.
    pages = []
    storage._client.meta.events.register(
        "before-parameter-build.s3.ListObjectsV2",
        lambda params, **_: pages.append(params.setdefault("MaxKeys", 3)),
    )
    assert storage.sweep() == 7
    assert len(pages) > 1
    assert keys(s3, bucket) == others | {before + name for name in young}
    assert storage.sweep(time.time() + 3700) == 3
    assert keys(s3, bucket) == others


class Flaky:
    """Stands before the S3 server: fails as told, or passes on, and notes what came."""

    def __init__(self, behind, faults):
        httpx = pytest.importorskip("httpx")
        self.seen = []
        self.faults = list(faults)
        flaky, released = self, threading.Event()
        self._released = released

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def handle_any(self):
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                flaky.seen.append((self.command, dict(self.headers)))
                fault = flaky.faults.pop(0) if flaky.faults else None
                if fault == "hang":
                    released.wait(600)
                if fault in {"hang", "close"}:
                    self.close_connection = True
                    return
                if isinstance(fault, int):
                    status, headers, content = fault, {}, b""
                else:
                    answer = httpx.request(
                        self.command,
                        behind + self.path,
                        content=body,
                        headers=dict(self.headers),
                        trust_env=False,
                        timeout=600,
                    )
                    status, content = answer.status_code, answer.content
                    headers = {"ETag": answer.headers.get("ETag", "")}
                self.send_response(status)
                for key, value in headers.items():
                    self.send_header(key, value)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            do_GET = do_PUT = do_DELETE = handle_any  # noqa: N815 - http.server's names

            def log_message(self, *_):
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,))

    def __enter__(self):
        self._thread.start()
        return self

    def saw(self, requests):
        """Whether so many came; the last may still be read, where nobody waits for its answer."""
        for _ in range(600):
            if len(self.seen) >= requests:
                break
            time.sleep(0.1)
        return len(self.seen) == requests

    def __exit__(self, *_):
        self._released.set()
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


@pytest.fixture
def impatient(monkeypatch):
    """Leave the pauses between tries out; they last seconds."""
    from botocore.retries import standard

    monkeypatch.setattr(standard.ExponentialBackoff, "delay_amount", lambda *_: 0)


@pytest.mark.parametrize("faults", [[500], [503, 503], ["close"], [503, "close", 500]])
def test_storing_goes_on_after_passing_faults(s3, bucket, impatient, faults):
    with Flaky(s3[0], faults) as flaky:
        storage = s3_storage(flaky.url, bucket, timeout_seconds=600)
        storage.put(NAME, b"picture", "image/png")
        assert len(flaky.seen) == len(faults) + 1
    stored = s3[1].get_object(Bucket=bucket, Key=f"some/place/{NAME}")
    assert stored["Body"].read() == b"picture"


def test_storing_goes_on_where_a_store_does_not_answer(s3, bucket, impatient):
    with Flaky(s3[0], ["hang"]) as flaky:
        # A busy store may not answer in time either, so it may be asked often.
        storage = s3_storage(flaky.url, bucket, timeout_seconds=1, attempts=60)
        storage.put(NAME, b"picture", "image/png")
        assert len(flaky.seen) >= 2
    stored = s3[1].get_object(Bucket=bucket, Key=f"some/place/{NAME}")
    assert stored["Body"].read() == b"picture"


@pytest.mark.parametrize("fault", [500, 503, "close", "hang"])
def test_storing_gives_up_in_the_end(s3, bucket, impatient, fault):
    with Flaky(s3[0], [fault] * 20) as flaky:
        storage = s3_storage(flaky.url, bucket, timeout_seconds=0.2, attempts=3)
        with pytest.raises(StorageError, match=f"cannot store a picture in s3://{bucket}/some"):
            storage.put(NAME, b"picture", "image/png")
        assert flaky.saw(3)
    assert keys(s3, bucket) == set()


def test_what_will_not_pass_is_tried_once(s3, bucket, impatient):
    with Flaky(s3[0], [403] * 20) as flaky:
        with pytest.raises(StorageError, match="what the credentials may do"):
            s3_storage(flaky.url, bucket).put(NAME, b"picture", "image/png")
        assert len(flaky.seen) == 1


def test_no_checksums_are_sent_that_other_stores_do_not_know(s3, bucket):
    with Flaky(s3[0], []) as flaky:
        s3_storage(flaky.url, bucket).check()
        assert [command for command, _ in flaky.seen] == ["GET", "PUT", "DELETE"]
        for _, headers in flaky.seen:
            assert not any("checksum" in key.lower() or "trailer" in key.lower() for key in headers)


def test_a_sweep_that_fails_says_so(s3, bucket, impatient):
    with Flaky(s3[0], [500] * 20) as flaky, pytest.raises(StorageError, match="cannot sweep"):
        s3_storage(flaky.url, bucket).sweep()


def test_check_finds_a_bucket_that_is_not_there(s3):
    with pytest.raises(StorageError, match="cannot use s3://no-such-bucket/.*NoSuchBucket"):
        s3_storage(s3[0], "no-such-bucket").check()


def test_check_finds_a_server_that_is_not_there(impatient):
    pytest.importorskip("boto3")
    with pytest.raises(StorageError, match="cannot use"):
        s3_storage("http://127.0.0.1:1", "bucket", timeout_seconds=1, attempts=2).check()


def test_check_finds_credentials_missing(s3, bucket, monkeypatch):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", os.devnull)
    with pytest.raises(StorageError, match="set AWS_ACCESS_KEY_ID"):
        s3_storage(s3[0], bucket).check()
