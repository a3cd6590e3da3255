"""Jobs, with a service that does what the test says."""

from __future__ import annotations

import asyncio
import base64
import gc
import json
import sqlite3
import weakref
from types import SimpleNamespace

import pytest

pytest.importorskip("fastapi")

import idle_loop
from fluxfire.errors import FluxfireError
from fluxfire.serve import jobs as jobs_module
from fluxfire.serve import webhooks as webhooks_module
from fluxfire.serve.allowed_hosts import FetchRefusedError
from fluxfire.serve.errors import RefusedError
from fluxfire.serve.job_store import JobStore, StoredJob
from fluxfire.serve.jobs import Jobs
from fluxfire.serve.keys import Keys, new_key
from fluxfire.serve.request_body import SentRequest
from fluxfire.serve.schema import EditAnswer, JobRequest, Timings
from fluxfire.serve.settings import Settings
from fluxfire.serve.store_watch import StoreWatch
from fluxfire.serve.webhooks import PAUSES, Webhooks, read_secret, signed_headers

SECRET = "whsec_" + base64.b64encode(bytes(range(32))).decode()
PHASES = dict.fromkeys(Timings.model_fields, 0.0)
DONE = EditAnswer(
    images=[
        {
            "data_url": "data:image/png;base64,AAAA",
            "url": None,
            "filename": "a.png",
            "filepath": None,
            "seed": 1,
            "width": 16,
            "height": 16,
        }
    ],
    seed=1,
    quality="faithful",
    steps=["computed"] * 5,
    hit_rate=0.0,
    warnings=[],
    inference_time=0.0,
    processing_time=0.0,
    total_time=0.0,
    timings=Timings(**PHASES),
)


@pytest.fixture(autouse=True)
def _one_time(monkeypatch):
    """Let jobs look at the loop's clock."""

    def now():
        return asyncio.get_running_loop().time()

    monkeypatch.setattr(jobs_module, "time", SimpleNamespace(monotonic=now, time=now))


def asked(picture=None, **fields):
    return SentRequest(JobRequest(prompt="x", steps=5, **fields), picture)


class Engine:
    """Gives places, and counts them."""

    def __init__(self):
        self.places, self.full, self.stopping = set(), False, asyncio.Event()

    def reserve(self, level, owner=None, *, accepted=False):
        if self.full and not accepted:
            raise RefusedError("full", status=429, code="queue-full")
        place = object()
        self.places.add(place)
        return place

    def release(self, place):
        self.places.discard(place)

    def position(self, ticket):
        return None if ticket.began else 0

    async def until_stopping(self):
        await self.stopping.wait()
        raise RefusedError("the service is stopping", status=503, code="stopping")


class Ticket:
    """Of an edit at its third step; holds pictures, in truth."""

    step, steps = 3, 5

    def __init__(self, began):
        self.began, self.changed = began, asyncio.Event()


class Service:
    """Ends an edit when, and how, the test says."""

    def __init__(self, **settings):
        self.settings, self.engine = Settings(**settings), Engine()
        self.ends, self.sent, self.began = [], [], 1.0
        self.store_watch = StoreWatch(None)

    async def edit(self, sent, place, on_ticket):
        self.sent.append((sent.request.model_dump(exclude_unset=True), sent.file))
        sent = None  # as the true one drops the picture
        on_ticket(Ticket(self.began))
        self.ends.append(asyncio.get_running_loop().create_future())
        return await self.ends[-1]


def jobs_of(service, path=None, **more):
    return Jobs(service, JobStore(path), **more)


async def begun(service, jobs, n=1, owner=None):
    names = [await jobs.begin(asked(), owner) for _ in range(n)]
    await edits(service, n)
    return names


async def edits(service, n):
    while len(service.ends) < n:  # noqa: ASYNC110
        await asyncio.sleep(0.01)


async def end(service, which, error=None):
    if error is None:
        service.ends[which].set_result(DONE)
    else:
        service.ends[which].set_exception(error)


async def seen(jobs, name, owner=None):
    """The last state of a job."""
    async for now in jobs.watch(name, owner):
        last = now or last  # noqa: F821 - None is never the first
    return last


