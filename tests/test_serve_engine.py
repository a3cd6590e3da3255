"""The queue before the pipeline, with a worker that does what the test says."""

from __future__ import annotations

import asyncio
import contextlib
import functools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import idle_loop
from fluxfire.serve import supervisor as supervisor_module
from fluxfire.serve.engine import Engine
from fluxfire.serve.errors import RefusedError
from fluxfire.serve.logs import request_id
from fluxfire.serve.settings import Settings
from fluxfire.serve.wire import (
    Alive,
    Batch,
    Cancel,
    CannotStart,
    Done,
    Facts,
    Failed,
    PipelineRequest,
    RawPicture,
    Ready,
    Result,
    StepDone,
)

FACTS = Facts("spark", "cpu", (), {"faithful": "computes every step"}, "faithful")
GONE = RefusedError("gone", status=499, code="gone")


class Worker:
    """Stands for a worker process; `workers` are all that were started."""

    workers: list[Worker] = []  # noqa: RUF012 - one list for all, emptied by the test
    ending = "it was killed"

    def __init__(self, settings):
        self.sent, self.heard, self.stopped, self.killed = [], None, False, False
        self.workers.append(self)

    def start(self, heard):
        self.heard = heard

    def send(self, message):
        self.sent.append(message)

    def stop(self):
        self.stopped = True

    def join(self):
        self.joined = True

    def kill(self):
        self.killed = True
        self.heard(None)

    @property
    def batches(self):
        return [m for m in self.sent if isinstance(m, Batch)]


class Bench:
    """An engine with such a worker."""

    def __init__(self, **options):
        self.told = []
        self.engine = Engine(
            Settings(**options),
            on_restart=lambda: self.told.append("restart"),
            on_batch=lambda *batch: self.told.append(batch),
            on_trouble=self.told.append,
        )
        self.engine.start()

    @property
    def worker(self):
        return Worker.workers[-1]

    def submit(self, asked, owner=None):
        """As the service does, with a place that is kept until the request is done."""
        place = self.engine.reserve(asked.level, owner)
        ticket = self.engine.submit(asked, place)
        ticket.done.add_done_callback(lambda _: self.engine.release(place))
        return ticket

    async def say(self, message, worker=None):
        (worker or self.worker).heard(message)
        await asyncio.sleep(0)
        await asyncio.sleep(0)

    async def ready(self):
        await self.say(Ready(FACTS))
        return self

    async def made(self, **more):
        batch = self.worker.batches[-1]
        results = {t: result(t, ask) for t, ask in batch.requests.items()}
        await self.say(Done(results, 0.5))

    async def died(self):
        before = self.worker
        await self.say(None)
        for _ in range(100):
            if self.worker is not before or self.engine.trouble:
                return
            await asyncio.sleep(0.001)


def result(ticket, ask):
    """A result that says whose it is."""
    return Result(tuple(RawPicture(ticket, seed, b"") for seed in ask.seeds), (), 0.0)


def ask(kind=0, pictures=1, **more):
    return PipelineRequest(prompt="x", steps=1 + kind, seeds=tuple(range(pictures)), **more)


def on_a_loop(test):
    @functools.wraps(test)
    def run(*args, **kwargs):
        idle_loop.run(test(*args, **kwargs))

    return run


@pytest.fixture(autouse=True)
def doubles(monkeypatch):
    Worker.workers.clear()
    monkeypatch.setattr(supervisor_module, "WorkerProcess", Worker)


@on_a_loop
async def test_a_request_is_made_once_the_worker_is_ready():
    bench = Bench()
    ticket = bench.submit(ask())
    assert (bench.engine.state, bench.engine.position(ticket)) == ("starting", 0)
    assert bench.worker.sent == []
    await bench.ready()
    assert bench.engine.state == "ready"
    await bench.say(StepDone(1, 4))
    assert (ticket.step, ticket.steps, bench.engine.position(ticket)) == (1, 4, None)
    await bench.made()
    assert (await ticket.done).pictures[0].width == ticket.number
    assert ticket.inference == 0.5
    assert bench.told == [(1, 0.5)]


