"""Measures time on the device's own clock without waiting for the device."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch


class DeviceClock:
    """Marks points in time, and reads them later.

    On CUDA a mark is an event in the current stream. Recording a mark does not wait. Reading it
    waits until the device has reached it. Other devices use the wall clock.
    """

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._origin: Any = None

    def mark(self) -> Callable[[], float]:
        """Mark this point in time.

        Returns:
            A function that returns the seconds since a fixed origin; on CUDA, since the first mark.
        """
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
