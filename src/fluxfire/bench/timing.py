"""Repeated time measurements, with their median and spread."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from statistics import median
from typing import Any, TypeVar

import torch

from fluxfire.diffusers_types import Pipeline

T = TypeVar("T")


@dataclass(frozen=True)
class Sample:
    """Seconds of repeated measurements of one thing.

    Attributes:
        seconds: each measurement, in the order taken; at least one.
    """

    seconds: tuple[float, ...]

    def __post_init__(self) -> None:
        if not self.seconds:
            raise ValueError("a sample needs at least one measurement")

    @property
    def median(self) -> float:
        """The median in seconds."""
        return median(self.seconds)

    def to_dict(self) -> dict[str, Any]:
        """Return the median, minimum, maximum, and all measurements."""
        return {
            "median": self.median,
            "min": min(self.seconds),
            "max": max(self.seconds),
            "seconds": list(self.seconds),
        }

    @classmethod
    def of(cls, seconds: Iterable[float]) -> Sample:
        """Create a sample from measurements."""
        return cls(tuple(seconds))


def repeat(run: Callable[[], object], *, warmups: int = 1, repeats: int = 5) -> Sample:
    """Time a function by the wall clock, waiting for the device before each reading.

    Args:
        run: the function to time.
        warmups: number of warm-up calls.
        repeats: number of timed calls.
    """
    for _ in range(warmups):
        run()
    return Sample.of(time_call(run)[1] for _ in range(repeats))


def time_call(run: Callable[[], T]) -> tuple[T, float]:
    """Call a function; return its result, and the seconds until the device has finished."""
    synchronize()
    began = time.perf_counter()
    result = run()
    synchronize()
    return result, time.perf_counter() - began


def on_device(pipe: Pipeline) -> AbstractContextManager[object]:
    """Make the pipeline's GPU torch's current one, whose time, memory and energy are measured."""
    device = pipe._execution_device  # noqa: SLF001 - the only right device under offloading
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def synchronize() -> None:
    """Wait until the device has finished all work."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
