"""Jobs: edits that run in the background, and that clients poll or watch."""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

from fluxfire.serve.engine import Engine, QueueSlot, Ticket
from fluxfire.serve.errors import RefusedError
from fluxfire.serve.request_body import SentRequest
from fluxfire.serve.schema import EditAnswer, JobAnswer, Problem
from fluxfire.serve.service import Service
from fluxfire.serve.storage import StorageError

_log = logging.getLogger(__name__)
_QUIET = 15.0  # seconds without a change after which `watch` yields None


@dataclass(eq=False)
class Job:
    """One job.

    Attributes:
        id: random, so that nobody can guess it.
        owner: name of the key that began it; None without keys.
        steps: total number of denoising steps.
        step: number of denoising steps done; set when the job ends.
        task: the asyncio task that runs it.
        ticket: its ticket in the engine, from submission to the end.
        result: the answer of a job that succeeded.
        error: the reason why a job has no result.
        cancelled: whether it was cancelled.
        finished: when it ended, by the monotonic clock.
        ended: event that is set when it ends.
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
        """Return its current state as an answer."""
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
    """The running jobs, and the jobs that ended recently."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._jobs: dict[str, Job] = {}

    def begin(self, sent: SentRequest, owner: str | None) -> Job:
        """Begin a job.

        Args:
            sent: the client's request.
            owner: name of the client's key; None without keys.

        Raises:
            RefusedError: too many jobs are running, or the engine refuses the request.
        """
        self._forget_old()
        ended = self._ended(owner)
        own = sum(job.owner == owner for job in self._jobs.values())
        full = own >= self._service.settings.max_jobs
        if full and not ended:
            raise RefusedError(
                f"{own} jobs are running already; try again later",
                status=429,
                code="queue-full",
            )
        slot = self._service.engine.reserve(sent.request.quality, owner)
        if full:  # only now, because `reserve` may raise
            del self._jobs[ended[0].id]
        job = Job(secrets.token_urlsafe(16), owner, sent.request.steps)
        self._jobs[job.id] = job
        job.task = asyncio.create_task(self._carry_out(job, sent, slot))
        job.task.add_done_callback(lambda _: self._finish(job, slot))
        return job

    def find(self, name: str, owner: str | None) -> Job:
        """Find a job.

        Raises:
            RefusedError: no job has this id, or another key began it.
        """
        self._forget_old()
        job = self._jobs.get(name)
        if job is None or job.owner != owner:
            raise RefusedError(
                "there is no such job; the service deletes finished jobs after a while",
                status=404,
                code="job-unknown",
            )
        return job

    async def cancel(self, job: Job) -> None:
        """Cancel a job that is still running."""
        if job.task is not None and not job.ended.is_set():
            job.task.cancel()
            await job.ended.wait()

    async def watch(self, job: Job) -> AsyncIterator[JobAnswer | None]:
        """Yield the job after each change until it ends; yield None after 15 s without one."""
        before, last_yield = None, time.monotonic()
        while True:
            ended = job.ended.is_set()
            changing = job.ticket.changed if job.ticket else None
            now = job.shown(self._service.engine)
            if now != before or time.monotonic() - last_yield > _QUIET:
                yield now if now != before else None
                before, last_yield = now, time.monotonic()
            if ended:
                return
            changed = changing.wait() if changing else asyncio.sleep(0.05)
            waits = [asyncio.ensure_future(changed), asyncio.ensure_future(job.ended.wait())]
            try:
                # The position in the queue changes without an event, so look every second.
                await asyncio.wait(waits, timeout=1.0, return_when=asyncio.FIRST_COMPLETED)
            finally:  # also if the client disconnects
                for wait in waits:
                    wait.cancel()

    async def close(self) -> None:
        """Cancel all jobs."""
        await asyncio.gather(*map(self.cancel, self._jobs.values()))

    async def _carry_out(self, job: Job, sent: SentRequest, slot: QueueSlot) -> None:
        def put(ticket: Ticket) -> None:
            job.ticket = ticket

        try:
            job.result = await self._service.edit(sent, slot, put)
        except RefusedError as refusal:
            job.error = Problem(code=refusal.code, message=str(refusal))
        except StorageError as error:
            _log.error("storage: %s", error)
            job.error = Problem(code="storage", message="the picture could not be stored")
        except Exception:  # noqa: BLE001 - nothing awaits the task, and the client needs an answer
            _log.exception("a job failed")
            job.error = Problem(code="internal", message="the service failed")

    def _finish(self, job: Job, slot: QueueSlot) -> None:
        """Record the end of a job's task: success, failure, or cancellation before its start."""
        self._service.engine.release(slot)
        if job.result is None and job.error is None:
            job.cancelled = True
            job.error = Problem(code="cancelled", message="the job was cancelled")
        job.task = None  # a cancelled task holds its frames, and these hold pictures
        if job.ticket is not None:  # the ticket holds the input and output pictures
            job.step, job.steps, job.ticket = job.ticket.step, job.ticket.steps, None
        job.finished = time.monotonic()
        job.ended.set()
        seconds = self._service.settings.job_seconds
        asyncio.get_running_loop().call_later(seconds, self._forget_old)

    def _forget_old(self) -> None:
        """Delete jobs that ended more than `job_seconds` ago."""
        now, seconds = time.monotonic(), self._service.settings.job_seconds
        for job in [job for job in self._jobs.values() if job.finished is not None]:
            if job.finished is not None and now - job.finished >= seconds:
                del self._jobs[job.id]

    def _ended(self, owner: str | None) -> list[Job]:
        """Return an owner's jobs that ended, oldest first: nobody else's makes room for its own."""
        own = [job for job in self._jobs.values() if job.owner == owner]
        ended = [job for job in own if job.finished is not None]
        return sorted(ended, key=lambda job: job.finished or 0.0)
