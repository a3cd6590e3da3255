"""Measuring: timings that can be trusted, quality beside controls, and results to commit."""

from __future__ import annotations

from fluxfire.bench.bisection import Culprit, bisect
from fluxfire.bench.budget import Budget
from fluxfire.bench.contenders import Contender, controls, ladder
from fluxfire.bench.examples import Example, held_out, read_examples
from fluxfire.bench.measuring import Row, measure
from fluxfire.bench.prices import Prices
from fluxfire.bench.quality import Likeness, Quality, compare
from fluxfire.bench.results import keeping, load_result, save_result, stamp
from fluxfire.bench.search import Family, Trial
from fluxfire.bench.timing import Sample, repeat
from fluxfire.bench.tuning import Tuned, tune
from fluxfire.bench.workload import Workload

__all__ = [
    "Budget",
    "Contender",
    "Culprit",
    "Example",
    "Family",
    "Likeness",
    "Prices",
    "Quality",
    "Row",
    "Sample",
    "Trial",
    "Tuned",
    "Workload",
    "bisect",
    "compare",
    "controls",
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
