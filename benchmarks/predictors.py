"""How to predict what skipped blocks would add: ways beside each other, in whole edits by Spark.

    python benchmarks/predictors.py --out benchmarks/results/predictors.json -n 96 --batch 96
    python benchmarks/predictors.py --out /tmp/predictors.json -n 2 --schedules 16    # on a CPU

Every way skips the same steps of the same edits with the same noise, so only the prediction
differs. Plain with as many steps as the schedule computes stands beside them.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.nn import functional

import fluxfire
from fluxfire import spark
from fluxfire.bench import compare, save_result, stamp
from fluxfire.bench.intervals import bootstrap
from fluxfire.passes import FirstBlockCache, first_block_cache
from fluxfire.text import table

STEPS = 28
SCHEDULES = {
    "16": "CCCCCCCC..C..C..C..C..C..CCC",
    "13": "CCCCCC...C...C...C...C..CC.C",
    "10": "CCCCC....C....C....C....C..C",
}
"""Steps computed (C) and skipped, by how many are computed."""
Prediction = Callable[[Any, Tensor], Tensor]
"""Takes the history of residuals and the sigma of the skipped step; returns the residual."""


def hold(history: Any, _: Tensor) -> Tensor:
    """Repeat the last residual."""
    last: Tensor = history.residuals[0]
    return last


def by_index(sigma: Tensor) -> Tensor:
    """Turn sigmas into the numbers of their steps, which lie evenly where sigmas do not."""
    shift = math.exp(1.15)  # FLUX's shift for a megapixel, which Spark's scheduler has
    return -sigma / (shift - (shift - 1) * sigma)


def by_sigma(sigma: Tensor) -> Tensor:
    """Leave sigmas as they are."""
    return sigma


def line(by: Callable[[Tensor], Tensor] = by_sigma, damping: float = 1.0) -> Prediction:
    """Extend the line through the last two residuals."""

    def predict(history: Any, sigma: Tensor) -> Tensor:
        residuals, at = history.residuals, [by(s) for s in history.sigmas]
        if len(residuals) == 1:
            return hold(history, sigma)
        reach = damping * (by(sigma) - at[0]) / (at[0] - at[1])
        ahead: Tensor = residuals[0] + _each(reach) * (residuals[0] - residuals[1])
        return ahead

    return predict


def parabola(by: Callable[[Tensor], Tensor] = by_sigma) -> Prediction:
    """Extend the parabola through the last three residuals."""
    return fitted(by, degree=2, points=3)


def fitted(
    by: Callable[[Tensor], Tensor] = by_sigma, *, degree: int, points: int, ridge: float = 0.0
) -> Prediction:
    """Fit a polynomial by least squares.

    Args:
        by: what the polynomial is in.
        degree: of the polynomial.
        points: how many of the last residuals it is fitted to.
        ridge: the penalty on the coefficients beyond a line. The unit of length is the distance
            of the last two residuals.
    """

    def predict(history: Any, sigma: Tensor) -> Tensor:
        residuals = history.residuals[:points]
        if len(residuals) <= degree:
            return line(by)(history, sigma)
        at = torch.stack([by(s) for s in history.sigmas[:points]], -1).double()
        unit = (at[:, :1] - at[:, 1:2]).abs()
        powers = torch.arange(degree + 1, device=at.device)
        known = ((at - at[:, :1]) / unit)[..., None] ** powers
        asked = ((by(sigma).double()[:, None] - at[:, :1]) / unit) ** powers
        penalty = ridge * torch.diag((powers > 1).double())
        gram = known.mT @ known + penalty
        weights = (asked[:, None] @ torch.linalg.solve(gram, known.mT))[:, 0]
        # From the newest residual on, because differences round less than a weighted sum.
        predicted: Tensor = residuals[0] * _each(weights.sum(-1)).to(residuals[0].dtype)
        for i, older in enumerate(residuals[1:], 1):
            weight = _each(weights[:, i]).to(older.dtype)
            predicted = predicted + weight * (older - residuals[0])
        return predicted

    return predict


def learned_damping(dims: tuple[int, ...]) -> Prediction:
    """Damp the line by how well it would have predicted the last computed step.

    Example: the line through the residuals before predicted a change of 1, and 0.6 came. Then the
    next line counts 0.6.

    Args:
        dims: the dimensions that share a factor: (1, 2) for one of each sample, (2,) for one of
            each token, (1,) for one of each channel.
    """

    def predict(history: Any, sigma: Tensor) -> Tensor:
        residuals, at = history.residuals, history.sigmas
        if len(residuals) < 3:  # noqa: PLR2004 - two make the line, the third tests it
            return line()(history, sigma)
        newest, middle, oldest = residuals[:3]
        expected = _each((at[0] - at[1]) / (at[1] - at[2])) * (middle - oldest)
        came = newest - middle
        factor = (came * expected).sum(dims, keepdim=True)
        factor = factor / expected.square().sum(dims, keepdim=True).clamp_min(1e-12)
        ahead = _each((sigma - at[0]) / (at[0] - at[1])) * (newest - middle)
        predicted: Tensor = newest + factor.clamp(0, 1) * ahead
        return predicted

    return predict


def by_frequency(low: Prediction, high: Prediction, *, cells: int) -> Prediction:
    """Predict a coarse picture of the residual in one way, and what is finer in another.

    Args:
        low: for means over squares of tokens.
        high: for the rest.
        cells: tokens along a side of such a square.
    """

    def predict(history: Any, sigma: Tensor) -> Tensor:
        coarse, fine = low(history, sigma), high(history, sigma)
        kept: Tensor = fine + _means(coarse, cells) - _means(fine, cells)
        return kept

    return predict


def _means(residual: Tensor, cells: int) -> Tensor:
    """Replace tokens, (batch, tokens, width) of a square picture, by the means of their squares."""
    side = round(residual.shape[1] ** 0.5)
    grid = residual.movedim(1, -1).reshape(*residual.shape[::2], side, side)
    means = functional.avg_pool2d(grid, cells).repeat_interleave(cells, 2)
    return means.repeat_interleave(cells, 3).movedim(1, -1).flatten(1, 2)


def _each(factor: Tensor) -> Tensor:
    return factor[:, None, None]


WAYS: dict[str, Prediction] = {
    "hold": hold,
    "linear in sigma": line(),
    "linear in the step": line(by_index),
    **{f"linear in sigma, damped by {d}": line(damping=d) for d in (0.5, 0.75, 0.9)},
    "quadratic in sigma": parabola(),
    "quadratic in the step": parabola(by_index),
    "line through 3 points": fitted(degree=1, points=3),
    "line through 4 points": fitted(degree=1, points=4),
    **{f"quadratic in sigma, ridge {r}": fitted(degree=2, points=4, ridge=r) for r in (0.1, 1.0)},
    "damping learned by sample": learned_damping((1, 2)),
    "damping learned by token": learned_damping((2,)),
    "damping learned by channel": learned_damping((1,)),
    "coarse held, fine linear": by_frequency(hold, line(), cells=4),
    "coarse linear, fine held": by_frequency(line(), hold, cells=4),
    "coarse linear, fine damped by 0.5": by_frequency(line(), line(damping=0.5), cells=2),
    "coarse quadratic, fine linear": by_frequency(parabola(), line(), cells=4),
}
_POINTS = 4  # residuals that are kept


@contextmanager
def predicting(way: Prediction) -> Iterator[None]:
    """Let a cache with `predict="damped"` predict in another way, in this process."""
    with (
        mock.patch.object(
            first_block_cache._ResidualHistory,  # noqa: SLF001 - ways that the pass does not have
            "predict",
            way,
        ),
        mock.patch.dict(first_block_cache._POINTS, damped=_POINTS),  # noqa: SLF001
    ):
        yield


def main() -> None:
    """Edit with every way at every schedule."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("-n", type=int, default=96, help="held-out edits")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--schedules", nargs="*", choices=SCHEDULES, default=list(SCHEDULES))
    parser.add_argument("--ways", nargs="*", choices=WAYS, default=list(WAYS))
    arguments = parser.parse_args()

    pipe = spark.load(dtype=torch.float32)
    edits = spark.examples(split="test", n=arguments.n)
    score = _scorer(pipe, edits, arguments.batch)
    plain = score(STEPS)
    result: dict[str, Any] = {
        "benchmark": "predictors",
        **stamp(),
        "examples": arguments.n,
        "steps": STEPS,
        "schedules": {name: SCHEDULES[name] for name in arguments.schedules},
        "success": fmean(s.passed for s in plain),
        "rows": [],
    }
    for name in arguments.schedules:
        skipped = [i for i, sign in enumerate(SCHEDULES[name]) if sign == "."]
        fewer = _row("plain, fewer steps", name, score(int(name) + 1), plain, None)
        result["rows"].append(fewer)
        cache = FirstBlockCache(
            schedule=skipped, predict="damped", warmup_steps=0, tail_steps=0,
            max_consecutive_hits=None,
        )  # fmt: skip
        for way in arguments.ways:
            with fluxfire.optimized(pipe, [cache]), predicting(WAYS[way]):
                made = score(STEPS)
            result["rows"].append(_row(way, name, made, plain, fewer))
            save_result(result, arguments.out)
    print(_table(result["rows"]))


