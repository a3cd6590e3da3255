"""Spark 2, in the making: a small trained Kontext that will replace `fluxfire.spark`.

It is a small FLUX.1 Kontext, built from diffusers' classes and trained to edit pictures of things
on drawn grounds by instruction. Its edits have many right answers, as real ones have, so it should
punish what the real model punishes. `benchmarks/spark2_training` trains it; its weights are not
there yet. `things.png` holds pictures of Noto Color Emoji (Google, Apache-2.0 and OFL-1.1).

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
