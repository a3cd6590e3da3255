"""What a key may ask of the service: edits a day, and jobs."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime

from fluxfire.serve.errors import RefusedError
from fluxfire.serve.job_store import JobStore
from fluxfire.serve.keys import Keys
from fluxfire.serve.settings import Settings

_HOUR, _MINUTE = 3600, 60


class Quotas:
    """Counts in the jobs' database, so that a restart gives nobody more."""

    def __init__(self, settings: Settings, store: JobStore, keys: Keys | None) -> None:
        self._settings, self._store, self._keys = settings, store, keys

    async def count_edit(self, owner: str | None) -> None:
        """Count an edit that the queue takes.

        Args:
            owner: name of the key that sent it; None without keys.

        Raises:
            RefusedError: the key has no edits left today.
        """
        most = self._keys.limits(owner).edits_per_day if self._keys and owner else None
        if most is None or owner is None:
            return
        now = datetime.now(UTC)
        if not await asyncio.to_thread(self._store.count_edit, owner, now.date().isoformat(), most):
            raise RefusedError(
                f"your key may make {most} edits a day, and it has made them; the next day begins "
                f"at midnight UTC",
                status=429,
                code="quota-used",
                retry_after=24 * _HOUR - now.hour * _HOUR - now.minute * _MINUTE - now.second,
            )

    async def check_jobs(self, owner: str | None) -> None:
        """Check that a key may have one more job.

        Args:
            owner: name of the key; None without keys.

        Raises:
            RefusedError: it has as many as the service keeps.
        """
        kept, most = (
            await asyncio.to_thread(self._store.count, owner or ""),
            self._settings.max_jobs,
        )
        if kept >= most:
            raise RefusedError(
                f"the service keeps {kept} jobs for you, and {most} is the most; it deletes a job "
                f"{self._settings.job_seconds:g} s after its end, so try again later",
                status=429,
                code="queue-full",
            )
