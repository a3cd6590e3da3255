"""Spark: a small trained Kontext that ships with fluxfire.

Spark is a small FLUX.1 Kontext, built from diffusers' classes. It edits pictures of things on drawn
grounds by instruction, and a program checks its edits. The weights of the real FLUX.1 Kontext are
gated and large; Spark's are not. Most of its edits have many right answers, as real edits have, so
it needs its steps: one plain step solves none. The model card in the documentation says where it
behaves as the real model does, and where not.

`things.png` holds pictures of Noto Color Emoji (Google, OFL-1.1 and Apache-2.0).

Importing this package does not load torch; the first use of a name does.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fluxfire.spark.language import unknown
    from fluxfire.spark.pipeline import SparkPipeline, load
    from fluxfire.spark.scoring import score
    from fluxfire.spark.tasks import Drawing, SparkExample, drawings, examples

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
