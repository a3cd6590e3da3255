"""The request queue, from which the worker process takes one batch at a time.

All code here runs on the server's event loop and never blocks it: two threads carry messages to
and from the worker. The engine builds the next batch from
waiting requests of one kind, in the order that `fair_turns.py` gives.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections import deque
from collections.abc import Callable, Mapping
from statistics import fmean
from typing import Literal, Never

from fluxfire.serve.batching import next_batch
from fluxfire.serve.errors import RefusedError, failed_error, no_pipeline_error, stopping_error
from fluxfire.serve.fair_turns import FairTurns
from fluxfire.serve.logs import request_id
from fluxfire.serve.places import Places
from fluxfire.serve.settings import Settings
from fluxfire.serve.supervisor import Supervisor
from fluxfire.serve.tickets import QueueSlot, Ticket, mark_retrieved
from fluxfire.serve.watchdog import Watchdog
from fluxfire.serve.wire import (
    Alive,
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
_USUAL_SECONDS = 5.0  # assumed for an edit until the first one is measured
State = Literal["starting", "ready", "stalled", "draining", "failed"]


class Engine:
    """Queues requests and has a worker process edit them."""

    def __init__(
        self,
        settings: Settings,
        *,
        on_batch: Callable[[int, float], None] = lambda pictures, seconds: None,  # noqa: ARG005
        on_ready: Callable[[Facts], None] = lambda facts: None,  # noqa: ARG005
        on_restart: Callable[[], None] = lambda: None,
        on_trouble: Callable[[str], None] = lambda why: None,  # noqa: ARG005
        queue_of: Callable[[str], int] | None = None,
    ) -> None:
        """Create an engine. It does nothing before `start`.

        Args:
            settings: the service's.
            on_batch: callback with the number of pictures and the seconds of each finished batch.
            on_ready: callback with the pipeline's facts, whenever a worker has loaded it.
            on_restart: callback after each death of a worker.
            on_trouble: callback with the reason, if the engine cannot start a worker.
            queue_of: most requests of a key in the queue, by the key's name; None for the
                settings' own limit.
        """
        self._on_batch, self._on_ready = on_batch, on_ready
        self._on_restart, self._on_trouble = on_restart, on_trouble
        self._supervisor = Supervisor(
            settings,
            on_message=self._on_message,
            on_death=self._on_worker_death,
            on_trouble=self._give_up,
        )
        self._settings = settings
        self._waiting: deque[Ticket] = deque()
        self._turns = FairTurns()
        self._watchdog = Watchdog(
            settings.hang_seconds, lambda: list(self._running.values()), self._supervisor.kill
        )
        self._running: dict[int, Ticket] = {}
        self._numbers = itertools.count(1)
        self._seconds: deque[float] = deque(maxlen=20)
        self._stopping = asyncio.Event()
        self._closed = asyncio.Event()
        most_of = queue_of or (lambda owner: settings.queue_per_key)  # noqa: ARG005
        self._places = Places(settings.max_queue, most_of)

    @property
    def facts(self) -> Facts | None:
        """The worker's description of its pipeline; None until the first worker is ready."""
        return self._supervisor.facts

    @property
    def trouble(self) -> str | None:
        """Why no worker can run; None while one can."""
        return self._supervisor.trouble

    @property
    def gpu_bytes(self) -> Mapping[str, int]:
        """The worker's last count of the GPU's memory, by kind; empty without a GPU."""
        return self._supervisor.gpu_bytes

    @property
    def state(self) -> State:
        """`"ready"` if the worker can edit; else what the engine is doing instead.

        `"stalled"`: the worker's process has been silent for 10 s, or its batch for ten times as
        long as batches of this kind usually are.
        """
        if self.trouble is not None:
            return "failed"
        if self._stopping.is_set():
            return "draining"
        if not self._supervisor.ready:
            return "starting"
        return "stalled" if self._watchdog.stalled else "ready"

    @property
    def waiting(self) -> int:
        """Number of requests in the queue."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        """Number of requests that the worker has."""
        return len(self._running)

    def start(self) -> None:
        """Start a worker process, which then loads the pipeline."""
        self._supervisor.start()

    def reserve(
        self, level: Level | None, owner: str | None = None, *, accepted: bool = False
    ) -> QueueSlot:
        """Reserve a queue slot before reading the request's picture.

        Args:
            level: the requested quality; None for the service's own.
            owner: name of the key that sent the request; None without keys.
            accepted: whether the service took the request before it was restarted, so that a full
                queue does not refuse it.

        Returns:
            The slot for `submit`. Pass it to `release` after the response is sent; `drain` waits
            for that.

        Raises:
            RefusedError: the queue is full, or this owner's part of it is (429), the service is
                stopping or has no pipeline (503), or the passes cannot give this level (422).
        """
        if self.trouble is not None:
            raise no_pipeline_error(self.trouble)
        if self._stopping.is_set():
            raise stopping_error()
        self._check_level(level)
        # An idle worker takes the next request at once, so that request needs no room.
        spare = 1 if self._supervisor.ready and not self._running else 0
        return self._places.take(owner, self._waiting, spare, accepted=accepted)

    def release(self, slot: QueueSlot) -> None:
        """Give a slot back. A second call does nothing."""
        self._places.release(slot)

    def submit(self, request: PipelineRequest, slot: QueueSlot) -> Ticket:
        """Put a request into the queue.

        Args:
            request: the request to the pipeline.
            slot: the slot from `reserve`. The engine accepts it even if the service began to stop
                in between.

        Raises:
            RefusedError: for the reasons of `reserve`, except a full queue.
        """
        if self.trouble is not None:
            raise no_pipeline_error(self.trouble)
        if slot not in self._places:
            raise stopping_error()
        self._check_level(request.level)
        slot.early = False
        loop = asyncio.get_running_loop()
        ticket = Ticket(
            next(self._numbers),
            request,
            loop.create_future(),
            slot.owner,
            request_id.get(),
            steps=request.steps,
        )
        present = {t.owner for t in (*self._waiting, *self._running.values())}
        self._turns.enter(ticket.owner, present)
        ticket.done.add_done_callback(mark_retrieved)
        self._waiting.append(ticket)
        self._advance()
        return ticket

    def cancel(self, ticket: Ticket, why: Exception) -> None:
        """Cancel a request. The worker stops at its next step if the whole batch is cancelled."""
        if ticket.done.done():
            return
        ticket.done.set_exception(why)
        ticket.notify()
        if ticket in self._waiting:
            self._waiting.remove(ticket)
        elif ticket.number in self._running and self._supervisor.has_worker:
            self._supervisor.send(Cancel(ticket.number))
            self._watchdog.watch()

    def position(self, ticket: Ticket) -> int | None:
        """Number of requests ahead of this one in the queue; None if it is not in the queue."""
        return self._turns.order(self._waiting).index(ticket) if ticket in self._waiting else None

    def retry_after(self) -> int:
        """Estimate in how many seconds the queue has room again; at least 1."""
        each = fmean(self._seconds) if self._seconds else _USUAL_SECONDS
        return max(1, round(each * (1 + len(self._waiting) / self._settings.at_once)))

    async def until_stopping(self) -> Never:
        """Wait until the service begins to stop.

        Raises:
            RefusedError: always, when that happens.
        """
        await self._stopping.wait()
        raise stopping_error()

    async def until_closed(self) -> Never:
        """Wait until the engine is closed and running requests cannot finish.

        Raises:
            RefusedError: always, when that happens.
        """
        await self._closed.wait()
        raise stopping_error()

    async def drain(self, seconds: float) -> None:
        """Accept no new requests, wait for the responses of the accepted ones, then close.

        Args:
            seconds: how long to wait; requests without a response by then are refused.
        """
        self._stopping.set()
        try:
            async with asyncio.timeout(seconds):
                await self._places.all_answered.wait()
        except TimeoutError:
            _log.warning("refused %d unfinished requests after %g s", len(self._places), seconds)
        self.close()

    def close(self) -> None:
        """Stop the worker now, and refuse all remaining requests."""
        self._stopping.set()
        self._closed.set()
        self._watchdog.stop()
        for ticket in [*self._waiting, *self._running.values()]:
            if not ticket.done.done():
                ticket.done.set_exception(stopping_error())
            ticket.notify()
        self._places.clear()
        self._waiting.clear()
        self._running.clear()
        self._supervisor.close()

    async def until_worker_ended(self) -> None:
        """Wait until each worker's process has ended, after `close`: at most some seconds."""
        await self._supervisor.until_ended()

    def kill_workers(self) -> None:
        """Kill what has not ended yet, after `close`."""
        self._supervisor.kill_ending()

    def _check_level(self, level: Level | None) -> None:
        facts = self.facts  # None until the first worker is ready; `_refuse_levels` checks then
        if level is not None and facts is not None and level not in facts.levels:
            offers = ", ".join(facts.levels) or "no choice, so leave quality out"
            raise RefusedError(
                f"the passes of this service cannot give quality={level!r}; it offers {offers}",
                status=422,
                code="quality-not-offered",
            )

    def _advance(self) -> None:
        """Send the next batch if the worker is idle and requests wait."""
        if not self._supervisor.ready or self._running or not self._waiting:
            return
        batch = next_batch(self._turns.order(self._waiting), self._settings.at_once)
        first = batch[0]
        for ticket in batch:
            self._waiting.remove(ticket)
        now = asyncio.get_running_loop().time()
        for ticket in batch:
            ticket.began, ticket.step = now, 0
            ticket.tries += 1
            self._running[ticket.number] = ticket
            self._turns.charge(ticket.owner, ticket.cost)
            ticket.notify()
        # A request that ran out of memory is retried with one picture at a time.
        at_once = 1 if first.tries > 1 else self._settings.at_once
        pictures = sum(len(t.request.seeds) for t in batch)
        self._watchdog.begin((first.request.kind, pictures, at_once))
        self._supervisor.send(Batch({t.number: t.request for t in batch}, at_once))

    def _on_message(self, message: FromWorker) -> None:
        """Handle a message from the worker."""
        self._watchdog.hear()
        if isinstance(message, Alive | CannotStart):
            return
        if isinstance(message, Ready):
            self._refuse_levels()
        elif isinstance(message, StepDone):
            self._watchdog.step()
            for ticket in self._running.values():
                ticket.step, ticket.steps = message.step, message.steps
                ticket.notify()
        elif isinstance(message, Done):
            self._watchdog.end()
            self._on_done(message.results, message.seconds)
        else:
            self._on_failure(message)
        self._advance()
        if isinstance(message, Ready):
            self._on_ready(message.facts)

    def _on_done(self, results: Mapping[int, Result], seconds: float) -> None:
        batch = self._take_running_back()
        if results:
            self._seconds.append(seconds)
            self._on_batch(sum(len(r.pictures) for r in results.values()), seconds)
        for ticket in batch:
            ticket.inference = seconds
            if ticket.number in results and not ticket.done.done():
                ticket.done.set_result(results[ticket.number])
            elif not ticket.done.done():  # the worker ended the batch without this request
                self._waiting.appendleft(ticket)
            ticket.notify()

    def _on_failure(self, failure: Failed) -> None:
        batch = self._take_running_back()
        several = len(batch) > 1 or (
            failure.reason == "out-of-memory" and len(batch[0].request.seeds) > 1
        )
        if failure.details:
            names = ", ".join(str(ticket.request_id) for ticket in batch)
            _log.error("the pipeline failed on request %s\n%s", names, failure.details)
        else:
            _log.warning("%s: %s", failure.reason, failure.message)
        error = failed_error(failure)
        self._try_again(batch, error, most=2 if several else 1)

    def _on_worker_death(self) -> None:
        """Retry each request of a dead worker in a batch of its own."""
        self._watchdog.hear()
        self._on_restart()
        died = RefusedError(
            "the edit failed twice: the worker process died", status=500, code="worker-died"
        )
        self._try_again(self._take_running_back(), died, most=2)

    def _try_again(self, batch: list[Ticket], error: Exception, *, most: int) -> None:
        """Put tickets back at the head of the queue; a ticket with `most` tries fails instead."""
        for ticket in reversed(batch):
            if ticket.done.done():
                pass
            elif ticket.tries >= most:
                ticket.done.set_exception(error)
            else:
                self._waiting.appendleft(ticket)
            ticket.notify()

    def _give_up(self, why: str) -> None:
        """Refuse what waits, since no worker can run."""
        self._on_trouble(why)
        for ticket in self._waiting:
            if not ticket.done.done():
                ticket.done.set_exception(no_pipeline_error(why))
            ticket.notify()
        self._waiting.clear()

    def _refuse_levels(self) -> None:
        """Refuse waiting requests whose level the loaded passes cannot give."""
        for ticket in list(self._waiting):
            try:
                self._check_level(ticket.request.level)
            except RefusedError as refusal:
                self.cancel(ticket, refusal)

    def _take_running_back(self) -> list[Ticket]:
        batch = list(self._running.values())
        self._running.clear()
        return batch
