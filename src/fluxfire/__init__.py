"""fluxfire: faster FLUX.1 Kontext pipelines, one reversible pass at a time.

Importing this package loads neither torch nor diffusers; the first use of a name does.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from fluxfire._version import __version__ as __version__

if TYPE_CHECKING:
    from fluxfire import bench, errors, passes, presets, spark, testing
    from fluxfire.api import optimize, optimized, plan, report, restore, using, warmup
    from fluxfire.bench import Budget, Tuned, tune
    from fluxfire.model import Call
    from fluxfire.planning.plan import Plan
    from fluxfire.planning.resolve import order
    from fluxfire.protocol import Change, Finding, Pass, Target
    from fluxfire.reporting.report import Report
    from fluxfire.runtime.generation import Generation, Listener
    from fluxfire.runtime.transaction import Transaction

__all__ = [
    "Budget",
    "Call",
    "Change",
    "Finding",
    "Generation",
    "Listener",
    "Pass",
    "Plan",
    "Report",
    "Target",
    "Transaction",
    "Tuned",
    "bench",
    "errors",
    "optimize",
    "optimized",
    "order",
    "passes",
    "plan",
    "presets",
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
        ("optimize", "optimized", "plan", "report", "restore", "using", "warmup"), "api"
    ),
    **dict.fromkeys(("Change", "Finding", "Pass", "Target"), "protocol"),
    **dict.fromkeys(("Budget", "Tuned", "tune"), "bench"),
    **dict.fromkeys(("Generation", "Listener"), "runtime.generation"),
    "Call": "model",
    "Plan": "planning.plan",
    "Report": "reporting.report",
    "order": "planning.resolve",
    "Transaction": "runtime.transaction",
}
_SUBMODULES = ("bench", "errors", "passes", "presets", "spark", "testing")


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
