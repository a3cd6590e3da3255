"""Repeated measurements, told as a median with its spread."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from statistics import median
from typing import Any, TypeVar

import torch

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
        """The figure to quote."""
        return median(self.seconds)

    def to_dict(self) -> dict[str, Any]:
        """Median, smallest, largest, and every measurement."""
        return {
            "median": self.median,
            "min": min(self.seconds),
            "max": max(self.seconds),
            "seconds": list(self.seconds),
        }

    @classmethod
    def of(cls, seconds: Iterable[float]) -> Sample:
        """Collect measurements."""
        return cls(tuple(seconds))


def repeat(run: Callable[[], object], *, warmups: int = 1, repeats: int = 5) -> Sample:
    """Time a function by the wall clock, waiting for the device before each reading.

    Args:
        run: what to time.
        warmups: calls before the first that counts.
        repeats: calls that count.
    """
    for _ in range(warmups):
        run()
    return Sample.of(timed(run)[1] for _ in range(repeats))


def timed(run: Callable[[], T]) -> tuple[T, float]:
    """Run a function once; return its result, and the seconds until the device was done."""
    settle()
    began = time.perf_counter()
    result = run()
    settle()
    return result, time.perf_counter() - began


def on_device(pipe: Any) -> AbstractContextManager[object]:
    """Make a pipeline's own GPU torch's current one: its clock, memory and energy are read."""
    device = pipe._execution_device  # noqa: SLF001 - the one truth under offloading
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def settle() -> None:
    """Wait until the device has done all its work."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