@on_a_loop
async def test_what_waits_is_put_together_by_kind():
    bench = await Bench(max_batch=4).ready()
    first = bench.submit(ask())
    waiting = [bench.submit(a) for a in (ask(1), ask(2), ask(1, 2), ask(1, 2), ask(1))]
    await bench.made()
    numbers = [t.number for t in waiting]
    assert set(bench.worker.batches[1].requests) == {numbers[0], numbers[2], numbers[4]}
    assert first.done.done()
    await bench.made()
    assert set(bench.worker.batches[2].requests) == {numbers[1]}
    await bench.made()
    await bench.made()
    assert all(t.done.result().pictures[0].width == t.number for t in waiting)


@on_a_loop
async def test_the_queue_is_bounded():
    bench = await Bench(max_queue=2).ready()
    for _ in range(3):
        bench.submit(ask())
    with pytest.raises(RefusedError, match="2 requests wait already") as refusal:
        bench.submit(ask())
    assert (refusal.value.status, refusal.value.code) == (429, "queue-full")
    assert bench.engine.retry_after() >= 1


@on_a_loop
async def test_cancelled_while_waiting_and_while_running():
    bench = await Bench().ready()
    running, waiting = (bench.submit(ask(k)) for k in (0, 1))
    bench.engine.cancel(waiting, GONE)
    assert bench.engine.waiting == 0
    bench.engine.cancel(running, GONE)
    assert bench.worker.sent[-1] == Cancel(running.number)
    bench.engine.cancel(running, GONE)  # twice is once
    assert len(bench.worker.sent) == 2
    await bench.say(Done({}, 0.1))
    for ticket in (running, waiting):
        with pytest.raises(RefusedError, match="gone"):
            await ticket.done
    assert bench.engine.running == 0


@on_a_loop
async def test_a_worker_that_dies_is_replaced_and_its_request_tried_once_more():
    bench = await Bench().ready()
    bench.submit(ask(3))
    one, two = bench.submit(ask()), bench.submit(ask())
    await bench.made()
    assert len(bench.worker.batches[-1].requests) == 2
    await bench.died()
    assert bench.told[-1] == "restart"
    await bench.ready()
    assert list(bench.worker.batches[-1].requests) == [one.number]  # by itself now
    await bench.died()
    await bench.ready()
    with pytest.raises(RefusedError, match="failed twice: the worker process died") as refusal:
        await one.done
    assert refusal.value.status == 500
    assert list(bench.worker.batches[-1].requests) == [two.number]
    await bench.made()
    assert (await two.done).pictures[0].width == two.number


@on_a_loop
async def test_an_earlier_workers_last_words_are_not_heard():
    bench = await Bench().ready()
    old = bench.worker
    ticket = bench.submit(ask())
    await bench.died()
    await bench.ready()
    await bench.say(Done({ticket.number: result(99, ask())}, 1.0), worker=old)
    await bench.say(None, worker=old)
    assert not ticket.done.done()
    await bench.made()
    assert (await ticket.done).pictures[0].width == ticket.number


@on_a_loop
async def test_out_of_memory_fails_one_request():
    bench = await Bench(max_batch=4).ready()
    bench.submit(ask(9))
    small, large = bench.submit(ask()), bench.submit(ask(pictures=2))
    await bench.made()
    await bench.say(Failed("out-of-memory", "CUDA out of memory"))
    assert (list(bench.worker.batches[-1].requests), bench.worker.batches[-1].at_once) == (
        [small.number],
        1,
    )
    await bench.made()
    await bench.say(Failed("out-of-memory", "CUDA out of memory"))
    with pytest.raises(RefusedError, match="the edit failed: CUDA out of memory") as refusal:
        await large.done
    assert refusal.value.status == 507
    assert (await small.done).pictures
    later = bench.submit(ask())
    await bench.made()
    assert (await later.done).pictures


