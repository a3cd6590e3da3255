"""Named lists of passes: plain tuples, to slice and extend."""

from __future__ import annotations

from fluxfire.errors import PlanError
from fluxfire.passes import (
    Compile,
    FirstBlockCache,
    FusedBlocks,
    InductorPatch,
    MegaCache,
    MemoryLayout,
    QKVFusion,
)
from fluxfire.protocol import Pass
from fluxfire.text import meant_hint

__all__ = ["article", "balanced", "faithful", "fast", "named"]

faithful: tuple[Pass, ...] = (InductorPatch(), FusedBlocks(), Compile())
"""Nothing lossy: rounding only. What `optimize(pipe)` does."""


def _cached(*caches: Pass) -> tuple[Pass, ...]:
    """Return `faithful` with caches."""
    return (*faithful[:-1], *caches, faithful[-1])


balanced: tuple[Pass, ...] = _cached(FirstBlockCache(0.27, predict="quadratic"))
"""Lossy. Set by `tune` on Spark, at the prices of FLUX's steps on an H100: of 256 edits held out,
the worst kept 29 dB to the plain picture, and no more than one in a hundred was lost
(`benchmarks/results/tuned_balanced.json`). Quality on FLUX.1 Kontext itself was not measured: tune
on your own pictures."""

fast: tuple[Pass, ...] = _cached(FirstBlockCache(0.5, predict="quadratic"))
"""Lossy, more so than `balanced`: Spark's 256 edits kept 40 dB on average, some of them far less,
and no more than one in a hundred was lost (`benchmarks/results/tuned_fast.json`)."""

article: tuple[Pass, ...] = (
    InductorPatch(),
    QKVFusion(),
    MemoryLayout(),
    FirstBlockCache(threshold=0.12),
    MegaCache(),
    Compile(
        vae=True,
        mode="max-autotune-no-cudagraphs",
        dynamic=True,
        options={
            "conv_1x1_as_mm": True,
            "coordinate_descent_tuning": True,
            "coordinate_descent_check_all_directions": True,
            "shape_padding": True,
            "epilogue_fusion": False,
        },
    ),
)
"""The settings of the article that fluxfire began as a re-implementation of ("FLUX.1-Kontext:
When Speed Meets Style"), in the order that fluxfire's stages ask for, and by blocks: the article
compiles the whole transformer, which no cache can decide in. Lossy. Tuning takes minutes, once:
`warmup` saves what was compiled in the user's cache folder."""

NAMES = ("faithful", "balanced", "fast", "article")


def named(name: str) -> tuple[Pass, ...]:
    """Return a preset by name.

    Raises:
        PlanError: there is no such preset.
    """
    if name not in NAMES:
        raise PlanError(
            f"there is no preset {name!r}; there are {', '.join(NAMES)}{meant_hint(name, NAMES)}"
        )
    preset: tuple[Pass, ...] = globals()[name]
    return preset