def test_an_ended_job_keeps_its_step_and_gives_its_place_back():
    async def story():
        service = Service()
        (job,) = await begun(service, jobs := jobs_of(service))
        assert (await jobs.show(job, None)).status == "running"
        assert len(service.engine.places) == 1
        await end(service, 0, RefusedError("no", status=422, code="no"))
        shown = await seen(jobs, job)
        assert (shown.status, shown.step, shown.steps, shown.error.code) == ("failed", 3, 5, "no")
        assert service.engine.places == set()

    idle_loop.run(story())


def test_a_picture_of_a_job_is_its_owners():
    async def story():
        service = Service()
        (job,) = await begun(service, jobs := jobs_of(service), owner="ann")
        with pytest.raises(RefusedError, match="is running and has 0 pictures"):
            await jobs.image(job, 0, "ann")
        await end(service, 0)
        await seen(jobs, job, "ann")
        assert await jobs.image(job, 0, "ann") == DONE.images[0]
        with pytest.raises(RefusedError, match="no picture 1; they are numbered from 0"):
            await jobs.image(job, 1, "ann")
        with pytest.raises(RefusedError, match="no such job") as refusal:
            await jobs.image(job, 0, "bob")
        assert refusal.value.status == 404

    idle_loop.run(story())


def test_what_nobody_expects_fails_the_job():
    async def story():
        service = Service()
        (job,) = await begun(service, jobs := jobs_of(service))
        await end(service, 0, RuntimeError("a fault of ours"))
        shown = await seen(jobs, job)
        assert (shown.status, shown.error.code) == ("failed", "internal")
        assert "a fault of ours" not in shown.error.message

    idle_loop.run(story())


def test_a_job_cancelled_before_it_began_has_ended():
    async def story():
        jobs = jobs_of(service := Service())
        job = await jobs.begin(asked(), None)
        assert (await jobs.cancel(job, None)).status == "cancelled"
        assert (await jobs.cancel(job, None)).status == "cancelled"
        assert service.engine.places == set()

    idle_loop.run(story())


def test_a_cancelled_job_keeps_nothing_of_what_was_sent():
    async def story():
        service, sent = Service(), asked(b"a picture")
        jobs = jobs_of(service)
        job = await jobs.begin(sent, None)
        watched = weakref.ref(sent)
        del sent
        await edits(service, 1)
        await jobs.cancel(job, None)
        await asyncio.sleep(0)
        gc.collect()
        assert watched() is None

    idle_loop.run(story())


def test_a_finished_job_is_kept_for_its_time_whoever_begins_others():
    async def story():
        service = Service(max_jobs=2, job_seconds=3600)
        jobs = jobs_of(service)
        names = await begun(service, jobs, 2, "ann")
        for number in (0, 1):
            await end(service, number)
            await seen(jobs, names[number], "ann")
        with pytest.raises(RefusedError, match="keeps 2 jobs for you, and 2 is the most") as full:
            await jobs.begin(asked(), "ann")
        assert full.value.status == 429
        await jobs.begin(asked(), "bob")
        await asyncio.sleep(3590)
        assert (await jobs.show(names[0], "ann")).result == DONE
        with pytest.raises(RefusedError, match="there is no such job"):
            await jobs.show(names[0], "bob")
        await asyncio.sleep(20)
        with pytest.raises(RefusedError, match="there is no such job"):
            await jobs.show(names[0], "ann")
        await jobs.begin(asked(), "ann")
        await jobs.close()

    idle_loop.run(story())


def test_a_job_that_the_queue_refuses_leaves_nothing():
    async def story():
        service = Service()
        jobs, service.engine.full = jobs_of(service), True
        for _ in range(2):
            with pytest.raises(RefusedError, match="full"):
                await jobs.begin(asked(), None, "one")
        service.engine.full = False
        assert (await jobs.show(await jobs.begin(asked(), None, "one"), None)).error is None
        await jobs.close()

    idle_loop.run(story())


def test_watchers_that_leave_leave_nothing_behind():
    async def story():
        service = Service()
        (job,) = await begun(service, jobs := jobs_of(service))
        await asyncio.sleep(0.05)
        before = len(asyncio.all_tasks())

        async def watch():
            async for _ in jobs.watch(job, None):
                pass

        watchers = [asyncio.create_task(watch()) for _ in range(5)]
        await asyncio.sleep(0.05)
        for watcher in watchers:
            watcher.cancel()
        await asyncio.sleep(0.05)
        assert len(asyncio.all_tasks()) == before
        await jobs.close()

    idle_loop.run(story())


