"""fluxfire: faster FLUX.1 Kontext pipelines, one reversible pass at a time.

Importing this package loads neither torch nor diffusers; the first use of a name does.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from fluxfire._version import __version__ as __version__

if TYPE_CHECKING:
    from fluxfire import bench, errors, extend, passes, presets, spark, testing
    from fluxfire.api import load, optimize, optimized, plan, report, restore, using, warmup
    from fluxfire.bench import Budget, Calibrated, Tuned, bisect, calibrate, tune
    from fluxfire.loading import quantize
    from fluxfire.planning.plan import Plan
    from fluxfire.planning.resolve import order
    from fluxfire.protocol import Change, Finding, Pass, Target
    from fluxfire.reporting.report import Report

__all__ = [
    "Budget",
    "Calibrated",
    "Change",
    "Finding",
    "Pass",
    "Plan",
    "Report",
    "Target",
    "Tuned",
    "bench",
    "bisect",
    "calibrate",
    "errors",
    "extend",
    "load",
    "optimize",
    "optimized",
    "order",
    "passes",
    "plan",
    "presets",
    "quantize",
    "report",
    "restore",
    "spark",
    "testing",
    "tune",
    "using",
    "warmup",
]

_HOME = {
    **dict.fromkeys(
        ("load", "optimize", "optimized", "plan", "report", "restore", "using", "warmup"), "api"
    ),
    **dict.fromkeys(("Budget", "Calibrated", "Tuned", "bisect", "calibrate", "tune"), "bench"),
    **dict.fromkeys(("Change", "Finding", "Pass", "Target"), "protocol"),
    "Plan": "planning.plan",
    "Report": "reporting.report",
    "order": "planning.resolve",
    "quantize": "loading",
    # For the authors of passes, whom `fluxfire.extend` gives everything in one place.
    **dict.fromkeys(("Call", "Generation", "Listener", "Transaction"), "extend"),
}
_SUBMODULES = ("bench", "errors", "extend", "passes", "presets", "spark", "testing")


if not TYPE_CHECKING:  # else a misspelt name would be Any

    def __getattr__(name: str) -> Any:
        if name in _SUBMODULES:
            return importlib.import_module(f"{__name__}.{name}")
        if name in _HOME:
            value = getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
            globals()[name] = value
            return value
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
