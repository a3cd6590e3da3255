"""Mutual exclusion that an interrupt cannot leave locked.

With `threading.Lock`, Ctrl-C can come after the body of `with lock:` and before the release, and
then the lock stays locked for good. A turn needs no release: it is over when its holder calls
`leave`, or when Python deletes the holder, as it deletes a local variable when the frame ends.

`conductor.py` raises the error "already generating" when a turn is taken.
"""

from __future__ import annotations

import os
import sys
import threading
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

__all__ = ["Turns"]

_PAUSE = 0.002  # seconds between two attempts of a waiting thread


class _Turn:
    """One holder's turn: a node of a linked list, whose attribute `next` is the turn after it."""

    def __init__(self, holder: object, frame: FrameType | None = None) -> None:
        self.holder, self.over = weakref.ref(holder), False
        self._process, self._thread = os.getpid(), threading.get_ident()
        self._frame = None if frame is None else id(frame)

    def current(self) -> Any:
        """Return the holder, or None if the turn is over.

        A forked process has none of the threads that held a turn.
        """
        holder = None if self.over or self._process != os.getpid() else self.holder()
        return holder if holder is not None and self._is_running() else None

    def _is_running(self) -> bool:
        """Whether the frame of the holder's block still runs.

        An interrupt may skip `leave`. If somebody keeps its exception, as IPython does, then the
        exception keeps the frame and so the holder alive, but the frame runs no more.
        """
        if self._frame is None:
            return True
        running = sys._current_frames().get(self._thread)  # noqa: SLF001 - its documented name
        while running is not None and id(running) != self._frame:
            running = running.f_back
        return running is not None


class Turns:
    """Gives turns to holders, to one at a time. All threads may use it."""

    def __init__(self) -> None:
        self._latest = _Turn(self)
        self._latest.over = True

    @property
    def holder(self) -> Any:
        """The object whose turn it is; None if it is nobody's turn."""
        return self._last().current()

    def take(self, holder: Any, frame: FrameType | None = None) -> Any:
        """Give the turn to a holder, unless somebody else has it.

        Args:
            holder: any object with weak references. The turn ends when the object is deleted.
            frame: a frame of this thread; the turn also ends when it does.

        Returns:
            The object whose turn it is now.
        """
        mine = _Turn(holder, frame)
        while True:
            last = self._last()
            if (current := last.current()) is not None:
                return current
            # `setdefault` is one atomic step, so two threads cannot both append to the same turn.
            if vars(last).setdefault("next", mine) is mine:
                self._latest = mine
                return holder

    def leave(self, holder: object) -> None:
        """End a holder's turn; do nothing if the holder has no turn."""
        last = self._last()
        if last.current() is holder:
            last.over = True

    @contextmanager
    def wait(self) -> Iterator[None]:
        """Wait until the turn is free, and hold it inside the block.

        Blocks of the same thread may nest.
        """
        me, block = _Waiting(), sys._getframe(2)  # noqa: SLF001 - the frame of the `with` statement
        try:
            while (current := self.take(me, block)) is not me and current.thread != me.thread:
                del current  # a reference would keep the other holder alive, and so its turn
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
    """The holder of a `wait` block's turn."""

    def __init__(self) -> None:
        self.thread = threading.get_ident()
