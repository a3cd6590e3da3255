"""Quality against computed work, ours and other libraries': the same held-out edits of Spark.

python benchmarks/frontier.py -n 24 --out benchmarks/results/frontier.json

Work counts blocks, so it is the same on every machine. Plain with fewer steps is the line to beat.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from fluxfire import presets
from fluxfire.bench import (
    Contender,
    Workload,
    baselines,
    held_out,
    measure,
    row_saver,
    stamp,
    tables,
)
from fluxfire.bench.baselines import CacheDit
from fluxfire.loading import load
from fluxfire.passes import FirstBlockCache, ParaAttention, ReferenceCache

STEPS = 28
PLAIN = (24, 20, 18, 16, 14, 12, 10, 8, 6, 4, 3, 2, 1)
WITHDRAWN = {"balanced": 0.27, "fast": 0.5}
"""Thresholds of version 0.1.0: quadratic, from the first step on, without a limit."""


def contenders() -> Iterator[tuple[str, Contender]]:
    """List who is compared, by family."""
    plain = Contender("eager", (), "control")
    yield "plain", plain
    for steps in PLAIN:
        yield "plain, fewer steps", plain.with_steps(steps)
    for name in WITHDRAWN:
        caches = tuple(p for p in presets.named(name) if p.stage == "caching")
        yield name, Contender(name, caches)
    for threshold in (0.04, 0.06, 0.08):
        yield (
            "FirstBlockCache",
            Contender(f"FirstBlockCache {threshold}", (FirstBlockCache(threshold),)),
        )
    free = {"warmup_steps": 0, "tail_steps": 0, "max_consecutive_hits": None}
    for name, threshold in WITHDRAWN.items():
        cache = FirstBlockCache(threshold, predict="quadratic", **free)  # type: ignore[arg-type]
        yield "0.1.0's presets", Contender(f"{name} of 0.1.0", (cache,))
    for spacing in (0.05, 0.1, 0.2, 0.33):
        yield "ReferenceCache", Contender(f"ReferenceCache {spacing}", (ReferenceCache(spacing),))
    for threshold in (0.04, 0.08, 0.12):
        yield "para-attn", Contender(f"para-attn {threshold}", (ParaAttention(threshold),))
    for taylor in (False, True):
        family = "cache-dit, TaylorSeer" if taylor else "cache-dit"
        for threshold in (0.06, 0.12):
            method = CacheDit(threshold, taylor)
            name = f"{family} {threshold}"
            yield family, Contender(name, role="baseline", baseline=method)
    for contender in baselines.choose(["mag-cache"], steps=STEPS):
        yield "MagCache", contender


def main() -> None:
    """Edit with every contender; rows are saved after each."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("-n", type=int, default=24, help="held-out edits")
    arguments = parser.parse_args()

    pipe = load("spark")
    pipe.set_progress_bar_config(disable=True)
    pipe.to(dtype=torch.float32)
    listed = list(contenders())
    result: dict[str, Any] = {
        "benchmark": "frontier",
        **stamp(),
        "examples": arguments.n,
        "steps": STEPS,
        "families": {contender.name: family for family, contender in listed},
        "notes": [],
        "rows": [],
    }
    measure(
        pipe, [contender for _, contender in listed], [Workload.for_pipeline(pipe, steps=STEPS)],
        held_out(arguments.n), rounds=1, on_rows=row_saver(result, arguments.out),
        on_edit=lambda said: print(said, flush=True) if "edit," not in said else None,
    )  # fmt: skip
    print(tables.as_text(result))


if __name__ == "__main__":
    main()
