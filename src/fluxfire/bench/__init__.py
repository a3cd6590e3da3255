"""Measuring: timing that can be trusted, and results that can be committed."""

from __future__ import annotations

from fluxfire.bench.bisect import Culprit, Trial, bisect
from fluxfire.bench.edits import Workload, measure_edits
from fluxfire.bench.results import load, save, stamp
from fluxfire.bench.timing import Sample, repeat

__all__ = [
    "Culprit",
    "Sample",
    "Trial",
    "Workload",
    "bisect",
    "load",
    "measure_edits",
    "repeat",
    "save",
    "stamp",
]
