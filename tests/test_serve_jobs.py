"""Jobs, with a service that does what the test says."""

from __future__ import annotations

import asyncio
import gc
import weakref
from types import SimpleNamespace

import pytest

pytest.importorskip("fastapi")

import idle_loop
from fluxfire.serve import jobs as jobs_module
from fluxfire.serve.errors import RefusedError
from fluxfire.serve.jobs import Jobs
from fluxfire.serve.request_body import SentRequest
from fluxfire.serve.schema import EditRequest
from fluxfire.serve.settings import Settings

ASKED = SentRequest(EditRequest(prompt="x", steps=5))


@pytest.fixture(autouse=True)
def _one_time(monkeypatch):
    """Let jobs look at the loop's clock."""
    clock = SimpleNamespace(monotonic=lambda: asyncio.get_running_loop().time())
    monkeypatch.setattr(jobs_module, "time", clock)


class Engine:
    """Gives places, and counts them."""

    def __init__(self):
        self.places, self.full = set(), False

    def reserve(self, level, owner=None):
        if self.full:
            raise RefusedError("full", status=429, code="queue-full")
        place = object()
        self.places.add(place)
        return place

    def release(self, place):
        self.places.discard(place)

    def position(self, ticket):
        return None


class Ticket:
    """Of an edit at its third step; holds pictures, in truth."""

    step, steps, began = 3, 5, 1.0

    def __init__(self):
        self.changed = asyncio.Event()


class Service:
    """Ends an edit when, and how, the test says."""

    def __init__(self, **settings):
        self.settings, self.engine = Settings(**settings), Engine()
        self.ends = []

    async def edit(self, sent, place, on_ticket):
        on_ticket(Ticket())
        self.ends.append(asyncio.get_running_loop().create_future())
        return await self.ends[-1]


async def begun(service, jobs, n=1):
    made = [jobs.begin(ASKED, None) for _ in range(n)]
    await asyncio.sleep(0)
    return made


async def end(service, which, error=None):
    if error is None:
        service.ends[which].set_result(None)
    else:
        service.ends[which].set_exception(error)
    for _ in range(3):
        await asyncio.sleep(0)


def test_an_ended_job_keeps_its_step_and_lets_go_of_its_ticket():
    async def story():
        service = Service()
        jobs = Jobs(service)
        (job,) = await begun(service, jobs)
        assert job.shown(service.engine).status == "running"
        assert len(service.engine.places) == 1
        await end(service, 0, RefusedError("no", status=422, code="no"))
        assert job.ticket is None
        shown = job.shown(service.engine)
        assert (shown.status, shown.step, shown.steps, shown.error.code) == ("failed", 3, 5, "no")
        assert service.engine.places == set()

    idle_loop.run(story())


def test_what_nobody_expects_fails_the_job():
    async def story():
        service = Service()
        (job,) = await begun(service, jobs := Jobs(service))
        await end(service, 0, RuntimeError("a fault of ours"))
        shown = jobs.find(job.id, None).shown(service.engine)
        assert (shown.status, shown.error.code) == ("failed", "internal")
        assert "a fault of ours" not in shown.error.message

    idle_loop.run(story())


def test_a_job_cancelled_before_it_began_has_ended():
    async def story():
        service = Service()
        job = (jobs := Jobs(service)).begin(ASKED, None)
        await asyncio.wait_for(jobs.cancel(job), 5)
        assert job.shown(service.engine).status == "cancelled"
        assert service.engine.places == set()

    idle_loop.run(story())


def test_a_cancelled_job_keeps_nothing_of_what_was_sent():
    async def story():
        service, sent = Service(), SentRequest(EditRequest(prompt="x"), b"a picture")
        job = (jobs := Jobs(service)).begin(sent, None)
        watched = weakref.ref(sent)
        del sent
        await asyncio.sleep(0)
        await jobs.cancel(job)
        await asyncio.sleep(0)
        gc.collect()
        assert jobs.find(job.id, None) is job
        assert watched() is None

    idle_loop.run(story())


def test_looking_forgets_nothing_and_beginning_forgets_what_ended_first():
    async def story():
        service = Service(max_jobs=2)
        jobs = Jobs(service)
        early, late = await begun(service, jobs, 2)
        with pytest.raises(RefusedError, match="2 jobs are running already"):
            jobs.begin(ASKED, None)
        await end(service, 1, ValueError())
        await asyncio.sleep(1)
        await end(service, 0, ValueError())
        for _ in range(3):
            assert jobs.find(early.id, None) is early
            assert jobs.find(late.id, None) is late
        third = jobs.begin(ASKED, None)
        assert jobs.find(early.id, None) is early
        assert jobs.find(third.id, None) is third
        with pytest.raises(RefusedError, match="there is no such job"):
            jobs.find(late.id, None)  # begun later, and ended first
        await jobs.close()

    idle_loop.run(story())


def test_a_keys_jobs_make_room_for_no_others():
    async def story():
        service = Service(max_jobs=2)
        jobs = Jobs(service)
        bobs = jobs.begin(ASKED, "bob")
        await asyncio.sleep(0)
        await end(service, 0)
        anns = []
        for number in range(1, 6):
            anns.append(jobs.begin(ASKED, "ann"))
            await asyncio.sleep(0)
            await end(service, number)
        assert jobs.find(bobs.id, "bob") is bobs
        assert jobs.find(anns[-1].id, "ann") is anns[-1]
        with pytest.raises(RefusedError, match="there is no such job"):
            jobs.find(anns[0].id, "ann")
        await jobs.close()

    idle_loop.run(story())


def test_a_result_is_not_forgotten_for_a_job_that_is_not_taken():
    async def story():
        service = Service(max_jobs=1)
        (done,) = await begun(service, jobs := Jobs(service))
        await end(service, 0)
        service.engine.full = True
        with pytest.raises(RefusedError, match="full"):
            jobs.begin(ASKED, None)
        assert jobs.find(done.id, None) is done

    idle_loop.run(story())


def test_old_jobs_are_forgotten_though_nobody_looks():
    async def story():
        service = Service(job_seconds=3600)
        await begun(service, jobs := Jobs(service))
        await end(service, 0, ValueError())
        await asyncio.sleep(3590)
        assert jobs._jobs
        await asyncio.sleep(20)
        assert not jobs._jobs

    idle_loop.run(story())


def test_watchers_that_leave_leave_nothing_behind():
    async def story():
        service = Service()
        (job,) = await begun(service, jobs := Jobs(service))
        before = len(asyncio.all_tasks())

        async def watch():
            async for _ in jobs.watch(job):
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
        (job,) = await begun(service, jobs := Jobs(service))
        heard = jobs.watch(job)
        assert (await anext(heard)).status == "running"
        began = asyncio.get_running_loop().time()
        assert await anext(heard) is None
        silent = asyncio.get_running_loop().time() - began
        assert silent == pytest.approx(jobs_module._QUIET, abs=1.1)  # it looks once a second
        await jobs.close()
        await heard.aclose()

    idle_loop.run(story())