def test_a_watcher_hears_after_a_long_silence_that_nothing_changed():
    async def story():
        service = Service()
        (job,) = await begun(service, jobs := jobs_of(service))
        heard = jobs.watch(job, None)
        assert (await anext(heard)).status == "running"
        began = asyncio.get_running_loop().time()
        assert await anext(heard) is None
        silent = asyncio.get_running_loop().time() - began
        assert silent == pytest.approx(jobs_module._QUIET, abs=1.1)  # it looks once a second
        await jobs.close()
        await heard.aclose()

    idle_loop.run(story())


def test_the_same_key_with_the_same_request_is_the_same_job():
    async def story():
        service = Service()
        jobs = jobs_of(service)
        first, again = await asyncio.gather(
            *(jobs.begin(asked(b"a"), "ann", "one") for _ in range(2))
        )
        assert first == again
        assert await jobs.begin(asked(b"a"), "bob", "one") != first
        for other in (asked(b"b"), asked(b"a", seed=3)):
            with pytest.raises(RefusedError, match="came with another request") as refusal:
                await jobs.begin(other, "ann", "one")
            assert (refusal.value.status, refusal.value.code) == (422, "idempotency-key-reused")
        for odd in ("", "two words", "ü", "x" * 256):
            with pytest.raises(RefusedError, match="1 to 255 characters of ASCII"):
                await jobs.begin(asked(), "ann", odd)
        await edits(service, 2)
        await end(service, 0)
        assert json.loads(await jobs.result(first, "ann"))["seed"] == 1
        assert await jobs.begin(asked(b"a"), "ann", "one") == first
        await jobs.close()

    idle_loop.run(story())


def test_a_result_that_is_none_is_told_with_its_status():
    async def story():
        service = Service()
        (job,) = await begun(service, jobs := jobs_of(service))
        waiting = asyncio.create_task(jobs.result(job, None))
        await end(service, 0, RefusedError("no", status=507, code="out-of-memory"))
        with pytest.raises(RefusedError, match="no") as refusal:
            await waiting
        assert (refusal.value.status, refusal.value.code) == (507, "out-of-memory")

    idle_loop.run(story())


def test_after_a_restart_what_waited_runs_and_what_ended_is_there(tmp_path):
    file = tmp_path / "in" / "jobs.sqlite"
    names = []

    async def before():
        service = Service()
        jobs = jobs_of(service, file)
        names.append(await jobs.begin(asked(), "ann", "one"))
        await edits(service, 1)
        await end(service, 0)
        await seen(jobs, names[0], "ann")
        service.began = None
        names.append(await jobs.begin(asked(b"a picture", width=512, height=512), "ann"))
        await edits(service, 2)
        stopping = asyncio.create_task(jobs.suspend())
        service.engine.stopping.set()
        assert (await seen(jobs, names[1], "ann")).status == "queued"
        await stopping
        while service.engine.places:  # noqa: ASYNC110 - or a shutdown would wait for it; no event
            await asyncio.sleep(0.01)
        await jobs.close()
        jobs._store.close()

    async def after():
        service = Service()
        service.engine.full = True  # which refuses no job that was taken before
        jobs = jobs_of(service, file)
        assert (await jobs.show(names[0], "ann")).result == DONE
        assert await jobs.begin(asked(), "ann", "one") == names[0]
        resuming = asyncio.create_task(jobs.resume())
        await edits(service, 1)
        fields, picture = service.sent[0]
        assert picture == b"a picture"
        assert fields == {"prompt": "x", "steps": 5, "width": 512, "height": 512}
        await end(service, 0)
        assert (await seen(jobs, names[1], "ann")).status == "done"
        await resuming
        jobs._store.close()

    idle_loop.run(before())
    assert file.stat().st_mode & 0o077 == 0  # it holds others' words and pictures
    idle_loop.run(after())
    rows = sqlite3.connect(file).execute("SELECT request, picture FROM jobs").fetchall()
    assert rows == [(None, None)] * 2  # what was sent is deleted


