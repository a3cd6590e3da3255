"""Points in time on the device's own clock, noted without waiting for it."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch


class Marks:
    """Notes points in time; each can be read later, in seconds after the first.

    On CUDA a mark is an event in the current stream: noting it costs nothing, and the first
    reading waits until the device has come past it. Elsewhere it is the wall clock.
    """

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._origin: Any = None

    def now(self) -> Callable[[], float]:
        """Note this point; what is returned reads it."""
        if not self._cuda:
            now = time.perf_counter()
            return lambda: now
        event: Any = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        origin = self._origin = self._origin or event

        def read() -> float:
            event.synchronize()
            return float(origin.elapsed_time(event)) / 1e3

        return read
