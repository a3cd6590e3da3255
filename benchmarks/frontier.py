"""Quality against computed work, ours and other libraries': the same held-out edits of Spark.

python benchmarks/frontier.py -n 24 --out benchmarks/results/frontier.json

Work counts blocks, so it is the same on every machine. Plain with fewer steps is the line to beat.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar

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
from fluxfire.spark.pipeline import SparkPipeline

STEPS = 28
PLAIN = (24, 20, 18, 16, 14, 12, 10, 8, 6, 4, 3, 2, 1)
WITHDRAWN = {"balanced": 0.27, "fast": 0.5}
"""Thresholds of version 0.1.0, from the first step on, without a limit. Its prediction was a
parabola in the step's number, which the pass no longer has; they run with today's."""


@dataclass(frozen=True)
class RegionE:
    """RegionE at its own settings for Kontext (https://arxiv.org/abs/2510.25590).

    After 6 steps it computes the tokens of the edited region alone, with kept keys and values; it
    refreshes once, computes the last 2 steps, and skips steps by constants of the real Kontext. It
    needs 28 steps, one picture a call, and an NVIDIA GPU or Triton's interpreter.
    """

    skips: ClassVar[bool] = True
    compiles: ClassVar[bool] = False

    @contextmanager
    def applied(self, pipe: Any) -> Iterator[None]:
        """Turn a copy of a pipeline into RegionE's; the copy is thrown away afterwards."""
        from RegionE.FluxKontext import inplace
        from RegionE.tool.RegionE import config

        if find_spec("flash_attn") is None:
            inplace.flash_attn = None  # it tests for None, and has False
        inplace.warp_modules(pipe, **config["FluxKontextPipeline"])

        # Spark's defaults for a call, and RegionE's loop.
        class Both(SparkPipeline, inplace.RegionEFluxKontextPipeline):  # type: ignore[misc]
            def __call__(self, *args: Any, **call: Any) -> Any:
                # It refuses the two steps of a warm-up.
                return super().__call__(*args, **{**call, "num_inference_steps": STEPS})

        pipe.__class__ = Both
        try:
            yield
        finally:
            pipe.__class__ = SparkPipeline

    def begin(self, run: Callable[[], object], workload: Workload) -> None:
        """Do nothing: it starts anew at each call."""


def contenders(*, regions: bool) -> Iterator[tuple[str, Contender]]:
    """List who is compared, by family.

    Args:
        regions: whether RegionE, too.
    """
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
        cache = FirstBlockCache(threshold, predict="damped", **free)  # type: ignore[arg-type]
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
    for blocks, threshold in ((2, 0.08), (8, 0.08), (8, 0.12)):
        method = CacheDit(threshold, first_blocks=blocks, max_consecutive_hits=-1)
        name = f"cache-dit F{blocks}B0 {threshold}"
        yield "cache-dit", Contender(name, role="baseline", baseline=method)
    for contender in baselines.choose(["mag-cache"], steps=STEPS):
        yield "MagCache", contender
    if regions:
        yield "RegionE", Contender("RegionE", role="baseline", baseline=RegionE())


def main() -> None:
    """Edit with every contender; rows are saved after each."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("-n", type=int, default=24, help="held-out edits")
    parser.add_argument("--only", nargs="*", help="families, with plain")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    arguments = parser.parse_args()

    pipe = load("spark")
    pipe.set_progress_bar_config(disable=True)
    pipe.to(dtype=getattr(torch, arguments.dtype))
    wanted = arguments.only
    # pip install --no-deps regione; its kernel needs two bytes a number.
    regions = arguments.dtype == "bfloat16" and find_spec("RegionE") is not None
    listed = [c for c in contenders(regions=regions) if not wanted or c[0] in (*wanted, "plain")]
    result: dict[str, Any] = {
        "benchmark": "frontier",
        **stamp(),
        "examples": arguments.n,
        "steps": STEPS,
        "dtype": arguments.dtype,
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