@on_a_loop
async def test_what_the_pipeline_refuses_is_told_at_once():
    bench = await Bench().ready()
    ticket = bench.submit(ask())
    await bench.say(Failed("edit-refused", "a side of 7 is too small"))
    with pytest.raises(RefusedError, match="a side of 7 is too small") as refusal:
        await ticket.done
    assert refusal.value.status == 422
    assert len(bench.worker.batches) == 1


@on_a_loop
async def test_a_worker_that_cannot_start():
    bench = Bench()
    ticket = bench.submit(ask())
    await bench.say(CannotStart("there is no folder x"))
    for refused in (ticket.done.result, lambda: bench.submit(ask())):
        with pytest.raises(RefusedError, match="no pipeline: there is no folder x"):
            refused()
    assert (bench.engine.state, bench.told) == ("failed", ["there is no folder x"])
    assert bench.worker.stopped
    await bench.say(None)  # its end is no reason to start another
    await asyncio.sleep(0.01)
    assert len(Worker.workers) == 1
    assert bench.told == ["there is no folder x"]


@on_a_loop
async def test_workers_that_die_before_they_are_ready(monkeypatch):
    monkeypatch.setattr(supervisor_module, "_LONGEST_PAUSE", 0.001)
    bench = Bench()
    for _ in range(3):
        await bench.died()
    assert bench.engine.trouble == "its worker died 3 times before it was ready"
    assert len(Worker.workers) == 3


@on_a_loop
async def test_a_worker_that_cannot_even_be_begun_is_tried_again(monkeypatch):
    monkeypatch.setattr(supervisor_module, "_LONGEST_PAUSE", 0.001)
    begun = Worker.start
    full = iter([True, False])

    def start(self, heard):
        if next(full, False):
            raise BlockingIOError("Resource temporarily unavailable")
        begun(self, heard)

    monkeypatch.setattr(Worker, "start", start)
    bench = Bench()
    ticket = bench.submit(ask())
    assert bench.engine.state == "starting"
    while len(Worker.workers) < 2:  # noqa: ASYNC110
        await asyncio.sleep(0.001)
    await bench.ready()
    await bench.made()
    assert (await ticket.done).pictures


@on_a_loop
async def test_it_is_not_ready_while_another_worker_loads():
    bench = await Bench().ready()
    await bench.died()
    assert bench.engine.state == "starting"
    await bench.ready()
    assert bench.engine.state == "ready"


async def goes_on_without(hung, bench, other):
    """A worker that hangs is killed, and another one does what waits."""
    while bench.worker is hung:  # noqa: ASYNC110
        await asyncio.sleep(0.01)
    assert hung.killed
    await bench.ready()
    await bench.made()
    assert (await other.done).pictures


@contextlib.asynccontextmanager
async def beating(bench):
    """The worker's process runs, and says so, whatever its pipeline does."""
    worker = bench.worker

    async def beat():
        while not worker.killed:
            await asyncio.sleep(2)
            worker.heard(Alive())

    beats = asyncio.create_task(beat())
    try:
        yield worker
    finally:
        beats.cancel()


@on_a_loop
async def test_a_process_that_hangs_is_soon_known_and_replaced():
    bench = await Bench(hang_seconds=60).ready()
    stuck, first = bench.submit(ask()), bench.worker
    await asyncio.sleep(9)
    assert bench.engine.state == "ready"
    await asyncio.sleep(3)
    assert bench.engine.state == "stalled"
    await asyncio.sleep(43)
    assert not first.killed
    await goes_on_without(first, bench, stuck)  # tried again with the next worker
    assert bench.engine.state == "ready"


