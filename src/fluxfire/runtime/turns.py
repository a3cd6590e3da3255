"""One after the other, without a lock that an interrupt could leave held.

Between the end of a `with lock:` and the lock's release there are instructions, and Ctrl-C before
one of them would hold it for good. So here nothing is to be released: a turn is over when its
holder says so, or is no more, as one is whose frame ended.
"""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

__all__ = ["Turns"]

_PAUSE = 0.002  # seconds between two looks of who waits


class _Turn:
    """One holder's turn; those after it hang on it, in its attribute `next`."""

    def __init__(self, holder: object) -> None:
        self.holder, self.over = weakref.ref(holder), False

    def current(self) -> Any:
        """Return the holder, or None if the turn is over."""
        return None if self.over else self.holder()


class Turns:
    """Who has something now. Any thread may ask, and no two have it at once."""

    def __init__(self) -> None:
        self._latest = _Turn(self)
        self._latest.over = True

    @property
    def holder(self) -> Any:
        """Who has it; None if nobody does."""
        return self._last().current()

    def take(self, holder: Any) -> Any:
        """Give it to a holder, unless somebody has it; return who has it then."""
        mine = _Turn(holder)
        while True:
            last = self._last()
            if (current := last.current()) is not None:
                return current
            # Python does this in one step, so a turn is followed by one other alone.
            if vars(last).setdefault("next", mine) is mine:
                self._latest = mine
                return holder

    def leave(self, holder: object) -> None:
        """End a holder's turn, if it has one."""
        last = self._last()
        if last.current() is holder:
            last.over = True

    @contextmanager
    def wait(self) -> Iterator[None]:
        """Wait for a turn, and have it for the length of a `with` block; also within one."""
        me = _Waiting()
        try:
            while (current := self.take(me)) is not me and current.thread != me.thread:
                del current  # else its turn would go on while this waits
                time.sleep(_PAUSE)
            yield
        finally:
            self.leave(me)

    def _last(self) -> _Turn:
        turn = self._latest
        while (after := vars(turn).get("next")) is not None:
            turn = after
        return turn


class _Waiting:
    """Who waits for a turn."""

    def __init__(self) -> None:
        self.thread = threading.get_ident()
