"""Whose turn it is: each key gets an equal part of the work, however much it sends."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterable
from typing import Protocol, TypeVar

Owner = str | None


class Waiting(Protocol):
    """What must be known of a request that waits.

    Attributes:
        number: counted up, so an older request has a smaller one.
        owner: name of the key that sent it; None without keys.
    """

    number: int
    owner: Owner

    @property
    def cost(self) -> float:
        """The work that it asks for."""

    @property
    def alone(self) -> bool:
        """Whether it is tried again."""


T = TypeVar("T", bound=Waiting)


class FairTurns:
    """Counts the work done for each owner; the owner with the least is next.

    Two owners of one request each, 28 steps: they take turns. One of them with 14 steps: it gets
    two turns for each of the other. An owner who was away gets nothing for that time: it enters
    with the count of the owner who is next.
    """

    def __init__(self) -> None:
        self._work: dict[Owner, float] = {}

    def enter(self, owner: Owner, present: Collection[Owner]) -> None:
        """Note that an owner sends a request.

        Args:
            owner: whose request it is.
            present: the owners who have requests that wait or run.
        """
        if owner in present:
            return
        least = min((self._work.get(other, 0.0) for other in present), default=0.0)
        self._work[owner] = max(self._work.get(owner, 0.0), least)

    def charge(self, owner: Owner, cost: float) -> None:
        """Note that an owner's request begins.

        Args:
            owner: whose it is.
            cost: its work.
        """
        self._work[owner] = self._work.get(owner, 0.0) + cost

    def order(self, waiting: Iterable[T]) -> list[T]:
        """Return the requests in the order of their turns.

        Args:
            waiting: the requests, oldest first; an owner's own keep their order. Requests that are
                tried again go first.
        """
        again: list[T] = []
        by_owner: dict[Owner, deque[T]] = {}
        for ticket in waiting:
            if ticket.alone:
                again.append(ticket)
            else:
                by_owner.setdefault(ticket.owner, deque()).append(ticket)
        work = {owner: self._work.get(owner, 0.0) for owner in by_owner}
        ordered = again
        while by_owner:
            owner = min(by_owner, key=lambda one: (work[one], by_owner[one][0].number))
            ticket = by_owner[owner].popleft()
            work[owner] += ticket.cost
            ordered.append(ticket)
            if not by_owner[owner]:
                del by_owner[owner]
        return ordered
