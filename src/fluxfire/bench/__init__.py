"""Benchmarks: reliable timings, image quality compared with controls, and result files."""

from __future__ import annotations

from fluxfire.bench.bisection import BisectResult, bisect
from fluxfire.bench.budget import Budget
from fluxfire.bench.calibration.calibrating import Calibrated, Calibration, calibrate
from fluxfire.bench.contenders import Baseline, Contender, controls, ladder
from fluxfire.bench.examples import Example, held_out, read_examples
from fluxfire.bench.intervals import Interval, bootstrap
from fluxfire.bench.measuring import measure
from fluxfire.bench.prices import Prices
from fluxfire.bench.quality import Quality, Similarity, compare
from fluxfire.bench.results import load_result, row_saver, save_result, stamp
from fluxfire.bench.rows import Row
from fluxfire.bench.timing import Sample, repeat
from fluxfire.bench.trials import Family, Trial
from fluxfire.bench.tuning import Tuned, fewer_steps, tune
from fluxfire.bench.workload import Workload

__all__ = [
    "Baseline",
    "BisectResult",
    "Budget",
    "Calibrated",
    "Calibration",
    "Contender",
    "Example",
    "Family",
    "Interval",
    "Prices",
    "Quality",
    "Row",
    "Sample",
    "Similarity",
    "Trial",
    "Tuned",
    "Workload",
    "bisect",
    "bootstrap",
    "calibrate",
    "compare",
    "controls",
    "fewer_steps",
    "held_out",
    "ladder",
    "load_result",
    "measure",
    "read_examples",
    "repeat",
    "row_saver",
    "save_result",
    "stamp",
    "tune",
]
