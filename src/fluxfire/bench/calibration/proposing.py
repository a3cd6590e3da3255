"""Proposes which steps to skip: dynamic programming over the traces of plain edits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from fluxfire.bench.calibration.recording import Trace
from fluxfire.errors import BenchError
from fluxfire.passes import Schedule

POINTS = 3
"""How many computed steps a prediction uses at most."""
_SLACK = 1.5
"""A limit is this times the largest distance that any trace has at the skipped step."""
_LEAST_LIMIT = 1e-4


def weights(known: Tensor, sigma: Tensor, products: Tensor) -> Tensor:
    """Return the weights of computed residuals in the residual that the cache predicts.

    One residual is held. Two make a line. Three make the line through the last two with a damped
    slope, as `FirstBlockCache(predict="damped")` does; the products tell how much of it is kept.

    Args:
        known: (N, 1 to 3): noise levels of the last computed steps, in order; different in a row.
        sigma: (N,): the noise level to predict for.
        products: (N, 1 to 3, 1 to 3): inner products of the residuals.

    Returns:
        (N, 1 to 3).

    Example: through 1.0 and 0.8 to 0.7, a line has the weights -0.5 and 1.5.
    """
    found = torch.zeros_like(known)
    found[:, -1] = 1
    if known.shape[1] == 1:
        return found
    reach = (sigma - known[:, -1]) / (known[:, -1] - known[:, -2])
    if known.shape[1] == POINTS:
        reach = reach * _damping(known, products)
    found[:, -2] -= reach
    found[:, -1] += reach
    return found


def _damping(known: Tensor, products: Tensor) -> Tensor:
    """Return the share of the slope that is kept, from 0 to 1: `FirstBlockCache` explains it."""
    before, came = products.new_tensor([-1, 1, 0]), products.new_tensor([0, -1, 1])
    reach = (known[:, 2] - known[:, 1]) / (known[:, 1] - known[:, 0])
    along = torch.einsum("i,nij,j->n", came, products, before)
    size = torch.einsum("i,nij,j->n", before, products, before)
    return (along / (reach * size)).nan_to_num(1.0).clamp(0, 1)


@dataclass(frozen=True)
class Bounds:
    """What every proposed schedule keeps.

    Attributes:
        warmup: how many first steps are computed, at least one.
        tail: how many last steps are computed, at least one.
        cap: most skipped steps in a row.
        early: weight of a step's error as a power of its noise level. 0 counts all steps alike; 1
            counts early errors more, on which all later steps build.
    """

    warmup: int = 1
    tail: int = 1
    cap: int = 6
    early: float = 0.0


class Errors:
    """The expected error of predicting a step, from the products of many traces.

    Attributes:
        steps: number of steps of the traces.
    """

    def __init__(self, traces: Sequence[Trace]) -> None:
        """Prepare.

        Args:
            traces: of plain edits with equal numbers of steps.

        Raises:
            BenchError: a trace is not finite, or its noise levels do not fall.
        """
        self._sigmas = torch.stack([t.sigmas for t in traces])
        self.steps = self._sigmas.shape[1] - 1
        self._farthest = torch.stack([t.distances for t in traces]).amax(0)
        self._products = torch.stack([t.products for t in traces])
        self._strides = -self._sigmas.diff()
        if not bool(self._products.isfinite().all() and self._farthest.isfinite().all()):
            raise BenchError("the blocks' outputs are not all finite, so nothing can be calibrated")
        if not bool((self._strides > 0).all()):
            raise BenchError(
                "the scheduler's noise levels do not fall at every step; calibrate needs one whose "
                "levels do, such as FlowMatchEulerDiscreteScheduler"
            )
        self._known: dict[tuple[int, ...], float] = {}

    @property
    def sigmas(self) -> list[float]:
        """The noise level of each step, the mean over the traces; 0 at the end."""
        return cast("list[float]", self._sigmas.mean(0).tolist())

    def limit(self, last: int, step: int) -> float:
        """Return the distance from which a skipped step is computed after all.

        Args:
            last: the last computed step before it.
            step: the skipped step.
        """
        return max(_LEAST_LIMIT, round(_SLACK * float(self._farthest[step, last]), 4))

    def __call__(self, computed: tuple[int, ...], step: int) -> float:
        """Return the error that skipping a step adds to the picture, as a root mean square.

        Args:
            computed: the last computed steps in order, at most `POINTS`.
            step: the skipped step.
        """
        key = (*computed, step)
        if key not in self._known:
            levels = self._sigmas[:, list(key)]
            last = torch.full((len(levels), 1), -1.0, dtype=torch.float64)
            products = self._products[:, list(key)][:, :, list(key)]
            w = weights(levels[:, :-1], levels[:, -1], products[:, :-1, :-1])
            w = torch.cat([w, last], 1)
            square = torch.einsum("ni,nij,nj->n", w, products, w).clamp_min(0)
            self._known[key] = float((self._strides[:, step] * square.sqrt()).mean())
        return self._known[key]

    def of(self, schedule: Schedule) -> float:
        """Return the error that a schedule's skipped steps add to the picture."""
        computed = [s for s in range(self.steps) if s not in schedule.by_step]
        return sum(
            self(tuple(s for s in computed if s < step)[-POINTS:], step)
            for step in schedule.by_step
        )


def propose(errors: Errors, bounds: Bounds) -> dict[int, tuple[int, ...]]:
    """Return the schedule of least expected error for each number of computed steps.

    The error of a schedule is the sum of its skipped steps' errors. Dynamic programming finds the
    least sum: what a step costs depends only on the last `POINTS` computed steps before it.

    Returns:
        For each possible number of computed steps, the skipped steps in order.
    """
    sigmas, steps = errors.sigmas, errors.steps
    first = tuple(range(bounds.warmup))
    end = steps - bounds.tail  # from here on all steps are computed
    # The best way to each state: the last computed steps -> (error, all computed steps).
    layer: dict[tuple[int, ...], tuple[float, tuple[int, ...]]] = {first[-POINTS:]: (0.0, first)}
    found: dict[int, tuple[int, ...]] = {}
    while layer:
        following: dict[tuple[int, ...], tuple[float, tuple[int, ...]]] = {}
        for state, (error, path) in layer.items():
            last = state[-1]
            added = 0.0
            for step in range(last + 1, min(last + bounds.cap + 2, steps)):
                cost = error + added
                key = (*state, step)[-POINTS:]
                if key not in following or cost < following[key][0]:
                    following[key] = cost, (*path, step)
                if step >= end:
                    break  # it may not be skipped
                importance = sigmas[step] ** bounds.early
                added += importance * errors(state, step)
        whole = [(e, p) for s, (e, p) in following.items() if s[-1] == steps - 1]
        if whole:
            _, path = min(whole)
            found[len(path)] = tuple(s for s in range(steps) if s not in path)
        layer = {s: v for s, v in following.items() if s[-1] < steps - 1}
    return found


def schedules(errors: Errors, bounds: Bounds) -> dict[int, Schedule]:
    """Return `propose`'s schedules with limits, by number of computed steps."""
    found = {}
    for computed, skipped in propose(errors, bounds).items():
        limits: dict[int, float | None] = {}
        for step in skipped:
            last = max(s for s in range(step) if s not in skipped)
            limits[step] = errors.limit(last, step)
        found[computed] = Schedule(errors.steps, limits)
    return found
