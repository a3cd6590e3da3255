"""Reads the GPU's energy and utilisation through NVML while work runs."""

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

_INTERVAL = 0.05  # seconds; NVML updates the utilisation 6 to 60 times a second


@dataclass
class EnergyUse:
    """The GPU's energy use in a `with` block.

    Attributes:
        seconds: duration of the block.
        joules: energy, from the GPU's own counter.
        utilisation: mean share of the time in which a kernel ran, as NVML samples it. It does not
            show how well the kernels use the chip.
    """

    seconds: float = 0.0
    joules: float = 0.0
    utilisation: float | None = None


def why_unavailable() -> str | None:
    """Return why the energy cannot be read on this machine, or None."""
    if not torch.cuda.is_available():
        return "there is no CUDA device"
    if find_spec("pynvml") is None:
        return f"nvidia-ml-py is not installed; {extra_hint('bench')}"
    return None


@contextmanager
def measure_energy() -> Iterator[EnergyUse | None]:
    """Measure the energy of torch's current GPU in a `with` block; yield None if NVML cannot."""
    if why_unavailable():
        yield None
        return
    import pynvml

    used = EnergyUse()
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
        yield used
        torch.cuda.synchronize()
    finally:
        used.seconds = time.perf_counter() - began
        ended.set()
        watcher.join()
        after = pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)
        used.joules = (after - before) / 1e3
        used.utilisation = mean(shares) if shares else None
        pynvml.nvmlShutdown()


def _handle(pynvml: Any) -> Any:
    """Return NVML's handle of torch's GPU, whatever CUDA_VISIBLE_DEVICES says."""
    uuid = torch.cuda.get_device_properties(torch.cuda.current_device()).uuid
    return pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")