def _scorer(pipe: Any, edits: Sequence[Any], batch: int) -> Callable[[int], list[Any]]:
    return lambda steps: spark.score(pipe, edits, steps=steps, batch=batch)


def _row(
    way: str, schedule: str, made: list[Any], plain: list[Any], fewer: dict[str, Any] | None
) -> dict[str, Any]:
    """Compare pictures with plain's; `fewer` is the row of plain with as many steps."""
    near = compare([m.image for m in made], [p.image for p in plain]).to_dict()
    each = [one["psnr"] for one in near["each"]]
    row = {
        "way": way,
        "schedule": schedule,
        "psnr": near["psnr"],
        "each": each,
        "success": fmean(m.passed for m in made),
    }
    if fewer is not None:
        gains = [a - b for a, b in zip(each, fewer["each"], strict=True)]
        interval = bootstrap(gains)
        row["gain"] = {"worst": min(gains), **(asdict(interval) if interval else {})}
    return row


def _gain(row: dict[str, Any]) -> str:
    gain = row.get("gain", {})
    if "mean" not in gain:
        return ""
    return "{mean:+.1f} [{low:+.1f}, {high:+.1f}] ({worst:+.1f})".format(**gain)


def _table(rows: list[dict[str, Any]]) -> str:
    lines = [
        (
            row["schedule"],
            row["way"],
            f"{row['psnr']['mean']:.1f}",
            f"{row['psnr']['worst']:.1f}",
            _gain(row),
            f"{row['success']:.0%}",
        )
        for row in rows
    ]
    head = (
        "computed",
        "prediction",
        "PSNR to plain",
        "worst",
        "above fewer steps [95%] (worst)",
        "right",
    )
    return table(head, lines)


if __name__ == "__main__":
    main()
