"""Watches the worker, and has it killed when it hangs."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Collection, Hashable

from fluxfire.serve.pace import Pace
from fluxfire.serve.tickets import Ticket
from fluxfire.serve.wire import HEARTBEAT

_log = logging.getLogger(__name__)
_LONGEST_SILENCE = 5 * HEARTBEAT  # of a process that runs


class Watchdog:
    """Knows when the worker's process and its batch last gave a sign of life."""

    def __init__(
        self,
        hang_seconds: float,
        running: Callable[[], Collection[Ticket]],
        kill: Callable[[], None],
    ) -> None:
        """Create a watchdog.

        Args:
            hang_seconds: as in the settings.
            running: returns the requests that the worker has.
            kill: kills the worker.
        """
        self._most, self._running, self._kill = hang_seconds, running, kill
        self._pace = Pace()
        self._loop: asyncio.AbstractEventLoop | None = None  # the one that hears the worker
        self._heard = 0.0  # loop time of the worker's last message
        self._timer: asyncio.TimerHandle | None = None

    def hear(self) -> None:
        """Note a message from the worker."""
        self._loop = asyncio.get_running_loop()
        self._heard = self._loop.time()

    def begin(self, kind: Hashable) -> None:
        """Note that a batch begins; `kind` is everything that decides how long its steps take."""
        self._pace.begin(kind, _now())
        self.watch()

    def step(self) -> None:
        """Note that the batch made progress."""
        self._pace.step(_now())

    def end(self) -> None:
        """Note that the batch is done."""
        self._pace.end(_now())

    @property
    def stalled(self) -> bool:
        """Whether the process, or its batch, is silent for longer than usual.

        Any thread may ask.
        """
        if self._loop is None:
            return False
        now, limit = self._loop.time(), self._pace.limit if self._running() else None
        late = limit is not None and self._pace.silence(now) > limit
        return late or now - self._heard > _LONGEST_SILENCE

    def watch(self) -> None:
        """Start a timer that kills the worker if it hangs."""
        if self._timer is None:
            # Several looks, since a batch may be cancelled after the first.
            loop = asyncio.get_running_loop()
            self._timer = loop.call_later(self._most / 4, self._check)

    def stop(self) -> None:
        """Stop the timer."""
        if self._timer is not None:
            self._timer.cancel()

    def _check(self) -> None:
        """Kill a worker whose process is silent, or whose batch is and should not be.

        Only two batches should not be: one of a kind that was seen before, and one that nobody
        waits for. Any other may compile. A kind whose steps take minutes gets minutes.
        """
        self._timer = None
        running = self._running()
        if not running:
            return
        now, limit = _now(), self._pace.limit
        cancelled = all(ticket.done.done() for ticket in running)
        silent, stuck = now - self._heard, self._pace.silence(now)
        may_compile = limit is None and not cancelled
        if silent < self._most and (may_compile or stuck < max(self._most, limit or 0.0)):
            self.watch()
            return
        _log.error("the worker was silent for %.0f s: killed", max(silent, stuck))
        self._kill()


def _now() -> float:
    return asyncio.get_running_loop().time()
