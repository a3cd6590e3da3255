"""Which steps a cache would leave out, found on Spark: for timing it on random weights."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from fluxfire import api, spark
from fluxfire.bench.contenders import Contender
from fluxfire.passes import FirstBlockCache

_EXAMPLES = 16


def most_hit(shares: Sequence[float]) -> list[int]:
    """Return as many steps as hit on average, those that hit most often.

    Args:
        shares: of each step, the share of examples for which it was a hit.
    """
    by_share = sorted(range(len(shares)), key=lambda step: -shares[step])
    return sorted(by_share[: round(sum(shares))])


@functools.cache
def on_spark(cache: FirstBlockCache, steps: int, *, edits: bool = True) -> FirstBlockCache:
    """Return a cache with the schedule that Spark's own edits have, or pictures from words.

    Random weights change everything from step to step or nothing: what a cache decides on
    them means nothing. On Spark's trained weights it does.

    Args:
        cache: whose threshold and other settings are tried on Spark.
        steps: denoising steps.
        edits: whether a reference is edited.
    """
    if cache.schedule is not None or cache.exactness != "lossy":
        return cache
    tasks: Sequence[Any] = (
        spark.examples(split="test", n=_EXAMPLES) if edits else spark.drawings(n=_EXAMPLES)
    )
    pipe = spark.load(dtype=torch.float32)
    with api.optimized(pipe, [cache]):
        spark.score(pipe, tasks, steps=steps, batch=_EXAMPLES)
        decisions = api.report(pipe).runs[-1].decisions
    return replace(cache, schedule=most_hit([sum(d.hits) / len(d.hits) for d in decisions]))


def scheduled(contender: Contender, steps: int, *, edits: bool = True) -> Contender:
    """Return a contender whose caches follow Spark's schedule."""
    passes = tuple(
        on_spark(p, steps, edits=edits) if isinstance(p, FirstBlockCache) else p
        for p in contender.passes
    )
    return replace(contender, passes=passes)