def test_a_job_that_crashes_the_service_is_tried_twice(tmp_path):
    file = tmp_path / "jobs.sqlite"
    names = []

    async def crash():
        """End without any of what a shutdown does."""
        service = Service()
        jobs = jobs_of(service, file)
        if not names:
            names.append(await jobs.begin(asked(), None))
        resuming = asyncio.create_task(jobs.resume())
        await edits(service, 1)
        (job,) = jobs._live.values()
        while jobs._store.get(job.row.id).tries == job.row.tries:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        resuming.cancel()
        jobs._store.close()
        for task in asyncio.all_tasks() - {asyncio.current_task()}:
            task.cancel()

    async def last():
        service = Service()
        jobs = jobs_of(service, file)
        await jobs.resume()
        shown = await jobs.show(names[0], None)
        assert (shown.status, shown.error.code) == ("failed", "interrupted")
        assert "ended twice while it made this edit" in shown.error.message
        assert service.ends == []
        jobs._store.close()

    idle_loop.run(crash())
    idle_loop.run(crash())
    idle_loop.run(last())


def test_a_job_can_be_cancelled_before_it_is_taken_up_again(tmp_path):
    async def story():
        jobs = jobs_of(service := Service(), tmp_path / "jobs")
        row = StoredJob(id="a", owner="", status="queued", created=0.0, steps=5)
        jobs._store.add(row, '{"prompt": "x"}', None)
        assert (await jobs.show("a", None)).status == "queued"
        assert (await jobs.cancel("a", None)).status == "cancelled"
        await jobs.resume()
        assert service.ends == []

    idle_loop.run(story())


def test_without_a_file_a_shutdown_cancels():
    async def story():
        service = Service()
        (job,) = await begun(service, jobs := jobs_of(service))
        await jobs.close()
        assert (await jobs.show(job, None)).status == "cancelled"

    idle_loop.run(story())


def test_two_services_do_not_share_a_file(tmp_path):
    store = JobStore(tmp_path / "jobs")
    with pytest.raises(FluxfireError, match="another service uses the jobs of"):
        JobStore(tmp_path / "jobs")
    store.close()
    JobStore(tmp_path / "jobs").close()


def test_files_that_are_no_database_of_jobs(tmp_path):
    text, later = tmp_path / "text", tmp_path / "later"
    text.write_text("no database, though it is a long text" * 100)
    sqlite3.connect(later).execute("PRAGMA user_version = 7").connection.close()
    for path, why in ((text, "not a database"), (later, "its version is 7"), (tmp_path, "")):
        with pytest.raises(FluxfireError, match=f"the jobs in .* cannot be used: .*{why}"):
            JobStore(path)


def test_a_key_has_so_many_edits_a_day(tmp_path):
    _, line = new_key("ann")
    file = tmp_path / "keys"
    file.write_text(f"{line} edits_per_day=2 max_queue=3\n{new_key('bob')[1]}")
    keys = Keys.read(file)
    assert (keys.limits("ann").max_queue, keys.limits("bob").max_queue) == (3, None)

    async def story():
        service = Service()
        jobs = jobs_of(service, keys=keys)
        for _ in range(2):
            await jobs.reserve(asked(), "ann")
        with pytest.raises(RefusedError, match="may make 2 edits a day") as refusal:
            await jobs.begin(asked(), "ann")
        assert (refusal.value.status, refusal.value.code) == (429, "quota-used")
        assert 0 < refusal.value.retry_after <= 24 * 3600
        for _ in range(5):
            await jobs.reserve(asked(), "bob")
        assert len(service.engine.places) == 7  # the refused one gave its place back
        assert jobs._store.count_edit("ann", "another day", 2)

    idle_loop.run(story())


def hooked(store, post=None, outcomes=None, **settings):
    """Webhooks of a service that allows them."""
    allowed = {"webhook_hosts": ("hooks.example.org",), "webhook_secret": SECRET} | settings
    on_end = (outcomes if outcomes is not None else []).append
    return Webhooks(Settings(**allowed), store, post=post, on_end=on_end)


