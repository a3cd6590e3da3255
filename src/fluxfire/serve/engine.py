"""The queue before the pipeline, and the worker process behind it.

Everything here runs on the server's event loop, which never waits: two threads carry messages
to and from the worker. One batch is with the worker at a time; what waits meanwhile is put
together by kind, oldest first.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from statistics import fmean
from typing import Literal, Never

from fluxfire.serve.process import WorkerProcess
from fluxfire.serve.refusing import Refused
from fluxfire.serve.settings import Settings
from fluxfire.serve.wire import (
    Batch,
    Cancel,
    CannotStart,
    Done,
    Facts,
    Failed,
    FromWorker,
    Level,
    PipelineRequest,
    Ready,
    Result,
    StepDone,
)

_log = logging.getLogger(__name__)
_MOST_FAILED_STARTS = 3
_LONGEST_PAUSE = 30.0
_USUAL_SECONDS = 5.0  # of an edit, before any was made
State = Literal["starting", "ready", "draining", "failed"]
_STATUS = {"out-of-memory": 507, "edit-refused": 422, "edit-failed": 500}


@dataclass(eq=False)
class Ticket:
    """A request on its way.

    Attributes:
        number: counts all tickets.
        ask: what is wanted.
        done: the result, or why there is none.
        began: when it was last sent to the worker, or None.
        inference: seconds that the pipeline took for its batch.
        step: denoising steps made.
        steps: denoising steps in all.
        tries: how often it was sent to the worker.
        changed: is set, and replaced, whenever something of this changes.
    """

    number: int
    ask: PipelineRequest
    done: asyncio.Future[Result]
    began: float | None = None
    inference: float = 0.0
    step: int = 0
    steps: int = 0
    tries: int = 0
    changed: asyncio.Event = field(default_factory=asyncio.Event)

    def tell(self) -> None:
        """Wake whoever waits for a change."""
        self.changed.set()
        self.changed = asyncio.Event()

    @property
    def alone(self) -> bool:
        """Whether it is to be made without others: it was in a batch that failed."""
        return self.tries > 0


@dataclass(eq=False)
class Place:
    """Of a request that was taken: kept from then until its answer is written.

    Attributes:
        early: whether its picture is still being read, so that it has no ticket yet.
    """

    early: bool = True


class Engine:
    """Takes requests, and keeps a worker that edits.

    Attributes:
        facts: what the worker told of its pipeline; None until it did.
        trouble: why there is no worker, if so.
    """

    def __init__(
        self,
        settings: Settings,
        *,
        on_batch: Callable[[int, float], None] = lambda pictures, seconds: None,  # noqa: ARG005
        on_ready: Callable[[Facts], None] = lambda facts: None,  # noqa: ARG005
        on_restart: Callable[[], None] = lambda: None,
        on_trouble: Callable[[str], None] = lambda why: None,  # noqa: ARG005
    ) -> None:
        """Make an engine, which does nothing before `start`.

        Args:
            settings: the service's.
            on_batch: is told the number of pictures, and the seconds, of each batch made.
            on_ready: is told of the pipeline, by each worker that has loaded it.
            on_restart: is called whenever the worker died.
            on_trouble: is told why there is no worker, and will be none.
        """
        self.facts: Facts | None = None
        self.trouble: str | None = None
        self._on_batch, self._on_ready = on_batch, on_ready
        self._on_restart, self._on_trouble = on_restart, on_trouble
        self._settings = settings
        self._waiting: deque[Ticket] = deque()
        self._places: set[Place] = set()
        self._running: dict[int, Ticket] = {}
        self._numbers = itertools.count(1)
        self._seconds: deque[float] = deque(maxlen=20)
        self._worker: WorkerProcess | None = None
        self._ready = False
        self._failed_starts = 0
        self._stopping = asyncio.Event()
        self._closed = asyncio.Event()
        self._all_answered = asyncio.Event()
        self._all_answered.set()
        self._restart: asyncio.TimerHandle | None = None
        self._messages = 0  # of all workers
        self._watchdog: asyncio.TimerHandle | None = None

    @property
    def state(self) -> State:
        """Whether requests are taken, and if not, why."""
        if self.trouble is not None:
            return "failed"
        if self._stopping.is_set():
            return "draining"
        return "ready" if self._ready else "starting"

    @property
    def waiting(self) -> int:
        """How many requests wait."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        """How many requests are with the worker."""
        return len(self._running)

    def start(self) -> None:
        """Start a worker. It loads meanwhile."""
        self._restart = None
        loop = asyncio.get_running_loop()

        def heard(message: FromWorker | None) -> None:
            loop.call_soon_threadsafe(self._heard, worker, message)

        try:
            worker = self._worker = WorkerProcess(self._settings)
            worker.start(heard)
        except (OSError, RuntimeError, MemoryError):  # the next try may find room for it
            _log.exception("the worker cannot be started")
            self._lost()

    def reserve(self, level: Level | None) -> Place:
        """Take a place in the queue, before work is put into a request.

        Args:
            level: the quality wanted; None takes what there is.

        Returns:
            The place, for `submit`; to be given back to `leave` once the request is answered,
            which is what `drain` waits for.

        Raises:
            Refused: the queue is full (429), the service stops or cannot work (503), or the level
                is none that the passes give (422).
        """
        if self.trouble is not None:
            raise _no_pipeline(self.trouble)
        if self._stopping.is_set():
            raise _stops()
        # A worker that has nothing to do takes the next request at once.
        room = self._settings.max_queue + (1 if self._ready and not self._running else 0)
        waiting = len(self._waiting) + sum(place.early for place in self._places)
        if waiting >= room:
            raise Refused(
                f"{waiting} requests wait already; try again later", status=429, code="queue-full"
            )
        self._check_level(level)
        place = Place()
        self._places.add(place)
        self._all_answered.clear()
        return place

    def leave(self, place: Place) -> None:
        """Give a place back; a second time does nothing."""
        self._places.discard(place)
        if not self._places:
            self._all_answered.set()

    def submit(self, ask: PipelineRequest, place: Place) -> Ticket:
        """Put a request into the queue.

        Args:
            ask: what is asked.
            place: kept for it by `reserve`; with one it is taken even if the service has been told
                to stop meanwhile.

        Raises:
            Refused: as by `reserve`, but never for want of room.
        """
        if self.trouble is not None:
            raise _no_pipeline(self.trouble)
        if place not in self._places:
            raise _stops()
        self._check_level(ask.level)
        place.early = False
        loop = asyncio.get_running_loop()
        ticket = Ticket(next(self._numbers), ask, loop.create_future(), steps=ask.steps)
        ticket.done.add_done_callback(_retrieved)
        self._waiting.append(ticket)
        self._advance()
        return ticket

    def cancel(self, ticket: Ticket, why: Exception) -> None:
        """Give a request up; the worker ends it at its next step, unless others are with it."""
        if ticket.done.done():
            return
        ticket.done.set_exception(why)
        ticket.tell()
        if ticket in self._waiting:
            self._waiting.remove(ticket)
        elif ticket.number in self._running and self._worker is not None:
            self._worker.send(Cancel(ticket.number))
            self._watch()

    def position(self, ticket: Ticket) -> int | None:
        """How many requests wait before this one; None once it does not wait."""
        return self._waiting.index(ticket) if ticket in self._waiting else None

    def retry_after(self) -> int:
        """In how many seconds there may be room again: at least 1."""
        each = fmean(self._seconds) if self._seconds else _USUAL_SECONDS
        return max(1, round(each * (1 + len(self._waiting) / self._settings.at_once)))

    async def until_stopping(self) -> Never:
        """Wait until the service is told to stop.

        Raises:
            Refused: then.
        """
        await self._stopping.wait()
        raise _stops()

    async def until_closed(self) -> Never:
        """Wait until nothing is answered any more, however far it is.

        Raises:
            Refused: then.
        """
        await self._closed.wait()
        raise _stops()

    async def drain(self, seconds: float) -> None:
        """Take no more requests, and wait until all are answered, or so long; then end.

        What is not answered by then is refused.
        """
        self._stopping.set()
        try:
            async with asyncio.timeout(seconds):
                await self._all_answered.wait()
        except TimeoutError:
            _log.warning("gave %d requests up after %g s", len(self._places), seconds)
        self.close()

    def close(self) -> None:
        """End the worker at once, and refuse what is left."""
        self._stopping.set()
        self._closed.set()
        for timer in (self._restart, self._watchdog):
            if timer is not None:
                timer.cancel()
        for ticket in [*self._waiting, *self._running.values()]:
            if not ticket.done.done():
                ticket.done.set_exception(_stops())
            ticket.tell()
        self._places.clear()
        self._waiting.clear()
        self._running.clear()
        self._all_answered.set()
        worker, self._worker = self._worker, None
        if worker is not None:
            worker.stop()

    def _check_level(self, level: Level | None) -> None:
        facts = self.facts  # not known while the first worker loads: then what waits is looked at
        if level is not None and facts is not None and level not in facts.levels:
            offers = ", ".join(facts.levels) or "no choice, so leave quality out"
            raise Refused(
                f"the passes of this service cannot give quality={level!r}; it offers {offers}",
                status=422, code="quality-not-offered",
            )  # fmt: skip

    def _advance(self) -> None:
        """Send the next batch, if there is one and the worker is free."""
        if not self._ready or self._running or not self._waiting or self._worker is None:
            return
        first = self._waiting.popleft()
        batch, room = [first], self._settings.at_once - len(first.ask.seeds)
        if not first.alone:
            for ticket in list(self._waiting):
                fits = len(ticket.ask.seeds) <= room and ticket.ask.kind == first.ask.kind
                if fits:
                    self._waiting.remove(ticket)
                    batch.append(ticket)
                    room -= len(ticket.ask.seeds)
        now = asyncio.get_running_loop().time()
        for ticket in batch:
            ticket.began, ticket.step = now, 0
            ticket.tries += 1
            self._running[ticket.number] = ticket
            ticket.tell()
        # One that ran out of memory gets a try with one picture at a time.
        at_once = 1 if first.tries > 1 else self._settings.at_once
        self._worker.send(Batch({t.number: t.ask for t in batch}, at_once))

    def _heard(self, worker: WorkerProcess, message: FromWorker | None) -> None:
        """Take a message of the worker's; None if it died."""
        if worker is not self._worker:
            return  # an earlier one's last words
        self._messages += 1
        if message is None:
            self._lost()
        elif isinstance(message, Ready):
            self.facts, self._ready = message.facts, True
            self._refuse_levels()
        elif isinstance(message, CannotStart):
            self._give_up(message.message)
        elif isinstance(message, StepDone):
            for ticket in self._running.values():
                ticket.step, ticket.steps = message.step, message.steps
                ticket.tell()
        elif isinstance(message, Done):
            self._failed_starts = 0
            self._finish(message.results, message.seconds)
        else:
            self._failed(message)
        self._advance()
        if isinstance(message, Ready):
            self._on_ready(message.facts)

    def _finish(self, results: Mapping[int, Result], seconds: float) -> None:
        batch = self._taken_back()
        if results:
            self._seconds.append(seconds)
            self._on_batch(sum(len(r.pictures) for r in results.values()), seconds)
        for ticket in batch:
            ticket.inference = seconds
            if ticket.number in results and not ticket.done.done():
                ticket.done.set_result(results[ticket.number])
            elif not ticket.done.done():  # cancelled too late for its neighbours to know
                self._waiting.appendleft(ticket)
            ticket.tell()

    def _failed(self, failure: Failed) -> None:
        batch = self._taken_back()
        several = len(batch) > 1 or (
            failure.reason == "out-of-memory" and len(batch[0].ask.seeds) > 1
        )
        error = Refused(
            f"the edit failed: {failure.message}",
            status=_STATUS[failure.reason], code=failure.reason,
        )  # fmt: skip
        self._try_again(batch, error, most=2 if several else 1)

    def _lost(self) -> None:
        """Start another worker; what was with this one is tried once more, by itself."""
        _log.error("the worker died%s", "" if self._ready else " before it was ready")
        self._on_restart()
        self._failed_starts = 0 if self._ready else self._failed_starts + 1
        died = Refused(
            "the edit failed twice: the process that made it died", status=500, code="worker-died"
        )
        self._try_again(self._taken_back(), died, most=2)
        self._ready, self._worker = False, None
        if self._failed_starts >= _MOST_FAILED_STARTS:
            self._give_up(f"its worker died {self._failed_starts} times before it was ready")
            return
        pause = 0.0 if self._failed_starts == 0 else min(2.0**self._failed_starts, _LONGEST_PAUSE)
        self._restart = asyncio.get_running_loop().call_later(pause, self.start)

    def _try_again(self, batch: list[Ticket], error: Exception, *, most: int) -> None:
        """Put tickets back before all others; those tried so often fail."""
        for ticket in reversed(batch):
            if ticket.done.done():
                pass
            elif ticket.tries >= most:
                ticket.done.set_exception(error)
            else:
                self._waiting.appendleft(ticket)
            ticket.tell()

    def _give_up(self, why: str) -> None:
        _log.error("no pipeline: %s", why)
        self.trouble = why
        worker, self._worker = self._worker, None
        if worker is not None:
            worker.stop()
        self._on_trouble(why)
        for ticket in self._waiting:
            if not ticket.done.done():
                ticket.done.set_exception(_no_pipeline(why))
            ticket.tell()
        self._waiting.clear()

    def _watch(self) -> None:
        """See after a while whether the worker hangs in what nobody waits for any more."""
        abandoned = bool(self._running) and all(t.done.done() for t in self._running.values())
        if self._watchdog is None and abandoned:
            loop = asyncio.get_running_loop()
            self._watchdog = loop.call_later(
                self._settings.hang_seconds, self._look_after, self._worker, self._messages
            )

    def _look_after(self, worker: WorkerProcess | None, messages: int) -> None:
        self._watchdog = None
        silent = worker is self._worker and messages == self._messages
        if worker is not None and silent and self._running:
            _log.error("the worker says nothing for %g s: killed", self._settings.hang_seconds)
            worker.kill()  # and its end is heard
        else:
            self._watch()

    def _refuse_levels(self) -> None:
        """Refuse what came before it was known which levels there are."""
        for ticket in list(self._waiting):
            try:
                self._check_level(ticket.ask.level)
            except Refused as refusal:
                self.cancel(ticket, refusal)

    def _taken_back(self) -> list[Ticket]:
        batch = list(self._running.values())
        self._running.clear()
        return batch


def _stops() -> Refused:
    return Refused("the service stops", status=503, code="stopping")


def _no_pipeline(why: str) -> Refused:
    return Refused(f"the service has no pipeline: {why}", status=503, code="failed")


def _retrieved(future: asyncio.Future[Result]) -> None:
    """Look at the error, if any: nobody else may, where a client has gone."""
    if not future.cancelled():
        future.exception()
