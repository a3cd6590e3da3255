"""The worker: a process of its own that holds the pipeline, and edits what it is sent."""

from __future__ import annotations

import os
import queue
import signal
import threading
import time
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING

from fluxfire.errors import FluxfireError
from fluxfire.serve.settings import Settings
from fluxfire.serve.wire import (
    Batch,
    Cancel,
    CannotStart,
    Done,
    Failed,
    FromWorker,
    Ready,
    StepDone,
    Stop,
    ToWorker,
)

if TYPE_CHECKING:
    from fluxfire.serve.editing import Editor


def main(connection: Connection, settings: Settings) -> None:
    """Load, say so, and edit until told to stop; ends at once with the process that began it.

    Heavy libraries are imported in here, so that the server, which names this function, is
    without them.

    Args:
        connection: to the server.
        settings: the service's.
    """
    # The server decides when this ends: a signal to the whole group is for it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    inbox = _Inbox(connection)
    try:
        editor = _open(settings)
    except FluxfireError as error:
        _tell(connection, CannotStart(str(error)))
        return
    _tell(connection, Ready(editor.facts))
    while (batch := inbox.batches.get()) is not None:
        _tell(connection, _answer(editor, batch, inbox, connection))


def _tell(connection: Connection, message: FromWorker) -> None:
    try:
        connection.send(message)
    except OSError:
        os._exit(1)  # the server is gone


def _open(settings: Settings) -> Editor:
    """Load and optimize the pipeline, and run it once at each size.

    Raises:
        FluxfireError: it cannot be loaded or optimized, or the GPU has too little memory.
    """
    import torch

    from fluxfire import api, loading
    from fluxfire.planning.resolve import chosen
    from fluxfire.serve import levels
    from fluxfire.serve.editing import Editor

    try:
        pipe = loading.load(settings.model)
        pipe.set_progress_bar_config(disable=True)
        if settings.preset is None and settings.passes is None:
            passes = levels.usual(pipe.device.type)
        else:
            passes = tuple(chosen(settings.preset, settings.passes))
        api.optimize(pipe, passes)
        editor = Editor(pipe, passes, settings.model)
        editor.warm_up(settings.warm_up, {1, min(2, settings.at_once), settings.at_once})
    except torch.OutOfMemoryError as error:
        raise FluxfireError(
            f"{str(error).splitlines()[0]} Serve a smaller model, make fewer pictures at once, or "
            f"warm up smaller sizes"
        ) from error
    return editor


def _answer(editor: Editor, batch: Batch, inbox: _Inbox, connection: Connection) -> FromWorker:
    """Edit a batch, unless nobody waits for it any more."""
    import torch

    def go_on() -> None:
        if inbox.stopping or inbox.cancelled >= batch.asks.keys():
            raise _NobodyWaitsError

    def on_step(step: int, steps: int) -> None:
        go_on()
        _tell(connection, StepDone(step, steps))

    began = time.perf_counter()
    try:
        go_on()
        results = editor.edit(batch.asks, batch.at_once, on_step)
    except _NobodyWaitsError:
        results = {}
    except torch.OutOfMemoryError as error:
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return Failed("out-of-memory", str(error).splitlines()[0])
    except torch.AcceleratorError:
        raise  # such as an illegal address: the device is of no use to this process any more
    except (FluxfireError, ValueError) as error:
        return Failed("edit-refused", str(error))
    except Exception as error:  # noqa: BLE001 - whatever it is, it is this batch's
        return Failed("edit-failed", f"{type(error).__name__}: {error}")
    finally:
        inbox.cancelled -= batch.asks.keys()
    return Done(results, time.perf_counter() - began)


class _NobodyWaitsError(Exception):
    """All requests of a batch were cancelled."""


class _Inbox:
    """Takes messages in while the pipeline runs.

    Attributes:
        batches: what is to be edited; None ends.
        cancelled: tickets that nobody waits for.
        stopping: whether it was told to end.
    """

    def __init__(self, connection: Connection) -> None:
        self.batches: queue.SimpleQueue[Batch | None] = queue.SimpleQueue()
        self.cancelled: set[int] = set()
        self.stopping = False
        self._connection = connection
        threading.Thread(target=self._listen, name="inbox", daemon=True).start()

    def _listen(self) -> None:
        while True:
            try:
                message: ToWorker = self._connection.recv()
            except (EOFError, OSError):
                os._exit(1)  # the server is gone, and a pipeline half-way has no other end
            if isinstance(message, Cancel):
                self.cancelled.add(message.ticket)
            elif isinstance(message, Stop):
                self.stopping = True
                self.batches.put(None)
                return
            else:
                self.batches.put(message)
