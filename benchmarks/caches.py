"""What FirstBlockCache hits, and what that costs in quality, on Spark's held-out edits.

python benchmarks/caches.py --out benchmarks/results/caches.json --batch 96    # best on a GPU
python benchmarks/caches.py --out /tmp/caches.json -n 12 --steps 10            # a try on a CPU
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from statistics import mean
from typing import Any

import torch

import fluxfire
from fluxfire import spark
from fluxfire.bench import save, stamp
from fluxfire.passes import FirstBlockCache
from fluxfire.spark import checking
from fluxfire.spark.scoring import Score, psnr
from fluxfire.text import table

THRESHOLDS = (0.05, 0.08, 0.12, 0.18, 0.25)


def variants() -> Iterator[FirstBlockCache]:
    """Every threshold, distance and prediction."""
    for threshold in THRESHOLDS:
        for distance in ("all", "noise"):
            for predict in ("hold", "linear"):
                yield FirstBlockCache(threshold, distance=distance, predict=predict)


def main() -> None:
    """Score every variant at every number of steps, against plain runs of the same."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("-n", type=int, default=240, help="held-out edits")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--steps", type=int, nargs="*", default=[10, 20, 28, 50])
    arguments = parser.parse_args()

    pipe = spark.load(dtype=torch.float32)  # so that bfloat16's own noise is not in the way
    tasks = spark.examples(split="test", n=arguments.n)
    result: dict[str, Any] = {"benchmark": "caches", **stamp(), "rows": []}
    fluxfire.optimize(pipe, [FirstBlockCache(0)])
    for steps in arguments.steps:
        plain, _ = _scored(pipe, tasks, steps, arguments.batch)
        result["rows"].append(_row(None, steps, plain, plain, 0.0))
        for cache in variants():
            with fluxfire.using(pipe, cache):
                made, hits = _scored(pipe, tasks, steps, arguments.batch)
            result["rows"].append(_row(cache, steps, made, plain, hits))
            save(result, arguments.out)
    print(_table(result["rows"]))


def _scored(
    pipe: Any, tasks: list[spark.Example], steps: int, batch: int
) -> tuple[list[Score], float]:
    """Edit and check everything; return the scores and the share of hits."""
    scores: list[Score] = []
    hits: list[bool] = []
    for first in range(0, len(tasks), batch):
        some = tasks[first : first + batch]
        scores += spark.score(pipe, some, steps=steps, seed=first, batch=batch)
        hits += [hit for d in fluxfire.report(pipe).runs[-1].decisions for hit in d.hits]
    return scores, mean(hits)


def _row(
    cache: FirstBlockCache | None, steps: int, made: list[Score], plain: list[Score], hits: float
) -> dict[str, Any]:
    pairs = zip(made, plain, strict=True)
    drift = [psnr(checking.as_tensor(m.image), checking.as_tensor(p.image)) for m, p in pairs]
    return {
        "threshold": cache.threshold if cache else None,
        "distance": cache.distance if cache else None,
        "predict": cache.predict if cache else None,
        "steps": steps,
        "hits": hits,
        "psnr_to_plain": {"mean": mean(drift), "min": min(drift)},
        "psnr_to_target": mean(m.psnr for m in made),
        "success": mean(m.passed for m in made),
    }


def _table(rows: list[dict[str, Any]]) -> str:
    lines = [
        (
            row["steps"],
            "-" if row["threshold"] is None else row["threshold"],
            row["distance"] or "-",
            row["predict"] or "-",
            f"{row['hits']:.0%}",
            f"{row['psnr_to_plain']['mean']:.1f}",
            f"{row['psnr_to_plain']['min']:.1f}",
            f"{row['psnr_to_target']:.1f}",
            f"{row['success']:.1%}",
        )
        for row in rows
    ]
    head = (
        "steps", "threshold", "distance", "predict", "hits", "PSNR to plain", "its minimum",
        "PSNR to target", "success",
    )  # fmt: skip
    return table(head, lines)


if __name__ == "__main__":
    main()
