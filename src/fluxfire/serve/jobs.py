"""Jobs: requests that are answered at once, and looked after later."""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

from fluxfire.serve.engine import Engine, Place, Ticket
from fluxfire.serve.reading import Sent
from fluxfire.serve.refusing import Refused
from fluxfire.serve.schema import EditAnswer, JobAnswer, Problem
from fluxfire.serve.service import Service
from fluxfire.serve.storage import StorageError

_log = logging.getLogger(__name__)
_QUIET = 15.0  # seconds after which a watcher is told that nothing changed


@dataclass(eq=False)
class Job:
    """One job.

    Attributes:
        id: unguessable.
        owner: whose key began it, or None.
        steps: denoising steps in all.
        step: those made, once it has ended.
        task: what carries it out.
        ticket: what the engine knows of it, while that is at work.
        result: what was made.
        error: why nothing was.
        cancelled: whether it was cancelled.
        finished: when it ended, by the monotonic clock.
    """

    id: str
    owner: str | None
    steps: int
    step: int = 0
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
                "step": ticket.step if ticket else self.step,
                "steps": ticket.steps if ticket else self.steps,
                "result": self.result,
                "error": self.error,
            }
        )


class Jobs:
    """All jobs that are known: those that run, and those that ended lately."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._jobs: dict[str, Job] = {}

    def begin(self, sent: Sent, owner: str | None) -> Job:
        """Begin a job.

        Args:
            sent: what is wanted.
            owner: by whom.

        Raises:
            Refused: too many are running already, or the engine would not take it.
        """
        self._forget_old()
        ended = self._ended()
        full = len(self._jobs) >= self._service.settings.max_jobs
        if full and not ended:
            raise Refused(
                f"{len(self._jobs)} jobs are running already; try again later",
                status=429, code="queue-full",
            )  # fmt: skip
        place = self._service.engine.reserve(sent.request.quality)
        if full:  # not before it is known that the room is needed
            del self._jobs[ended[0].id]
        job = Job(secrets.token_urlsafe(16), owner, sent.request.steps)
        self._jobs[job.id] = job
        job.task = asyncio.create_task(self._carry_out(job, sent, place))
        job.task.add_done_callback(lambda _: self._finish(job, place))
        return job

    def find(self, name: str, owner: str | None) -> Job:
        """Find a job.

        Raises:
            Refused: there is none of this id, or another key began it.
        """
        self._forget_old()
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
            job.task.cancel()
            await job.ended.wait()

    async def watch(self, job: Job) -> AsyncIterator[JobAnswer | None]:
        """Yield the job whenever it changed, until it has ended; None after a long silence."""
        before, told = None, time.monotonic()
        while True:
            ended = job.ended.is_set()
            changing = job.ticket.changed if job.ticket else None
            now = job.shown(self._service.engine)
            if now != before or time.monotonic() - told > _QUIET:
                yield now if now != before else None
                before, told = now, time.monotonic()
            if ended:
                return
            changed = changing.wait() if changing else asyncio.sleep(0.05)
            waits = [asyncio.ensure_future(changed), asyncio.ensure_future(job.ended.wait())]
            try:
                # A place in the queue changes without a word to those behind.
                await asyncio.wait(waits, timeout=1.0, return_when=asyncio.FIRST_COMPLETED)
            finally:  # also where the client has gone
                for wait in waits:
                    wait.cancel()

    async def close(self) -> None:
        """Cancel all."""
        await asyncio.gather(*map(self.cancel, self._jobs.values()))

    async def _carry_out(self, job: Job, sent: Sent, place: Place) -> None:
        def put(ticket: Ticket) -> None:
            job.ticket = ticket

        try:
            job.result = await self._service.edit(sent, place, put)
        except Refused as refusal:
            job.error = Problem(code=refusal.code, message=str(refusal))
        except StorageError as error:
            _log.error("storage: %s", error)
            job.error = Problem(code="storage", message="the picture could not be stored")
        except Exception:  # noqa: BLE001 - nobody awaits the task, and a client does
            _log.exception("a job failed")
            job.error = Problem(code="internal", message="something went wrong in the service")

    def _finish(self, job: Job, place: Place) -> None:
        """Note that a job's task has ended, however that was; also if it never began."""
        self._service.engine.leave(place)
        if job.result is None and job.error is None:
            job.cancelled = True
            job.error = Problem(code="cancelled", message="the job was cancelled")
        job.task = None  # cancelled, it holds all that it did
        if job.ticket is not None:  # it holds the pictures, the one sent and those made
            job.step, job.steps, job.ticket = job.ticket.step, job.ticket.steps, None
        job.finished = time.monotonic()
        job.ended.set()
        seconds = self._service.settings.job_seconds
        asyncio.get_running_loop().call_later(seconds, self._forget_old)

    def _forget_old(self) -> None:
        """Forget jobs that ended long ago."""
        now, seconds = time.monotonic(), self._service.settings.job_seconds
        for job in self._ended():
            if job.finished is not None and now - job.finished >= seconds:
                del self._jobs[job.id]

    def _ended(self) -> list[Job]:
        """Return the jobs that ended, the first to end first."""
        ended = [job for job in self._jobs.values() if job.finished is not None]
        return sorted(ended, key=lambda job: job.finished or 0.0)
