"""Keeps one worker process running: starts it, replaces it when it dies, and gives up in the end.

All code here runs on the server's event loop.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping

from fluxfire.serve.process import WorkerProcess
from fluxfire.serve.settings import Settings
from fluxfire.serve.wire import Alive, CannotStart, Facts, FromWorker, Ready, ToWorker

_log = logging.getLogger(__name__)
_MOST_FAILED_STARTS = 3
_LONGEST_PAUSE = 30.0


class Supervisor:
    """One worker process at a time.

    Attributes:
        facts: the worker's description of its pipeline; None until the first worker is ready.
        ready: whether the worker has loaded the pipeline.
        trouble: why no worker can run; None while one can.
        gpu_bytes: the worker's last count of the GPU's memory, by kind; empty without a GPU.
    """

    def __init__(
        self,
        settings: Settings,
        *,
        on_message: Callable[[FromWorker], None],
        on_death: Callable[[], None],
        on_trouble: Callable[[str], None],
    ) -> None:
        """Create a supervisor. It does nothing before `start`.

        Args:
            settings: the service's.
            on_message: callback with each message of the current worker, heartbeats too.
            on_death: callback after each death of a worker, before the next one starts.
            on_trouble: callback with the reason, if no worker can run.
        """
        self.facts: Facts | None = None
        self.ready = False
        self.trouble: str | None = None
        self.gpu_bytes: Mapping[str, int] = {}
        self._settings = settings
        self._on_message, self._on_death, self._on_trouble = on_message, on_death, on_trouble
        self._worker: WorkerProcess | None = None
        self._failed_starts = 0
        self._restart: asyncio.TimerHandle | None = None
        self._ending: list[WorkerProcess] = []

    @property
    def has_worker(self) -> bool:
        """Whether there is a worker process, ready or not."""
        return self._worker is not None

    def start(self) -> None:
        """Start a worker process, which then loads the pipeline."""
        self._restart = None
        loop = asyncio.get_running_loop()

        def on_message(message: FromWorker | None) -> None:
            loop.call_soon_threadsafe(self._hear, worker, message)

        try:
            worker = self._worker = WorkerProcess(self._settings)
            worker.start(on_message)
        except (OSError, RuntimeError, MemoryError):  # the next attempt may find enough memory
            _log.exception("the worker cannot be started")
            self._replace()

    def send(self, message: ToWorker) -> None:
        """Send a message to the worker, if there is one."""
        if self._worker is not None:
            self._worker.send(message)

    def kill(self) -> None:
        """Kill the worker; another one then starts."""
        if self._worker is not None:
            self._worker.kill()

    def close(self) -> None:
        """Stop the worker, and start no other."""
        if self._restart is not None:
            self._restart.cancel()
        worker, self._worker = self._worker, None
        if worker is not None:
            self._ending = [worker]
            worker.stop()
            if not self.ready:  # it loads the model, and would not listen until that is done
                worker.kill()

    async def until_ended(self) -> None:
        """Wait until each worker's process has ended, after `close`: at most some seconds."""
        await asyncio.gather(*(asyncio.to_thread(worker.join) for worker in self._ending))

    def kill_ending(self) -> None:
        """Kill what has not ended yet, after `close`."""
        for worker in self._ending:
            worker.kill()

    def _hear(self, worker: WorkerProcess, message: FromWorker | None) -> None:
        """Handle a message from a worker; None means that the worker died."""
        if worker is not self._worker:
            return  # a late message from an earlier worker
        if message is None:
            self._replace()
            return
        if isinstance(message, Alive):
            self.gpu_bytes = message.gpu_bytes
        elif isinstance(message, Ready):
            self.facts, self.ready = message.facts, True
        elif isinstance(message, CannotStart):
            self._give_up(message.message)
        self._on_message(message)

    def _replace(self) -> None:
        """Note that the worker died, and start another, unless too many have died at their start.

        A pause grows with each failed start: what is missing may come back.
        """
        when = "" if self.ready else " before it was ready"
        how = self._worker.ending if self._worker is not None else "it did not start"
        _log.error("the worker died%s: %s", when, how)
        self._failed_starts = 0 if self.ready else self._failed_starts + 1
        self.ready, self._worker = False, None
        self._on_death()
        if self._failed_starts >= _MOST_FAILED_STARTS:
            self._give_up(f"its worker died {self._failed_starts} times before it was ready")
            return
        pause = 0.0 if self._failed_starts == 0 else min(2.0**self._failed_starts, _LONGEST_PAUSE)
        self._restart = asyncio.get_running_loop().call_later(pause, self.start)

    def _give_up(self, why: str) -> None:
        _log.error("no pipeline: %s", why)
        self.trouble = why
        self.close()
        self._on_trouble(why)
