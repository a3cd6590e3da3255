"""Which of the requests that wait go to the worker together."""

from __future__ import annotations

from collections.abc import Sequence

from fluxfire.serve.tickets import Ticket


def next_batch(waiting: Sequence[Ticket], at_once: int) -> list[Ticket]:
    """Choose the next batch: the first request, and those of its kind that there is room for.

    Args:
        waiting: the requests in the order of their turns; not empty.
        at_once: most pictures of a batch. A first request of more goes alone.
    """
    first, *others = waiting
    batch, room = [first], at_once - len(first.request.seeds)
    if first.alone:
        return batch
    for ticket in others:
        pictures = len(ticket.request.seeds)
        if pictures <= room and ticket.request.kind == first.request.kind:
            batch.append(ticket)
            room -= pictures
    return batch
