"""Who may still join the queue."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection

from fluxfire.serve.errors import RefusedError
from fluxfire.serve.tickets import QueueSlot, Ticket


class Places:
    """The places of the queue. A request holds one from its arrival until its response is sent."""

    def __init__(self, most: int, most_of: Callable[[str], int]) -> None:
        """Create places, all free.

        Args:
            most: how many requests may wait.
            most_of: how many requests of a key may wait, by the key's name.
        """
        self._most, self._most_of = most, most_of
        self._slots: set[QueueSlot] = set()
        self.all_answered = asyncio.Event()
        self.all_answered.set()

    def __len__(self) -> int:
        return len(self._slots)

    def __contains__(self, slot: QueueSlot) -> bool:
        return slot in self._slots

    def take(
        self, owner: str | None, tickets: Collection[Ticket], spare: int, *, accepted: bool
    ) -> QueueSlot:
        """Take a place.

        Args:
            owner: name of the key that sent the request; None without keys.
            tickets: the requests that wait.
            spare: places beside the queue's own.
            accepted: whether an earlier process of this service has taken the request already, so
                that no queue is too full for it.

        Raises:
            RefusedError: the queue is full, or this owner's part of it is.
        """
        if not accepted:
            self._check_room(owner, tickets, spare)
        slot = QueueSlot(owner)
        self._slots.add(slot)
        self.all_answered.clear()
        return slot

    def release(self, slot: QueueSlot) -> None:
        """Give a place back. A second call does nothing."""
        self._slots.discard(slot)
        if not self._slots:
            self.all_answered.set()

    def clear(self) -> None:
        """Give all places back."""
        self._slots.clear()
        self.all_answered.set()

    def _check_room(self, owner: str | None, tickets: Collection[Ticket], spare: int) -> None:
        waiting = len(tickets) + sum(slot.early for slot in self._slots)
        if waiting >= self._most + spare:
            raise RefusedError(
                f"{waiting} requests wait already; try again later", status=429, code="queue-full"
            )
        if owner is None:
            return
        own = sum(ticket.owner == owner for ticket in tickets)
        own += sum(slot.early and slot.owner == owner for slot in self._slots)
        if own >= self._most_of(owner):
            raise RefusedError(
                f"{own} requests of your key wait already, as many as a key may have; try again "
                f"later",
                status=429,
                code="queue-full",
            )
