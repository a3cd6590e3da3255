"""Requests in the queue, and their places in it."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

from fluxfire.serve.wire import PipelineRequest, Result


@dataclass(eq=False)
class Ticket:
    """A request in the queue or with the worker.

    Attributes:
        number: unique number of the ticket, counted up.
        request: the request to the pipeline.
        done: future of the result, or of the error.
        owner: name of the key that sent it; None without keys.
        request_id: the id that the log has of it.
        began: loop time of the last send to the worker; None before the first.
        inference: seconds that the pipeline took for the batch.
        step: number of denoising steps done.
        steps: total number of denoising steps.
        tries: how many times the engine sent the request to the worker.
        changed: event that `notify` sets and replaces whenever the ticket changes.
    """

    number: int
    request: PipelineRequest
    done: asyncio.Future[Result]
    owner: str | None = None
    request_id: str | None = None
    began: float | None = None
    inference: float = 0.0
    step: int = 0
    steps: int = 0
    tries: int = 0
    changed: asyncio.Event = field(default_factory=asyncio.Event)

    def notify(self) -> None:
        """Wake every task that waits for a change."""
        self.changed.set()
        self.changed = asyncio.Event()

    @property
    def alone(self) -> bool:
        """Whether it must run in a batch of its own, because its first batch failed."""
        return self.tries > 0

    @property
    def cost(self) -> int:
        """The work that it asks for: denoising steps of single pictures."""
        return self.request.steps * len(self.request.seeds)


@dataclass(eq=False)
class QueueSlot:
    """A reserved queue slot, held until the response is sent.

    Attributes:
        owner: name of the key that sent the request; None without keys.
        early: whether the request has no ticket yet, because its picture is still being read.
    """

    owner: str | None = None
    early: bool = True


def mark_retrieved(future: asyncio.Future[Result]) -> None:
    """Read a ticket's error so that asyncio does not log it, in case the client has gone."""
    if not future.cancelled():
        future.exception()