@on_a_loop
async def test_a_batch_of_a_new_kind_may_compile_until_nobody_waits_for_it():
    bench = await Bench(hang_seconds=60, max_batch=1).ready()
    stuck, other = bench.submit(ask()), bench.submit(ask(1))
    async with beating(bench) as first:
        await asyncio.sleep(1000)
        assert not first.killed
        assert bench.engine.state == "ready"
        await bench.say(StepDone(1, 2))
        bench.engine.cancel(stuck, GONE)
        await asyncio.sleep(40)
        await bench.say(StepDone(1, 2))  # it is alive, so its time begins anew
        await asyncio.sleep(40)
        assert not first.killed
        await goes_on_without(first, bench, other)


@on_a_loop
async def test_a_batch_of_a_known_kind_that_hangs_is_known_and_replaced():
    bench = await Bench(hang_seconds=60).ready()
    async with beating(bench) as first:
        for _ in range(9):  # the first one compiles for 90 s; this is forgotten
            bench.submit(ask())
            await asyncio.sleep(90 if len(first.batches) == 1 else 2)
            await bench.made()
        stuck = bench.submit(ask())
        await asyncio.sleep(15)
        assert bench.engine.state == "ready"
        await asyncio.sleep(10)
        assert bench.engine.state == "stalled"
        await goes_on_without(first, bench, stuck)


@on_a_loop
async def test_steps_that_usually_take_minutes_may_take_minutes():
    bench = await Bench(hang_seconds=60).ready()
    async with beating(bench) as first:
        for _ in range(3):
            bench.submit(ask())
            await asyncio.sleep(200)
            assert bench.engine.state == "ready"
            await bench.made()
        bench.engine.cancel(bench.submit(ask()), GONE)
        await asyncio.sleep(200)
        assert not first.killed
        await bench.made()


@on_a_loop
async def test_a_worker_that_hangs_after_another_died_is_replaced_too():
    bench = await Bench(max_batch=1).ready()
    bench.engine.cancel(bench.submit(ask()), GONE)
    await bench.died()
    await bench.ready()
    bench.engine.cancel(bench.submit(ask()), GONE)
    second, other = bench.worker, bench.submit(ask(1))
    await goes_on_without(second, bench, other)


@on_a_loop
async def test_an_end_waits_for_the_workers_own():
    bench = await Bench().ready()
    bench.engine.close()
    await bench.engine.until_worker_ended()
    assert bench.worker.stopped
    assert bench.worker.joined


@on_a_loop
async def test_the_log_says_how_a_worker_ended_and_where_a_pipeline_failed(caplog):
    bench = await Bench(max_batch=1).ready()
    token = request_id.set("abc-1")
    failed = bench.submit(ask())
    request_id.reset(token)
    await bench.say(Failed("edit-failed", "RuntimeError", "Traceback: boom at /srv/secret"))
    with pytest.raises(RefusedError, match="RuntimeError; the service's log") as refusal:
        await failed.done
    assert "secret" not in str(refusal.value)
    assert "request abc-1" in caplog.text
    assert "boom at /srv/secret" in caplog.text
    await bench.died()
    assert "the worker died: it was killed" in caplog.text


@on_a_loop
async def test_keys_take_turns_by_the_work_that_they_ask_for():
    bench = await Bench(max_batch=1, max_queue=32).ready()
    served = []

    async def serve(n):
        for _ in range(n):
            [number] = bench.worker.batches[-1].requests
            served.append(owner_of[number])
            await bench.made()

    owner_of = {}

    def submit(owner, kind=0):
        ticket = bench.submit(ask(kind), owner)
        owner_of[ticket.number] = owner
        return ticket

    many = [submit("ann") for _ in range(10)]
    few = [submit("bob") for _ in range(2)]
    costly = submit("cat", kind=3)  # four steps, where the others' requests have one
    # One of ann's runs. Then each has had as much: the oldest goes first.
    assert [bench.engine.position(t) for t in (many[1], *few, costly)] == [0, 1, 4, 2]
    await serve(6)
    assert served == ["ann", "ann", "bob", "cat", "ann", "bob"]
    submit("cat")  # it has had four steps more than the others, so they go first
    await serve(4)
    assert served[6:] == ["ann", "ann", "ann", "cat"]


