"""The worker process, which has the pipeline and edits batches."""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
import os
import queue
import signal
import sys
import threading
import time
import traceback
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING

from fluxfire.errors import FluxfireError
from fluxfire.serve.settings import Settings
from fluxfire.serve.wire import (
    HEARTBEAT,
    Alive,
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
    from fluxfire.serve.pipeline_editor import PipelineEditor

_PR_SET_PDEATHSIG = 1  # from linux/prctl.h


def main(connection: Connection, settings: Settings) -> None:
    """Load the pipeline, report that, and edit batches until `Stop`. Exit when the server dies.

    Heavy libraries are imported inside functions, so that the server, which imports this module,
    does not load them.

    Args:
        connection: the connection to the server.
        settings: the service's settings.
    """
    _die_with_the_server()
    # Ctrl-C reaches the whole process group, but the server decides when its worker stops.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    inbox, outbox = _Inbox(connection), _Outbox(connection)
    try:
        editor = _load_editor(settings)
    except FluxfireError as error:
        outbox.send(CannotStart(str(error)))
        return
    outbox.send(Ready(editor.facts))
    threading.Thread(target=_beat_loop, args=(outbox,), name="heartbeat", daemon=True).start()
    while (batch := inbox.batches.get()) is not None:
        outbox.send(_edit_batch(editor, batch, inbox, outbox))


def _die_with_the_server() -> None:
    """Let Linux kill this process when the server's process ends, whatever this one does.

    The inbox notices a closed connection, but its thread does not run while the process is stopped
    or while a kernel holds Python's lock.
    """
    if sys.platform != "linux":
        return
    with contextlib.suppress(OSError, AttributeError):  # a C library without prctl
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    server = multiprocessing.parent_process()
    if server is not None and server.pid != os.getppid():
        os._exit(1)  # it died before the call


def _beat_loop(outbox: _Outbox) -> None:
    """Tell the server again and again that this process runs."""
    while True:
        time.sleep(HEARTBEAT)
        outbox.send(Alive(_gpu_bytes()))


def _gpu_bytes() -> dict[str, int]:
    """Return the GPU's memory; torch counts it itself, so this waits for no kernel."""
    import torch

    if not torch.cuda.is_available():
        return {}
    return {
        "allocated": torch.cuda.memory_allocated(),
        "reserved": torch.cuda.memory_reserved(),
        "total": torch.cuda.get_device_properties(0).total_memory,
    }


def _load_editor(settings: Settings) -> PipelineEditor:
    """Load and optimize the pipeline, and run it once at each size.

    Raises:
        FluxfireError: the pipeline cannot be loaded or optimized, or the GPU has too little memory.
    """
    import torch

    from fluxfire import api, loading
    from fluxfire.applying import applied_passes
    from fluxfire.passes.contrib.placement import default_device
    from fluxfire.planning.resolve import passes_from_options
    from fluxfire.serve import quality_levels
    from fluxfire.serve.pipeline_editor import PipelineEditor

    try:
        computes_on = default_device().type
        host = settings.memory is not None  # Placement then moves what fits
        pipe = loading.load(
            settings.model,
            device="cpu" if host else None,
            dtype=loading.default_dtype(computes_on),
        )
        pipe.set_progress_bar_config(disable=True)
        if settings.preset is None and settings.passes is None:
            passes = quality_levels.default_passes(computes_on)
        else:
            passes = tuple(passes_from_options(settings.preset, settings.passes))
        api.optimize(pipe, passes, memory=settings.memory)
        applied = tuple(applied_passes(pipe))
        editor = PipelineEditor(pipe, passes, settings.model, applied)
        editor.warm_up(settings.warm_up, {1, min(2, settings.at_once), settings.at_once})
    except torch.OutOfMemoryError as error:
        raise FluxfireError(
            f"{str(error).splitlines()[0]} Serve with --memory auto, make fewer pictures at once, "
            f"or warm up smaller sizes"
        ) from error
    return editor


def _edit_batch(editor: PipelineEditor, batch: Batch, inbox: _Inbox, outbox: _Outbox) -> FromWorker:
    """Edit a batch; stop early when all of its requests are cancelled."""
    import torch

    def raise_if_cancelled() -> None:
        if inbox.stopping or inbox.cancelled >= batch.requests.keys():
            raise _AllCancelledError

    def on_step(step: int, steps: int) -> None:
        raise_if_cancelled()
        outbox.send(StepDone(step, steps))

    began = time.perf_counter()
    try:
        raise_if_cancelled()
        results = editor.edit(batch.requests, batch.at_once, on_step)
    except _AllCancelledError:
        results = {}
    except torch.OutOfMemoryError as error:
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return Failed("out-of-memory", str(error).splitlines()[0])
    except torch.AcceleratorError:
        raise  # such as an illegal address: this process cannot use the device any more
    except (FluxfireError, ValueError) as error:
        return Failed("edit-refused", str(error))
    except Exception as error:  # noqa: BLE001 - any failure concerns this batch only
        # An unknown error's text may name files and hosts: the log gets it, the client does not.
        return Failed("edit-failed", type(error).__name__, traceback.format_exc())
    finally:
        inbox.cancelled -= batch.requests.keys()
    return Done(results, time.perf_counter() - began)


class _AllCancelledError(Exception):
    """All requests of a batch were cancelled."""


class _Outbox:
    """Sends messages from several threads; exits when the server died."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._lock = threading.Lock()

    def send(self, message: FromWorker) -> None:
        """Send a message."""
        try:
            with self._lock:  # a connection mixes what two threads send at once
                self._connection.send(message)
        except OSError:
            os._exit(1)  # the server died


class _Inbox:
    """Receives messages in a thread while the pipeline runs.

    Attributes:
        batches: batches to edit; None stops the worker.
        cancelled: numbers of cancelled tickets.
        stopping: whether the server sent `Stop`.
    """

    def __init__(self, connection: Connection) -> None:
        self.batches: queue.SimpleQueue[Batch | None] = queue.SimpleQueue()
        self.cancelled: set[int] = set()
        self.stopping = False
        self._connection = connection
        threading.Thread(target=self._receive_loop, name="inbox", daemon=True).start()

    def _receive_loop(self) -> None:
        while True:
            try:
                message: ToWorker = self._connection.recv()
            except (EOFError, OSError):
                os._exit(1)  # the server died, and nothing else stops a running pipeline
            if isinstance(message, Cancel):
                self.cancelled.add(message.ticket)
            elif isinstance(message, Stop):
                self.stopping = True
                self.batches.put(None)  # and listen on: the server may die before this process
            else:
                self.batches.put(message)
