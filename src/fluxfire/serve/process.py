"""The server's handle on a worker process: start, send, receive, stop."""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import multiprocessing.connection
import pickle
import queue
import signal
import threading
from collections.abc import Callable

from fluxfire.serve import worker
from fluxfire.serve.settings import Settings
from fluxfire.serve.wire import FromWorker, Stop, ToWorker

_log = logging.getLogger(__name__)
_LoopClosed = RuntimeError  # asyncio raises it when its event loop is closed
_UNREADABLE = (pickle.UnpicklingError, AttributeError, ImportError, ValueError, MemoryError)
_PATIENCE = 5.0  # seconds that a worker has to stop before it is killed


class WorkerProcess:
    """One spawned worker process. It shares no memory with the server."""

    def __init__(self, settings: Settings) -> None:
        context = multiprocessing.get_context("spawn")
        self._ours, self._theirs = context.Pipe()
        self._process = context.Process(
            target=worker.main, args=(self._theirs, settings), name="fluxfire worker", daemon=True
        )
        self._outbox: queue.SimpleQueue[ToWorker | None] = queue.SimpleQueue()

    def start(self, on_message: Callable[[FromWorker | None], None]) -> None:
        """Start the process.

        Args:
            on_message: callback with each message, and with None after the process ended. A thread
                calls it.
        """
        self._process.start()
        self._theirs.close()  # else reading would never end when the process does
        reader = threading.Thread(
            target=self._receive_loop, args=(on_message,), name="worker-reader", daemon=True
        )
        writer = threading.Thread(target=self._send_loop, name="worker-writer", daemon=True)
        try:
            writer.start()
            reader.start()
        except (RuntimeError, MemoryError):  # no memory for a thread
            self._process.kill()  # no thread would read its messages
            self.close_outbox()
            raise

    def send(self, message: ToWorker) -> None:
        """Queue a message; a thread sends it, because pictures take time to pickle."""
        self._outbox.put(message)

    def stop(self) -> None:
        """Ask the process to stop, and kill it after five seconds."""
        self.send(Stop())
        self.close_outbox()
        threading.Thread(target=self.join, name="worker-stopper").start()

    def kill(self) -> None:
        """Kill the process; `on_message` then gets None."""
        self._process.kill()

    def close_outbox(self) -> None:
        """Stop the sending thread."""
        self._outbox.put(None)

    def join(self, seconds: float = _PATIENCE) -> None:
        """Wait until the process ended; kill it after some seconds. Several threads may wait."""
        ended = [self._process.sentinel]
        if not multiprocessing.connection.wait(ended, seconds):
            self._process.kill()
            multiprocessing.connection.wait(ended)

    @property
    def ending(self) -> str:
        """How the process ended: its exit status, or the signal that killed it."""
        code = self._process.exitcode
        if code is None:
            return "it cannot be reached"
        if code >= 0:
            return f"it exited with status {code}"
        known = {number.value: number.name for number in signal.Signals}
        killed = f"it was killed by {known.get(-code, f'signal {-code}')}"
        memory = ", as the system does where memory runs out"
        return killed + (memory if code == -signal.SIGKILL else "")

    def _receive_loop(self, on_message: Callable[[FromWorker | None], None]) -> None:
        with contextlib.suppress(_LoopClosed):  # the server has shut down
            try:
                while True:
                    on_message(self._ours.recv())
            except (EOFError, OSError):
                pass
            except _LoopClosed:
                raise
            except _UNREADABLE:
                _log.exception("a message from the worker cannot be read; the worker is killed")
                self._process.kill()
            self._process.join()
            self.close_outbox()
            on_message(None)

    def _send_loop(self) -> None:
        while (message := self._outbox.get()) is not None:
            try:
                self._ours.send(message)
            except (BrokenPipeError, OSError):
                return  # the process died; the receiving thread reports that
