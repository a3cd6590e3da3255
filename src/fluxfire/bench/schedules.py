"""Schedules for caches, taken from Spark, to time caches on random weights."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import replace

import torch

from fluxfire import api, spark
from fluxfire.bench.contenders import Contender
from fluxfire.passes import FirstBlockCache, ReferenceCache
from fluxfire.protocol import Pass
from fluxfire.reporting.statistics import RunStatistics

_EXAMPLES = 16


def most_frequent_steps(shares: Sequence[float]) -> list[int]:
    """Return the steps that are hits most frequently, as many as are hits on average.

    Args:
        shares: for each step, the share of examples where the step is a hit.
    """
    by_share = sorted(range(len(shares)), key=lambda step: -shares[step])
    return sorted(by_share[: round(sum(shares))])


def schedule_passes(passes: Sequence[Pass], steps: int, *, edits: bool = True) -> tuple[Pass, ...]:
    """Return passes whose caches follow the schedules that they choose on Spark's edits.

    With random weights a step changes everything or nothing, so a cache's decisions mean nothing.
    With Spark's trained weights they do. All caches of a list run together on Spark, since one
    cache's decisions change the input of another. A cache that has a schedule for so many steps
    keeps its steps, but not their limits, which are decisions too.

    Args:
        passes: a list. Only its caches run on Spark, without the other passes.
        steps: number of denoising steps.
        edits: True for edits of a reference, False for text to image.
    """
    passes = [_without_limits(p, steps) if isinstance(p, FirstBlockCache) else p for p in passes]
    caches = tuple(filter(_needs_schedule, passes))
    if not caches:
        return tuple(passes)
    run = _run_on_spark(caches, steps, edits)
    hits = {d.step: d.hits for d in run.decisions}
    refreshes = {r.step: r.due for r in run.refreshes}
    made: list[Pass] = []
    for pass_ in passes:
        if pass_ in caches and isinstance(pass_, FirstBlockCache):
            shares = [sum(hits[step]) / len(hits[step]) for step in range(steps)]
            made.append(replace(pass_, schedule=most_frequent_steps(shares)))
        elif pass_ in caches and isinstance(pass_, ReferenceCache) and refreshes:
            refresh_shares = [
                _refresh_share(refreshes[step], hits.get(step)) for step in range(steps)
            ]
            made.append(replace(pass_, schedule=[0, *most_frequent_steps(refresh_shares)]))
        else:
            made.append(pass_)
    return tuple(made)


def schedule_contender(contender: Contender, steps: int, *, edits: bool = True) -> Contender:
    """Return the contender with Spark's schedules in its caches."""
    return replace(contender, passes=schedule_passes(contender.passes, steps, edits=edits))


def _without_limits(cache: FirstBlockCache, steps: int) -> FirstBlockCache:
    """Return a cache that skips all steps of its schedule, or has none for so many steps."""
    limits = cache.limits(steps)
    return replace(cache, schedule=None if limits is None else list(limits))


def _needs_schedule(pass_: Pass) -> bool:
    caches = isinstance(pass_, FirstBlockCache | ReferenceCache)
    return caches and pass_.schedule is None and pass_.exactness == "lossy"  # type: ignore[attr-defined]


def _refresh_share(due: Sequence[bool], hits: Sequence[bool] | None) -> float:
    """Return the share of samples that computed the reference; a hit postpones that."""
    postponed = hits or [False] * len(due)
    return sum(d and not h for d, h in zip(due, postponed, strict=True)) / len(due)


@functools.cache
def _run_on_spark(caches: tuple[Pass, ...], steps: int, edits: bool) -> RunStatistics:
    tasks: Sequence[spark.Drawing] = (
        spark.examples(split="test", n=_EXAMPLES) if edits else spark.drawings(n=_EXAMPLES)
    )
    pipe = spark.load(dtype=torch.float32)
    with api.optimized(pipe, caches):
        spark.score(pipe, tasks, steps=steps, batch=_EXAMPLES)
        return api.report(pipe).runs[-1]
