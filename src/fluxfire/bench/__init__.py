"""Measuring: timings that can be trusted, quality beside controls, and results to commit."""

from __future__ import annotations

from fluxfire.bench.bisection import Culprit, bisect
from fluxfire.bench.budget import Budget
from fluxfire.bench.contenders import Baseline, Contender, controls, ladder
from fluxfire.bench.examples import Example, held_out, read_examples
from fluxfire.bench.intervals import Interval, bootstrap
from fluxfire.bench.measuring import measure
from fluxfire.bench.prices import Prices
from fluxfire.bench.quality import Likeness, Quality, compare
from fluxfire.bench.results import keeping, load_result, save_result, stamp
from fluxfire.bench.rows import Row
from fluxfire.bench.timing import Sample, repeat
from fluxfire.bench.trials import Family, Trial
from fluxfire.bench.tuning import Tuned, fewer_steps, tune
from fluxfire.bench.workload import Workload

__all__ = [
    "Baseline",
    "Budget",
    "Contender",
    "Culprit",
    "Example",
    "Family",
    "Interval",
    "Likeness",
    "Prices",
    "Quality",
    "Row",
    "Sample",
    "Trial",
    "Tuned",
    "Workload",
    "bisect",
    "bootstrap",
    "compare",
    "controls",
    "fewer_steps",
    "held_out",
    "keeping",
    "ladder",
    "load_result",
    "measure",
    "read_examples",
    "repeat",
    "save_result",
    "stamp",
    "tune",
]
