"""Closes connections on which nobody asks for anything, so that they block nobody else."""

from __future__ import annotations

import asyncio
import logging
import sys
from collections.abc import Set as AbstractSet
from typing import Any

_log = logging.getLogger(__name__)
_LOOK_SECONDS = 1.0
_USUAL_DESCRIPTORS = 1024


class ConnectionGuard:
    """Ends connections that send no request, or half of a head.

    uvicorn waits for a head for ever, and each connection holds a file descriptor. A few hundred
    silent ones would keep everybody else out, also without a key.
    """

    def __init__(self, connections: AbstractSet[Any], seconds: float, most: int) -> None:
        """Create a guard. It does nothing before `watch`.

        Args:
            connections: uvicorn's protocols, one for each open connection.
            seconds: how long a connection may be without a request.
            most: from this many connections on, the longest without a request end at once.
        """
        self._connections, self._seconds, self._most = connections, seconds, most
        self._since: dict[Any, float] = {}  # when each was first seen without a request

    async def watch(self) -> None:
        """Look every second, until cancelled."""
        loop = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(_LOOK_SECONDS)
            if ended := self.look(loop.time()):
                _log.warning("closed %d connections that sent no request", ended)

    def look(self, now: float) -> int:
        """End the connections that have been silent for too long.

        Args:
            now: seconds on a monotonic clock.

        Returns:
            How many it ended.
        """
        silent = {each for each in self._connections if _is_silent(each)}
        self._since = {each: self._since.get(each, now) for each in silent}
        oldest_first = sorted(self._since, key=self._since.__getitem__)
        excess = len(self._connections) - self._most
        ended = [
            each
            for place, each in enumerate(oldest_first)
            if place < excess or now - self._since[each] >= self._seconds
        ]
        for each in ended:
            del self._since[each]
            each.transport.abort()
        return len(ended)


def most_connections() -> int:
    """Return how many connections a service should hold: half of the process's descriptors."""
    if sys.platform == "win32":
        return _USUAL_DESCRIPTORS // 2
    import resource

    allowed, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return max(16, allowed // 2) if allowed != resource.RLIM_INFINITY else _USUAL_DESCRIPTORS * 8


def _is_silent(connection: Any) -> bool:
    """Whether no request is being answered on a connection."""
    cycle = getattr(connection, "cycle", None)  # uvicorn's name for a request and its response
    return cycle is None or cycle.response_complete