@on_a_loop
async def test_who_was_away_is_not_paid_for_it():
    bench = await Bench(max_batch=1, max_queue=64).ready()
    for _ in range(20):
        bench.submit(ask(), "ann")
    for _ in range(10):
        await bench.made()
    bob = [bench.submit(ask(), "bob") for _ in range(5)]
    ahead = [bench.engine.position(t) for t in bob]
    assert ahead == [1, 3, 5, 7, 9]


@on_a_loop
async def test_a_key_has_its_part_of_the_queue():
    bench = Bench(max_queue=4)
    slots = [bench.engine.reserve(None, "ann") for _ in range(2)]
    with pytest.raises(RefusedError, match="2 requests of your key wait") as refusal:
        bench.engine.reserve(None, "ann")
    assert refusal.value.status == 429
    assert bench.engine.reserve(None, "bob").owner == "bob"
    bench.engine.release(slots[0])
    assert bench.engine.reserve(None, "ann")


@on_a_loop
async def test_places_are_of_the_queue():
    bench = await Bench(max_queue=2).ready()
    one, two, three = (bench.engine.reserve(level) for level in (None, "faithful", None))
    with pytest.raises(RefusedError, match="3 requests wait already"):
        bench.engine.reserve(None)  # the worker has nothing to do yet, and takes one of the three
    with pytest.raises(RefusedError, match="3 requests wait already"):
        bench.submit(ask())
    bench.engine.release(one)
    bench.engine.submit(ask(), bench.engine.reserve(None))
    bench.engine.submit(ask(), two)
    bench.engine.release(two)
    assert (bench.engine.running, bench.engine.waiting) == (1, 1)
    with pytest.raises(RefusedError, match="2 requests wait already"):
        bench.engine.reserve(None)
    bench.engine.release(three)
    with pytest.raises(RefusedError, match="cannot give quality='fast'"):
        bench.engine.reserve("fast")


@on_a_loop
async def test_a_place_is_of_no_use_where_there_is_no_pipeline():
    bench = Bench()
    place = bench.engine.reserve(None)
    await bench.say(CannotStart("there is no folder x"))
    with pytest.raises(RefusedError, match="no pipeline: there is no folder x"):
        bench.engine.submit(ask(), place)
    bench.engine.release(place)
    await asyncio.wait_for(bench.engine.drain(5), 1)


@on_a_loop
async def test_draining_waits_until_every_place_is_given_back():
    bench = await Bench().ready()
    made, never = bench.engine.reserve(None), bench.engine.reserve(None)
    draining = asyncio.create_task(bench.engine.drain(5))
    await asyncio.sleep(0)
    ticket = bench.engine.submit(ask(), made)
    bench.engine.release(never)
    await bench.made()
    await asyncio.sleep(0.01)
    assert ticket.done.result().pictures
    assert not draining.done()  # for its pictures have yet to be stored
    bench.engine.release(made)
    await asyncio.wait_for(draining, 1)


@on_a_loop
async def test_a_place_is_of_no_use_where_all_has_ended():
    bench = await Bench().ready()
    place = bench.engine.reserve(None)
    stopping = asyncio.create_task(bench.engine.until_stopping())
    closed = asyncio.create_task(bench.engine.until_closed())
    draining = asyncio.create_task(bench.engine.drain(0.02))
    await asyncio.sleep(0.01)
    assert stopping.done()
    assert not closed.done()
    await draining
    await asyncio.sleep(0)
    for refused in (stopping.result, closed.result, lambda: bench.engine.submit(ask(), place)):
        with pytest.raises(RefusedError, match="the service is stopping"):
            refused()


