"""How long a batch may be silent, learnt from earlier batches of its kind."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable

_MOST_KINDS = 256
_SHORTEST_LIMIT, _FACTOR = 10.0, 10.0


class Pace:
    """The time between two signs of progress, by kind of batch.

    The first batch of a kind may compile for minutes, so nothing is expected of it. Later ones
    repeat what it did: if its longest silence was 2 s, one of 20 s is a fault.
    """

    def __init__(self) -> None:
        self._longest: OrderedDict[Hashable, float] = OrderedDict()
        self._kind: Hashable = None
        self._last = self._gap = 0.0

    def begin(self, kind: Hashable, now: float) -> None:
        """Note that a batch begins.

        Args:
            kind: everything that decides how long its steps take.
            now: seconds on a monotonic clock, as in all other methods.
        """
        self._kind, self._last, self._gap = kind, now, 0.0

    def step(self, now: float) -> None:
        """Note that the batch made progress."""
        self._gap, self._last = max(self._gap, now - self._last), now

    def end(self, now: float) -> None:
        """Note that the batch is done, and remember its longest silence."""
        self.step(now)
        # Half of what was remembered: so the first batch's compilation is soon forgotten.
        self._longest[self._kind] = max(self._gap, self._longest.get(self._kind, 0.0) / 2)
        self._longest.move_to_end(self._kind)
        while len(self._longest) > _MOST_KINDS:
            self._longest.popitem(last=False)

    def silence(self, now: float) -> float:
        """Return the seconds since the last progress."""
        return now - self._last

    @property
    def limit(self) -> float | None:
        """Seconds of silence that the batch may have; None if it is the first of its kind."""
        longest = self._longest.get(self._kind)
        return None if longest is None else max(_SHORTEST_LIMIT, _FACTOR * longest)
