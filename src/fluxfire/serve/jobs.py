"""Jobs: edits that run in the background, and that clients poll or watch.

The database has every job; this module has the ones that run. With a database file, jobs survive a
restart: those that waited run, and one that the worker had begun runs once more.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import secrets
import time
from collections.abc import AsyncIterator

from fluxfire.errors import FluxfireError
from fluxfire.serve.errors import RefusedError
from fluxfire.serve.idempotency import check_key, fingerprint_of, same_job
from fluxfire.serve.job_store import JobStore, StoredJob
from fluxfire.serve.keys import Keys
from fluxfire.serve.live_job import LiveJob, problem_of
from fluxfire.serve.logs import request_id
from fluxfire.serve.quotas import Quotas
from fluxfire.serve.request_body import SentRequest
from fluxfire.serve.schema import EditAnswer, ImageMade, JobAnswer, JobRequest, Problem
from fluxfire.serve.service import Service
from fluxfire.serve.storage import StorageError
from fluxfire.serve.tickets import QueueSlot, Ticket
from fluxfire.serve.webhooks import Webhooks

_log = logging.getLogger(__name__)
_QUIET = 15.0  # seconds without a change after which `watch` yields None
_MOST_TRIES = 2  # of a job that the service's end interrupts
_POLL_SECONDS = 0.2


class Jobs:
    """All jobs of a service."""

    def __init__(
        self,
        service: Service,
        store: JobStore,
        webhooks: Webhooks | None = None,
        keys: Keys | None = None,
    ) -> None:
        """Create them; `resume` takes up those of an earlier process.

        Args:
            service: makes the edits.
            store: the database.
            webhooks: announce the end of jobs; None without.
            keys: limits of each key; None without keys.
        """
        self._service, self._store, self._webhooks = service, store, webhooks
        self._quotas = Quotas(service.settings, store, keys)
        self._live: dict[str, LiveJob] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._beginning = asyncio.Lock()
        self._durable = store.path is not None

    async def reserve(self, sent: SentRequest, owner: str | None) -> QueueSlot:
        """Reserve a place in the queue, and count the edit among the day's.

        Raises:
            RefusedError: the engine refuses the request, the store takes no pictures, or the key
                has no edits left today.
        """
        self._service.store_watch.refuse()
        slot = self._service.engine.reserve(sent.request.quality, owner)
        try:
            await self._quotas.count_edit(owner)
        except BaseException:
            self._service.engine.release(slot)
            raise
        return slot

    async def begin(self, sent: SentRequest, owner: str | None, key: str | None = None) -> str:
        """Begin a job, unless the same key has begun it already.

        Args:
            sent: the client's request.
            owner: name of the client's key; None without keys.
            key: the client's idempotency key, if it sent one.

        Returns:
            The job's id.

        Raises:
            RefusedError: there are too many jobs, the engine refuses the request, or the
                idempotency key belongs to another request.
        """
        check_key(key)
        url = getattr(sent.request, "webhook_url", None)
        if url is not None and self._webhooks is not None:
            self._webhooks.check(url)
        fingerprint = await asyncio.to_thread(fingerprint_of, sent)
        async with self._beginning:
            await self.forget_old()
            if key is not None:
                known = await asyncio.to_thread(self._store.by_key, owner or "", key)
                if known is not None:
                    return same_job(known, fingerprint)
            await self._quotas.check_jobs(owner)
            slot = await self.reserve(sent, owner)
            row = StoredJob(
                id=secrets.token_urlsafe(16),
                owner=owner or "",
                status="queued",
                created=time.time(),
                steps=sent.request.steps,
                request_id=request_id.get(),
                idempotency_key=key,
                fingerprint=fingerprint,
                webhook_url=url,
            )
            try:
                await asyncio.to_thread(self._add, row, sent)
            except BaseException:
                self._service.engine.release(slot)
                raise
            self._start(row, sent, slot)
        return row.id

    async def show(self, name: str, owner: str | None) -> JobAnswer:
        """Return a job's current state.

        Raises:
            RefusedError: no job has this id, or another key began it.
        """
        return self._shown(await self._find(name, owner))

    async def cancel(self, name: str, owner: str | None) -> JobAnswer:
        """Cancel a job, unless it has ended, and return its state.

        Raises:
            RefusedError: as `show`.
        """
        row = await self._find(name, owner)
        job = self._live.get(name)
        if job is not None:
            job.cancelled = True
            if job.edit is not None:
                job.edit.cancel()
            await job.ended.wait()
        elif row.finished is None:  # it waits to be taken up after a restart
            await self._record(LiveJob(row, cancelled=True))
        return await self.show(name, owner)

    async def result(self, name: str, owner: str | None) -> str:
        """Wait until a job ends, and return its answer in JSON.

        Raises:
            RefusedError: it has no result, for this reason; or as `show`.
        """
        while (row := await self._find(name, owner)).finished is None:
            job = self._live.get(name)
            await (job.ended.wait() if job else asyncio.sleep(_POLL_SECONDS))
        if row.result is None:
            error = json.loads(row.error or "{}")
            raise RefusedError(error["message"], status=error["status"], code=error["code"])
        return row.result

    async def image(self, name: str, number: int, owner: str | None) -> ImageMade:
        """Return a picture of a job's answer.

        Raises:
            RefusedError: the job has no such picture; or as `show`.
        """
        row = await self._find(name, owner)
        images = EditAnswer.model_validate_json(row.result).images if row.result else []
        if number >= len(images):
            raise RefusedError(
                f"the job is {self._shown(row).status} and has {len(images)} pictures, so there is "
                f"no picture {number}; they are numbered from 0",
                status=404,
                code="image-unknown",
            )
        return images[number]

    async def watch(self, name: str, owner: str | None) -> AsyncIterator[JobAnswer | None]:
        """Yield the job after each change until it ends; yield None after 15 s without one."""
        before, last_yield = None, time.monotonic()
        while True:
            job = self._live.get(name)
            changing = job.ticket.changed if job and job.ticket else None
            now = await self.show(name, owner)
            if now != before or time.monotonic() - last_yield > _QUIET:
                yield now if now != before else None
                before, last_yield = now, time.monotonic()
            if now.status not in {"queued", "running"} or (job and job.suspended):
                return
            if job is None or changing is None:
                await asyncio.sleep(_POLL_SECONDS)
                continue
            waits = [asyncio.ensure_future(one.wait()) for one in (changing, job.ended)]
            try:
                # The position in the queue changes without an event, so look every second.
                await asyncio.wait(waits, timeout=1.0, return_when=asyncio.FIRST_COMPLETED)
            finally:  # also if the client disconnects
                for wait in waits:
                    wait.cancel()

    def webhook_body(self, row: StoredJob) -> bytes:
        """Return what a webhook tells of a job that ended: the job, without its pictures' data."""
        shown = self._shown(row)
        for image in shown.result.images if shown.result else ():
            image.data_url = None
        return shown.model_dump_json().encode()

    async def resume(self) -> None:
        """Take up the jobs of an earlier process, one after another: each may hold a picture."""
        for row in await asyncio.to_thread(self._store.unfinished):
            if row.id in self._live:
                continue
            text, picture = await asyncio.to_thread(self._store.request, row.id)
            if text is None:  # a client cancelled it meanwhile
                continue
            job = LiveJob(row)
            try:
                if row.tries >= _MOST_TRIES:
                    raise _interrupted_error()
                sent = SentRequest(JobRequest.model_validate_json(text), picture)
                owner = row.owner or None
                slot = self._service.engine.reserve(sent.request.quality, owner, accepted=True)
            except (RefusedError, ValueError) as refusal:
                job.error = problem_of(refusal)
                await self._record(job)
                continue
            request_id.set(row.request_id)
            job = self._start(row, sent, slot)
            await job.placed.wait()

    async def suspend(self) -> None:
        """When the service begins to stop, leave the jobs that wait for its next start."""
        with contextlib.suppress(RefusedError):
            await self._service.engine.until_stopping()
        if self._durable:
            for job in list(self._live.values()):
                if job.ticket is None or job.ticket.began is None:
                    self._leave(job)

    async def close(self) -> None:
        """End all jobs of this process; without a database file they are cancelled."""
        for job in list(self._live.values()):
            if self._durable:
                self._leave(job)
            elif job.edit is not None:
                job.cancelled = True
                job.edit.cancel()
        await asyncio.gather(*self._tasks)

    async def forget_old(self) -> None:
        """Delete jobs that ended more than `job_seconds` ago."""
        before = time.time() - self._service.settings.job_seconds
        await asyncio.to_thread(self._store.forget, before)

    def _add(self, row: StoredJob, sent: SentRequest) -> None:
        """Put a job into the database; only a file of it needs the request, for the next start."""
        text = sent.request.model_dump_json(exclude_unset=True) if self._durable else None
        self._store.add(row, text, sent.file if self._durable else None)

    def _start(self, row: StoredJob, sent: SentRequest, slot: QueueSlot) -> LiveJob:
        job = self._live[row.id] = LiveJob(row)
        job.edit = asyncio.create_task(self._edit(job, sent, slot))
        task = asyncio.create_task(self._live_through(job, job.edit, slot))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return job

    async def _edit(self, job: LiveJob, sent: SentRequest, slot: QueueSlot) -> None:
        def put(ticket: Ticket) -> None:
            job.ticket = ticket
            job.placed.set()

        try:
            job.result = await self._service.edit(sent, slot, put)
        except RefusedError as refusal:
            job.error = problem_of(refusal)
            # The next start of the service makes what this one could not.
            job.suspended |= self._durable and refusal.code == "stopping"
        except StorageError as error:
            _log.error("storage: %s", error)
            job.error = Problem(code="storage", message="the picture could not be stored"), 503
        except Exception:  # noqa: BLE001 - nothing awaits the task, and the client needs an answer
            _log.exception("a job failed")
            job.error = Problem(code="internal", message="the service failed"), 500

    async def _live_through(self, job: LiveJob, edit: asyncio.Task[None], slot: QueueSlot) -> None:
        """Wait for a job's end, and record it."""
        begun = asyncio.create_task(self._note_begin(job))
        await asyncio.wait({edit})
        self._service.engine.release(slot)
        job.placed.set()
        await begun  # so that its note does not follow the end's
        if not job.suspended or job.cancelled:
            await self._record(job)
        job.edit = job.ticket = None  # they hold pictures
        del self._live[job.row.id]
        job.ended.set()

    async def _note_begin(self, job: LiveJob) -> None:
        """Tell the database when the worker begins a job, so that no job can crash it for ever."""
        await job.placed.wait()
        ticket = job.ticket
        while ticket is not None and ticket.began is None and job.edit and not job.edit.done():
            waits = {job.edit, asyncio.ensure_future(ticket.changed.wait())}
            _, pending = await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
            for wait in pending - {job.edit}:
                wait.cancel()
        if ticket is not None and ticket.began is not None:
            await asyncio.to_thread(self._store.begin, job.row.id)

    async def _record(self, job: LiveJob) -> None:
        """Write a job's end into the database."""
        if job.result is None and job.error is None:
            job.error = Problem(code="cancelled", message="the job was cancelled"), 409
            status = "cancelled"
        else:
            status = "failed" if job.error else "done"
        try:
            await asyncio.to_thread(self._write_end, job, status, time.time())
        except FluxfireError:
            _log.exception("the end of job %s is lost", job.row.id)

    def _write_end(self, job: LiveJob, status: str, now: float) -> None:
        row = job.row
        error = None
        if job.error is not None:
            problem, http_status = job.error
            error = json.dumps({**problem.model_dump(), "status": http_status})
        self._store.finish(
            row.id,
            status=status,
            finished=now,
            step=job.ticket.step if job.ticket else 0,
            steps=job.ticket.steps if job.ticket else row.steps,
            result=job.result.model_dump_json() if job.result else None,
            error=error,
            webhook_due=now if row.webhook_url else None,
        )

    def _leave(self, job: LiveJob) -> None:
        job.suspended = True
        if job.edit is not None:
            job.edit.cancel()

    async def _find(self, name: str, owner: str | None) -> StoredJob:
        row = await asyncio.to_thread(self._store.get, name)
        seconds = self._service.settings.job_seconds
        old = row and row.finished is not None and time.time() - row.finished >= seconds
        if row is None or row.owner != (owner or "") or old:
            raise RefusedError(
                "there is no such job; the service deletes finished jobs after a while",
                status=404,
                code="job-unknown",
            )
        return row

    def _shown(self, row: StoredJob) -> JobAnswer:
        job = self._live.get(row.id) if row.finished is None else None
        ticket = job.ticket if job else None
        position = self._service.engine.position(ticket) if ticket else None
        status: str = row.status
        if row.finished is None:
            status = "running" if ticket and ticket.began and position is None else "queued"
        return JobAnswer.model_validate(
            {
                "id": row.id,
                "status": status,
                "position": position,
                "step": ticket.step if ticket else row.step,
                "steps": ticket.steps if ticket else row.steps,
                "result": json.loads(row.result) if row.result else None,
                "error": json.loads(row.error) if row.error else None,
            }
        )


def _interrupted_error() -> RefusedError:
    return RefusedError(
        "the service ended twice while it made this edit, so it does not try again",
        status=500,
        code="interrupted",
    )
