"""Spark: a small trained Kontext that ships with fluxfire.

A FLUX.1 Kontext in small, every part diffusers' own, trained to edit scenes of flat shapes by
instruction. Real weights of FLUX.1 Kontext are gated and large; Spark is neither. It shows whether
an edit works. It is no yardstick for the real model: one plain step nearly solves it. The model
card in the documentation says more.

Importing this package loads nothing heavy; the first use of a name does.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fluxfire.spark.language import unknown
    from fluxfire.spark.pipeline import SparkPipeline, load
    from fluxfire.spark.scoring import score
    from fluxfire.spark.tasks import Drawing, Example, drawings, examples

__all__ = [
    "Drawing",
    "Example",
    "SparkPipeline",
    "drawings",
    "examples",
    "load",
    "score",
    "unknown",
]

_HOME = {
    **dict.fromkeys(("Drawing", "Example", "drawings", "examples"), "tasks"),
    **dict.fromkeys(("SparkPipeline", "load"), "pipeline"),
    "score": "scoring",
    "unknown": "language",
}


if not TYPE_CHECKING:  # else a misspelt name would be Any

    def __getattr__(name: str) -> Any:
        if name in _HOME:
            value = getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
            globals()[name] = value
            return value
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