@on_a_loop
async def test_levels_that_are_not_offered():
    bench = Bench()
    early = bench.submit(ask(level="fast"))
    await bench.ready()
    for refused in (early.done.result, lambda: bench.submit(ask(level="fast"))):
        with pytest.raises(RefusedError, match="cannot give quality='fast'; it offers faithful"):
            refused()
    bench.submit(ask(level="faithful"))
    await bench.say(Ready(Facts("spark", "cpu", (), {}, "as applied")))
    with pytest.raises(RefusedError, match="it offers no choice, so leave quality out"):
        bench.submit(ask(level="faithful"))


@on_a_loop
async def test_draining_answers_what_was_taken_and_takes_no_more():
    bench = await Bench().ready()
    one, two = bench.submit(ask()), bench.submit(ask(1))
    draining = asyncio.create_task(bench.engine.drain(5))
    await asyncio.sleep(0)
    with pytest.raises(RefusedError, match="the service is stopping"):
        bench.submit(ask())
    await bench.made()
    assert not draining.done()
    await bench.made()
    await draining
    assert one.done.result()
    assert two.done.result()
    assert bench.worker.stopped


@on_a_loop
async def test_draining_ends_after_its_time():
    bench = await Bench().ready()
    ticket = bench.submit(ask())
    await bench.engine.drain(0.01)
    with pytest.raises(RefusedError, match="the service is stopping"):
        await ticket.done
    assert bench.worker.stopped
    await bench.say(None)  # its end is no death
    assert len(Worker.workers) == 1


ANSWERS = ["made", "made", StepDone(1, 2), Failed("out-of-memory", "x"), Failed("edit-failed", "x")]
ACTIONS = st.one_of(
    st.tuples(st.just("submit"), st.integers(0, 2), st.integers(1, 4)),
    st.tuples(st.just("cancel"), st.integers(0, 30)),
    st.tuples(st.just("die")),
    st.tuples(st.just("answer"), st.sampled_from(ANSWERS)),
)


class Story:
    """What happens to an engine, and what must hold all the while."""

    def __init__(self, bench):
        self.bench, self.engine = bench, bench.engine
        self.tickets, self.ends = [], []

    async def submit(self, *details):
        if self.engine.waiting >= 5:
            with pytest.raises(RefusedError):
                self.bench.submit(ask(*details))
            return
        ticket = self.bench.submit(ask(*details))
        ticket.done.add_done_callback(lambda _: self.ends.append(ticket.number))
        self.tickets.append(ticket)

    async def cancel(self, which):
        if self.tickets:
            self.engine.cancel(self.tickets[which % len(self.tickets)], GONE)

    async def die(self):
        await self.bench.died()
        await self.bench.ready()

    async def answer(self, how):
        if self.engine.running and how == "made":
            await self.bench.made()
        elif self.engine.running:
            await self.bench.say(how)

    def check(self):
        if not self.engine.running:
            assert self.engine.waiting == 0
            return
        asks = self.bench.worker.batches[-1].requests
        assert len({a.kind for a in asks.values()}) == 1
        if len(asks) > 1:
            assert sum(len(a.seeds) for a in asks.values()) <= 4
            assert all(t.tries == 1 for t in self.tickets if t.number in asks)

    def check_end(self):
        assert (self.engine.waiting, self.engine.running) == (0, 0)
        assert sorted(self.ends) == [t.number for t in self.tickets]
        for ticket in self.tickets:
            assert ticket.tries <= 2
            if ticket.done.exception() is None:
                made = [picture.width for picture in ticket.done.result().pictures]
                assert made == [ticket.number] * len(ticket.request.seeds)


@settings(max_examples=300, deadline=None)
@given(st.lists(ACTIONS, max_size=40))
@on_a_loop
async def test_every_request_ends_once_and_with_its_own_result(actions):
    Worker.workers.clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(supervisor_module, "WorkerProcess", Worker)
        story = Story(await Bench(max_queue=5, max_batch=4).ready())
        for kind, *details in actions:
            await getattr(story, kind)(*details)
            await asyncio.sleep(0)
            story.check()
        for _ in range(2 * len(story.tickets)):
            await story.answer("made")
            story.check()
        await asyncio.sleep(0)
        story.check_end()
