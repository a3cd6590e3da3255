"""Spark: a small trained Kontext that ships with fluxfire.

Spark is a small FLUX.1 Kontext, built from diffusers' classes and trained to edit scenes of flat
shapes by instruction. The weights of the real FLUX.1 Kontext are gated and large; Spark's are not.
Spark shows whether an edit works. It is no benchmark for the real model: one plain step nearly
solves it. The model card in the documentation says more.

Importing this package does not load torch; the first use of a name does.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from spark2.language import unknown
    from spark2.pipeline import SparkPipeline, load
    from spark2.scoring import score
    from spark2.tasks import Drawing, SparkExample, drawings, examples

__all__ = [
    "Drawing",
    "SparkExample",
    "SparkPipeline",
    "drawings",
    "examples",
    "load",
    "score",
    "unknown",
]

_HOME = {
    **dict.fromkeys(("Drawing", "SparkExample", "drawings", "examples"), "tasks"),
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
