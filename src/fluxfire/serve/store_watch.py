"""Knows whether the store takes pictures, so that no edit is made in vain."""

from __future__ import annotations

import asyncio
import logging

from fluxfire.serve.errors import RefusedError
from fluxfire.serve.storage import Storage, StorageError

_log = logging.getLogger(__name__)
_PAUSE = 10.0  # seconds between two attempts


class StoreWatch:
    """Tries a store that failed again and again, until it takes a picture.

    Attributes:
        failed: whether the store failed and has not worked since.
    """

    def __init__(self, storage: Storage | None) -> None:
        """Create a watch. It does nothing before `watch`.

        Args:
            storage: the store; None for a service without one.
        """
        self.failed = False
        self._storage = storage
        self._failure = asyncio.Event()

    def note_failure(self) -> None:
        """Note that the store did not take a picture."""
        self.failed = True
        self._failure.set()

    def refuse(self) -> None:
        """Refuse a new request while its picture could not be stored.

        Raises:
            RefusedError: the store failed and has not worked since.
        """
        if self.failed:
            raise RefusedError(
                "the store takes no pictures at the moment; try again later",
                status=503,
                code="storage",
            )

    async def watch(self) -> None:
        """Try a store that failed every ten seconds, until cancelled."""
        while self._storage is not None:
            await self._failure.wait()
            await asyncio.sleep(_PAUSE)
            try:
                await asyncio.to_thread(self._storage.check)
            except StorageError as error:
                _log.warning("%s", error)
            else:
                _log.info("the store takes pictures again")
                self.failed = False
                self._failure.clear()
