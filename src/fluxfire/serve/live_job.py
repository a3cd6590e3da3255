"""A job that waits or runs in this process."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

from fluxfire.serve.errors import RefusedError
from fluxfire.serve.job_store import StoredJob
from fluxfire.serve.schema import EditAnswer, Problem
from fluxfire.serve.tickets import Ticket


@dataclass(eq=False)
class LiveJob:
    """A job that waits or runs in this process.

    Attributes:
        row: what the database has of it.
        edit: the task that edits.
        ticket: its ticket in the engine, from submission to the end.
        placed: event that is set when it has a ticket, or ends without one.
        suspended: whether it is left for the next start of the service.
        cancelled: whether a client cancelled it.
        result: the answer of a job that succeeded.
        error: the reason why it has no result, and the HTTP status of that reason.
        ended: event that is set when the database has its end.
    """

    row: StoredJob
    edit: asyncio.Task[None] | None = None
    ticket: Ticket | None = None
    placed: asyncio.Event = field(default_factory=asyncio.Event)
    suspended: bool = False
    cancelled: bool = False
    result: EditAnswer | None = None
    error: tuple[Problem, int] | None = None
    ended: asyncio.Event = field(default_factory=asyncio.Event)


def problem_of(error: RefusedError | ValueError) -> tuple[Problem, int]:
    """Return what a job's client is told of an error, and its HTTP status."""
    if isinstance(error, RefusedError):
        return Problem(code=error.code, message=str(error)), error.status
    return Problem(code="internal", message="the request cannot be read any more"), 500
