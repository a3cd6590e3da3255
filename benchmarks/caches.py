"""What FirstBlockCache hits, and what that costs in quality, on Spark's held-out edits.

python benchmarks/caches.py --out benchmarks/results/caches.json --batch 96    # best on a GPU
python benchmarks/caches.py --out /tmp/caches.json -n 12 --steps 10            # a try on a CPU
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import torch

import fluxfire
from fluxfire import spark
from fluxfire.bench import compare, save_result, stamp
from fluxfire.passes import FirstBlockCache
from fluxfire.spark.scoring import Score
from fluxfire.text import table

THRESHOLDS = (0.05, 0.08, 0.12, 0.18, 0.25)
FROM_WORDS_STEPS = 20  # the article's workload


def variants() -> Iterator[FirstBlockCache]:
    """Every threshold, distance and prediction."""
    for threshold in THRESHOLDS:
        for distance in ("all", "noise"):
            for predict in ("hold", "linear", "damped"):
                yield FirstBlockCache(
                    threshold, distance=distance, predict=predict, warmup_steps=0, tail_steps=0,
                    max_consecutive_hits=None,
                )  # fmt: skip


@dataclass(frozen=True)
class Made:
    """Results of one setting.

    Attributes:
        scores: of each example.
        hits: of each step, the share of examples for which it was a hit.
    """

    scores: list[Score]
    hits: list[float]


def main() -> None:
    """Score every variant at every number of steps, against plain runs of the same."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("-n", type=int, default=240, help="held-out edits")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--steps", type=int, nargs="*", default=[10, 20, 28, 50])
    arguments = parser.parse_args()

    n, batch = arguments.n, arguments.batch
    pipe = spark.load(dtype=torch.float32)  # so that bfloat16's own noise is not in the way
    edits, words = spark.examples(split="test", n=n), spark.drawings(n=n)
    result: dict[str, Any] = {"benchmark": "caches", **stamp(), "examples": n, "rows": []}
    fluxfire.optimize(pipe, [FirstBlockCache(0)])

    def judge(tasks: Sequence[Any], steps: int, caches: Iterator[FirstBlockCache]) -> None:
        plain = _make(pipe, tasks, steps, batch)
        result["rows"].append(_row(None, plain, plain))
        for cache in caches:
            with fluxfire.using(pipe, cache):
                made = _make(pipe, tasks, steps, batch)
            result["rows"].append(_row(cache, made, plain))
            save_result(result, arguments.out)

    for steps in arguments.steps:
        judge(edits, steps, variants())
    judge(words, FROM_WORDS_STEPS, iter([FirstBlockCache()]))
    print(_table(result["rows"]))


def _make(pipe: Any, tasks: Sequence[Any], steps: int, batch: int) -> Made:
    """Make and check everything."""
    scores: list[Score] = []
    hits: list[list[bool]] = [[] for _ in range(steps)]
    for first in range(0, len(tasks), batch):
        some = tasks[first : first + batch]
        scores += spark.score(pipe, some, steps=steps, seed=first, batch=batch)
        for decision in fluxfire.report(pipe).runs[-1].decisions:
            hits[decision.step] += decision.hits
    return Made(scores, [mean(step) for step in hits])


def _row(cache: FirstBlockCache | None, made: Made, plain: Made) -> dict[str, Any]:
    near = compare([m.image for m in made.scores], [p.image for p in plain.scores]).to_dict()
    return {
        "kind": "from words" if made.scores[0].kind == "from words" else "edit",
        "threshold": cache.threshold if cache else None,
        "distance": cache.distance if cache else None,
        "predict": cache.predict if cache else None,
        "steps": len(made.hits),
        "hits": mean(made.hits),
        "hits_by_step": [round(share, 4) for share in made.hits],
        "psnr_to_plain": {"mean": near["psnr"]["mean"], "min": near["psnr"]["worst"]},
        "ssim_to_plain": near["ssim"],
        "flip_to_plain": near["flip"],
        "success": mean(m.passed for m in made.scores),
    }


def _table(rows: list[dict[str, Any]]) -> str:
    lines = [
        (
            row["kind"],
            row["steps"],
            "-" if row["threshold"] is None else row["threshold"],
            row["distance"] or "-",
            row["predict"] or "-",
            f"{row['hits']:.0%}",
            f"{row['psnr_to_plain']['mean']:.1f}",
            f"{row['psnr_to_plain']['min']:.1f}",
            f"{row['success']:.1%}",
        )
        for row in rows
    ]
    head = (
        "", "steps", "threshold", "distance", "predict", "hits", "PSNR to plain", "its minimum",
        "success",
    )  # fmt: skip
    return table(head, lines)


if __name__ == "__main__":
    main()
