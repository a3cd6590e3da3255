"""What the GPU itself reports while work runs: energy, power and utilisation, through NVML."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.util import find_spec
from statistics import mean
from typing import Any

import torch

from fluxfire.text import extra_hint

_INTERVAL = 0.05  # NVML refreshes its utilisation some six to sixty times a second


@dataclass
class Drawn:
    """What was drawn while a `with` block ran.

    Attributes:
        seconds: its length.
        joules: from the GPU's own counter.
        utilisation: mean share of the time in which a kernel ran, as NVML samples it. Says
            nothing of how well the kernels use the chip.
    """

    seconds: float = 0.0
    joules: float = 0.0
    utilisation: float | None = None


def unavailable() -> str | None:
    """Say why nothing can be read here, or None."""
    if not torch.cuda.is_available():
        return "there is no CUDA device"
    if find_spec("pynvml") is None:
        return f"nvidia-ml-py is not installed; {extra_hint('bench')}"
    return None


@contextmanager
def metered() -> Iterator[Drawn | None]:
    """Read the meter of torch's current GPU around a `with` block; gives None where it can't."""
    if unavailable():
        yield None
        return
    import pynvml

    drawn = Drawn()
    try:
        pynvml.nvmlInit()
        handle = _handle(pynvml)
        before = pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)
    except pynvml.NVMLError:  # no permission, or a chip without a counter
        with suppress(pynvml.NVMLError):
            pynvml.nvmlShutdown()
        yield None
        return
    shares: list[float] = []
    ended = threading.Event()

    def sample() -> None:
        while not ended.wait(_INTERVAL):
            with suppress(pynvml.NVMLError):
                shares.append(pynvml.nvmlDeviceGetUtilizationRates(handle).gpu / 100)

    watcher = threading.Thread(target=sample, name="fluxfire-nvml", daemon=True)
    watcher.start()
    began = time.perf_counter()
    try:
        yield drawn
        torch.cuda.synchronize()
    finally:
        drawn.seconds = time.perf_counter() - began
        ended.set()
        watcher.join()
        after = pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)
        drawn.joules = (after - before) / 1e3
        drawn.utilisation = mean(shares) if shares else None
        pynvml.nvmlShutdown()


def _handle(pynvml: Any) -> Any:
    """Find the GPU that torch uses, whatever CUDA_VISIBLE_DEVICES renames."""
    uuid = torch.cuda.get_device_properties(torch.cuda.current_device()).uuid
    return pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")
