"""The presets `balanced` and `fast`: the caches that keep to their budgets on Spark's edits.

python benchmarks/tune_presets.py --out benchmarks/results    # hours on a CPU
python benchmarks/tune_presets.py -n 12 --steps 6 --out /tmp  # a try
"""

from __future__ import annotations

import argparse
from pathlib import Path

from fluxfire import spark
from fluxfire.bench import Budget, Prices, Workload, held_out, tune
from fluxfire.bench.tuning import caches
from fluxfire.passes import FirstBlockCache

BUDGETS = {
    "balanced": Budget(min_psnr=28, max_lost=0.01),
    "fast": Budget(mean_psnr=28, max_lost=0.03),
}
PRICES = Prices(computed=0.27, reused=0.147, hit=0.006, around=0.2)
"""Seconds of FLUX's steps on an H100, compiled: `benchmarks/results/reference.json`."""


def main() -> None:
    """Tune for each budget, and save what was found."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-n", type=int, default=376, help="held-out edits")
    parser.add_argument("--steps", type=int, default=28)
    parser.add_argument("--out", type=Path, required=True, help="folder")
    arguments = parser.parse_args()

    pipe = spark.load()
    families = [f for f in caches() if all(map(_bends, f.passes))]
    load = Workload.usual(pipe, steps=arguments.steps)
    for name, budget in BUDGETS.items():
        found = tune(
            pipe, held_out(arguments.n), budget, candidates=families, workload=load, prices=PRICES,
            on_edit=lambda said: print(said, flush=True),
        )  # fmt: skip
        print(found)
        found.save(arguments.out / f"tuned_{name}.json")


def _bends(cache: object) -> bool:
    """Whether a cache predicts by a parabola, which on Spark comes nearest; or none is left out."""
    return not isinstance(cache, FirstBlockCache) or cache.predict == "quadratic"


if __name__ == "__main__":
    main()