@pytest.mark.parametrize(
    ("settings", "url", "said"),
    [
        ({"webhook_secret": None}, "https://hooks.example.org/", "posts no webhooks"),
        ({"webhook_hosts": ()}, "https://hooks.example.org/", "posts no webhooks"),
        ({}, "https://other.example.org/", "a host that the server's operator allows"),
        ({}, "http://hooks.example.org/", "a host that the server's operator allows"),
        ({}, "file:///etc/passwd", "a host that the server's operator allows"),
    ],
)
def test_webhooks_go_where_they_may(settings, url, said):
    async def story():
        store = JobStore(None)
        jobs = Jobs(service := Service(), store, hooked(store, **settings))
        with pytest.raises(RefusedError, match=said) as refusal:
            await jobs.begin(asked(webhook_url=url), None)
        assert refusal.value.code == "webhook-not-allowed"
        assert service.engine.places == set()

    idle_loop.run(story())


def test_a_webhook_tells_the_end_and_is_tried_again():
    posted, outcomes, answers = [], [], [500, None, 200]

    async def post(url, body, headers):
        posted.append((url, body, headers))
        if (status := answers.pop(0)) is None:
            raise FetchRefusedError("the host is away", status=424, code="image-url-failed")
        return status

    async def story():
        service, store = Service(), JobStore(None)
        hooks = hooked(store, post, outcomes)
        jobs = Jobs(service, store, hooks)
        url = "https://hooks.example.org/ended?for=ann"
        job = await jobs.begin(asked(webhook_url=url), None)
        await edits(service, 1)
        await hooks.post_due(jobs.webhook_body, 10.0**9)
        assert posted == []  # it has not ended
        await end(service, 0)
        await seen(jobs, job)
        now = asyncio.get_running_loop().time()
        for pause in (0, *PAUSES[:2], 10.0**6):
            await hooks.post_due(jobs.webhook_body, now + pause / 2)  # too early, but for the first
            now += pause
            await hooks.post_due(jobs.webhook_body, now)
        assert [(where, name["webhook-id"]) for where, _, name in posted] == [(url, job)] * 3
        assert outcomes == ["delivered"]
        told = json.loads(posted[0][1])
        assert (told["id"], told["status"]) == (job, "done")
        assert told["result"]["images"][0]["data_url"] is None

    idle_loop.run(story())


def test_a_webhook_is_given_up(tmp_path):
    outcomes, tries = [], []

    async def post(url, body, headers):
        tries.append(headers["webhook-timestamp"])
        return 404

    async def story():
        store = JobStore(None)
        hooks = hooked(store, post, outcomes)
        row = {"owner": "", "status": "done", "created": 0.0, "steps": 1, "finished": 0.0}
        store.add(StoredJob(id="a", webhook_url="https://x", webhook_due=0.0, **row), None, None)
        now = 0.0
        for pause in (*PAUSES, 10.0**6):
            store.forget(before=now)  # kept until it is delivered or given up
            await hooks.post_due(lambda job: b"{}", now)
            now += pause
        await hooks.post_due(lambda job: b"{}", now)
        assert (len(tries), outcomes) == (len(PAUSES) + 1, ["given-up"])
        store.forget(before=now)
        assert store.get("a") is None

    idle_loop.run(story())


def test_the_signature_is_that_of_standard_webhooks():
    # The example of the specification's own libraries.
    key = read_secret("whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw")
    headers = signed_headers(
        key, "msg_p5jXN8AQM9LWM0D4loKWxJek", 1614265330, b'{"test": 2432232314}'
    )
    assert headers["webhook-signature"] == "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE="


@pytest.mark.parametrize("secret", ["", "secret", "whsec_", "whsec_AAAA", "whsec_%%%", SECRET[6:]])
def test_secrets_that_sign_nothing(secret):
    with pytest.raises(FluxfireError, match="make one with echo") as refusal:
        read_secret(secret)
    assert len(secret) < 10 or secret not in str(refusal.value)


def test_webhooks_go_on_after_a_failure(monkeypatch, caplog):
    monkeypatch.setattr(webhooks_module, "time", SimpleNamespace(time=lambda: 0.0))

    async def story():
        hooks = hooked(store := JobStore(None))
        calls = []

        def due(now):
            calls.append(now)
            raise FluxfireError("the jobs in memory failed")

        monkeypatch.setattr(store, "due_webhooks", due)
        running = asyncio.create_task(hooks.run(lambda job: b""))
        while len(calls) < 2:  # noqa: ASYNC110
            await asyncio.sleep(0.5)
        running.cancel()

    idle_loop.run(story())
    assert "the jobs in memory failed" in caplog.text
