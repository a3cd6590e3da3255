"""Jobs: requests that are answered at once, and looked after later."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections import OrderedDict
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

from fluxfire.serve.engine import Engine, Ticket
from fluxfire.serve.refusing import Refused
from fluxfire.serve.schema import EditAnswer, EditRequest, JobAnswer, Problem
from fluxfire.serve.service import Service
from fluxfire.serve.storage import StorageError


@dataclass(eq=False)
class Job:
    """One job.

    Attributes:
        id: unguessable.
        owner: whose key began it, or None.
        task: what carries it out.
        ticket: its place in the engine, once it has one.
        result: what was made.
        error: why nothing was.
        cancelled: whether it was cancelled.
        finished: when it ended, by the monotonic clock.
    """

    id: str
    owner: str | None
    steps: int
    task: asyncio.Task[None] | None = None
    ticket: Ticket | None = None
    result: EditAnswer | None = None
    error: Problem | None = None
    cancelled: bool = False
    finished: float | None = None
    ended: asyncio.Event = field(default_factory=asyncio.Event)

    def shown(self, engine: Engine) -> JobAnswer:
        """Describe it as it is now."""
        ticket = self.ticket
        position = engine.position(ticket) if ticket and not self.ended.is_set() else None
        if self.ended.is_set():
            status = "cancelled" if self.cancelled else "failed" if self.error else "done"
        else:
            status = "running" if ticket and ticket.began and position is None else "queued"
        return JobAnswer.model_validate(
            {
                "id": self.id,
                "status": status,
                "position": position,
                "step": ticket.step if ticket else 0,
                "steps": ticket.steps if ticket else self.steps,
                "result": self.result,
                "error": self.error,
            }
        )


class Jobs:
    """All jobs that are known: those that run, and those that ended lately."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._jobs: OrderedDict[str, Job] = OrderedDict()

    def begin(self, request: EditRequest, file: bytes | None, owner: str | None) -> Job:
        """Begin a job.

        Raises:
            Refused: too many are running already, or the engine would not take it.
        """
        self._forget()
        coming = sum(job.ticket is None and job.finished is None for job in self._jobs.values())
        self._service.engine.check(request.quality, coming=coming)
        if len(self._jobs) >= self._service.settings.max_jobs:
            raise Refused(
                f"{len(self._jobs)} jobs are running already; try again later",
                status=429, code="queue-full",
            )  # fmt: skip
        job = Job(secrets.token_urlsafe(16), owner, request.steps)
        self._jobs[job.id] = job
        job.task = asyncio.create_task(self._carry_out(job, request, file))
        return job

    def find(self, name: str, owner: str | None) -> Job:
        """Find a job.

        Raises:
            Refused: there is none of this id, or another key began it.
        """
        self._forget()
        job = self._jobs.get(name)
        if job is None or job.owner != owner:
            raise Refused(
                "there is no such job; finished ones are forgotten after a while",
                status=404, code="job-unknown",
            )  # fmt: skip
        return job

    async def cancel(self, job: Job) -> None:
        """Cancel a job, unless it has ended."""
        if job.task is not None and not job.ended.is_set():
            job.cancelled = True
            job.task.cancel()
            await job.ended.wait()

    async def settle(self) -> None:
        """Wait until what was made is stored, too."""
        tasks = [job.task for job in self._jobs.values() if job.task]
        await asyncio.gather(*tasks, return_exceptions=True)

    async def watch(self, job: Job) -> AsyncIterator[JobAnswer]:
        """Yield the job whenever it changed, until it has ended."""
        before = None
        while True:
            ended = job.ended.is_set()
            changing = job.ticket.changed if job.ticket else None
            now = job.shown(self._service.engine)
            if now != before:
                yield now
            if ended:
                return
            before = now
            changed = changing.wait() if changing else asyncio.sleep(0.05)
            waits = [asyncio.ensure_future(changed), asyncio.ensure_future(job.ended.wait())]
            # A place in the queue changes without a word to those behind.
            await asyncio.wait(waits, timeout=1.0, return_when=asyncio.FIRST_COMPLETED)
            for wait in waits:
                wait.cancel()

    async def close(self) -> None:
        """Cancel all."""
        await asyncio.gather(*map(self.cancel, self._jobs.values()))

    async def _carry_out(self, job: Job, request: EditRequest, file: bytes | None) -> None:
        def put(ticket: Ticket) -> None:
            job.ticket = ticket

        try:
            job.result = await self._service.edit(request, file, put)
        except asyncio.CancelledError:
            job.cancelled = True
            job.error = Problem(code="cancelled", message="the job was cancelled")
        except Refused as refusal:
            job.error = Problem(code=refusal.code, message=str(refusal))
        except StorageError:
            job.error = Problem(code="storage", message="the picture could not be stored")
        finally:
            job.finished = time.monotonic()
            job.ended.set()

    def _forget(self) -> None:
        """Forget jobs that ended long ago, and the oldest that ended where there are too many."""
        settings = self._service.settings
        ended = [job for job in self._jobs.values() if job.finished is not None]
        room = settings.max_jobs - len(self._jobs)
        for job in ended:
            assert job.finished is not None  # noqa: S101 - it ended
            if room > 0 and time.monotonic() - job.finished < settings.job_seconds:
                continue
            del self._jobs[job.id]
            room += 1
