"""What NVML tells is turned into joules and shares; where it cannot be read, nothing breaks."""

from __future__ import annotations

import sys
import threading
from types import SimpleNamespace

import pytest
import torch

from fluxfire.bench import power


class NVMLError(Exception):
    pass


class Nvml:
    """A GPU that draws 100 W and is busy for 60% of the time."""

    NVMLError = NVMLError

    def __init__(self, *, counter=True):
        self.open, self.asked, self.counter = 0, [], counter
        self.now, self.sampled = 0.0, threading.Event()

    def nvmlInit(self):  # noqa: N802 - NVML's names
        self.open += 1

    def nvmlShutdown(self):  # noqa: N802
        self.open -= 1

    def nvmlDeviceGetHandleByUUID(self, uuid):  # noqa: N802
        self.asked.append(uuid)
        return uuid

    def nvmlDeviceGetTotalEnergyConsumption(self, _):  # noqa: N802
        if not self.counter:
            raise NVMLError
        return self.now * 100 * 1e3

    def nvmlDeviceGetUtilizationRates(self, _):  # noqa: N802
        self.sampled.set()
        return SimpleNamespace(gpu=60)


@pytest.fixture
def nvml(monkeypatch):
    fake = Nvml()
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    monkeypatch.setattr(power, "why_unavailable", lambda: None)
    monkeypatch.setattr(power, "time", SimpleNamespace(perf_counter=lambda: fake.now))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda i: SimpleNamespace(uuid=f"card-{i}")
    )
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    return fake


def test_energy_and_utilisation(nvml):
    with power.measure_energy() as drawn:
        nvml.now += 0.2
        assert nvml.sampled.wait(600)
    assert drawn.seconds == pytest.approx(0.2)
    assert drawn.joules == pytest.approx(20)
    assert drawn.utilisation == pytest.approx(0.6)
    assert nvml.asked == ["GPU-card-1"]  # torch's card, not NVML's first
    assert nvml.open == 0


def test_an_exception_ends_the_measuring(nvml):
    with pytest.raises(RuntimeError, match="mine"), power.measure_energy():
        raise RuntimeError("mine")
    assert nvml.open == 0


def test_a_chip_without_a_counter_tells_nothing(nvml):
    nvml.counter = False
    with power.measure_energy() as drawn:
        pass
    assert drawn is None
    assert nvml.open == 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu_it_says_so():
    assert power.why_unavailable() == "there is no CUDA device"
    with power.measure_energy() as drawn:
        pass
    assert drawn is None
