"""What caches would decide, found on Spark: for timing them on random weights."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from fluxfire import api, spark
from fluxfire.bench.contenders import Contender
from fluxfire.passes import FirstBlockCache, ReferenceCache
from fluxfire.protocol import Pass
from fluxfire.reporting.statistics import RunStatistics

_EXAMPLES = 16


def most_often(shares: Sequence[float]) -> list[int]:
    """Return as many steps as do something on average, those that do it most often.

    Args:
        shares: of each step, the share of examples for which it does.
    """
    by_share = sorted(range(len(shares)), key=lambda step: -shares[step])
    return sorted(by_share[: round(sum(shares))])


def on_spark(passes: Sequence[Pass], steps: int, *, edits: bool = True) -> tuple[Pass, ...]:
    """Return passes whose caches have the schedules that Spark's own edits give them.

    Random weights change everything from step to step or nothing: what a cache decides on
    them means nothing. On Spark's trained weights it does. Caches of one list are tried
    together, since one's decisions change what the other sees.

    Args:
        passes: a list; its caches are tried on Spark, without the other passes.
        steps: denoising steps.
        edits: whether a reference is edited.
    """
    caches = tuple(filter(_decides, passes))
    if not caches:
        return tuple(passes)
    run = _tried(caches, steps, edits)
    hits = {d.step: d.hits for d in run.decisions}
    refreshes = {r.step: r.due for r in run.refreshes}
    made: list[Pass] = []
    for pass_ in passes:
        if pass_ in caches and isinstance(pass_, FirstBlockCache):
            shares = [sum(hits[step]) / len(hits[step]) for step in range(steps)]
            made.append(replace(pass_, schedule=most_often(shares)))
        elif pass_ in caches and isinstance(pass_, ReferenceCache) and refreshes:
            done = [_done(refreshes[step], hits.get(step)) for step in range(steps)]
            made.append(replace(pass_, schedule=[0, *most_often(done)]))
        else:
            made.append(pass_)
    return tuple(made)


def scheduled(contender: Contender, steps: int, *, edits: bool = True) -> Contender:
    """Return a contender whose caches follow Spark's schedules."""
    return replace(contender, passes=on_spark(contender.passes, steps, edits=edits))


def _decides(pass_: Pass) -> bool:
    caches = isinstance(pass_, FirstBlockCache | ReferenceCache)
    return caches and pass_.schedule is None and pass_.exactness == "lossy"  # type: ignore[attr-defined]


def _done(due: Sequence[bool], hits: Sequence[bool] | None) -> float:
    """Return the share of samples whose reference was computed: a hit puts it off."""
    put_off = hits or [False] * len(due)
    return sum(d and not h for d, h in zip(due, put_off, strict=True)) / len(due)


@functools.cache
def _tried(caches: tuple[Pass, ...], steps: int, edits: bool) -> RunStatistics:
    tasks: Sequence[Any] = (
        spark.examples(split="test", n=_EXAMPLES) if edits else spark.drawings(n=_EXAMPLES)
    )
    pipe = spark.load(dtype=torch.float32)
    with api.optimized(pipe, caches):
        spark.score(pipe, tasks, steps=steps, batch=_EXAMPLES)
        return api.report(pipe).runs[-1]
