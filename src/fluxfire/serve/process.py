"""A worker process seen from the server: started, sent to, heard, stopped."""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import pickle
import queue
import threading
from collections.abc import Callable

from fluxfire.serve import worker
from fluxfire.serve.settings import Settings
from fluxfire.serve.wire import FromWorker, Stop, ToWorker

_log = logging.getLogger(__name__)
_LoopClosed = RuntimeError  # what asyncio raises then
_UNREADABLE = (pickle.UnpicklingError, AttributeError, ImportError, ValueError, MemoryError)
_PATIENCE = 5.0  # seconds to end by itself


class WorkerProcess:
    """One spawned process, which never shares the server's memory."""

    def __init__(self, settings: Settings) -> None:
        context = multiprocessing.get_context("spawn")
        self._ours, self._theirs = context.Pipe()
        self._process = context.Process(
            target=worker.main, args=(self._theirs, settings), name="fluxfire worker", daemon=True
        )
        self._outbox: queue.SimpleQueue[ToWorker | None] = queue.SimpleQueue()

    def start(self, heard: Callable[[FromWorker | None], None]) -> None:
        """Start it.

        Args:
            heard: is called with each message, and with None when it is gone; from a thread.
        """
        self._process.start()
        self._theirs.close()  # or its end would not be noticed
        reader = threading.Thread(
            target=self._listen, args=(heard,), name="worker-reader", daemon=True
        )
        writer = threading.Thread(target=self._speak, name="worker-writer", daemon=True)
        try:
            writer.start()
            reader.start()
        except (RuntimeError, MemoryError):  # there is no room for a thread
            self._process.kill()  # nobody would ever hear of it
            self.send_no_more()
            raise

    def send(self, message: ToWorker) -> None:
        """Send a message; pictures take their time, so a thread does."""
        self._outbox.put(message)

    def stop(self) -> None:
        """End it: kindly, then not."""
        self.send(Stop())
        self.send_no_more()
        threading.Thread(target=self._end, name="worker-stopper").start()

    def kill(self) -> None:
        """End it at once; `heard` is told."""
        self._process.kill()

    def send_no_more(self) -> None:
        """Let the sending thread end."""
        self._outbox.put(None)

    def _end(self) -> None:
        self._process.join(_PATIENCE)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()

    def _listen(self, heard: Callable[[FromWorker | None], None]) -> None:
        with contextlib.suppress(_LoopClosed):  # then nobody listens any more
            try:
                while True:
                    heard(self._ours.recv())
            except (EOFError, OSError):
                pass
            except _LoopClosed:
                raise
            except _UNREADABLE:
                _log.exception("what the worker says cannot be read; it is ended")
                self._process.kill()
            self._process.join()
            self.send_no_more()
            heard(None)

    def _speak(self) -> None:
        while (message := self._outbox.get()) is not None:
            try:
                self._ours.send(message)
            except (BrokenPipeError, OSError):
                return  # it died, which the other thread tells
