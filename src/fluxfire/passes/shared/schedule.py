"""A schedule: the steps to skip in generations of one length, with a limit for each."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from math import isfinite
from typing import Any, cast

from fluxfire.passes.shared.step_settings import check_whole_number, is_whole_number, sorted_steps

Limits = Mapping[int, float | None] | Iterable[tuple[int, float | None]]


@dataclass(frozen=True)
class Schedule:
    """The steps to skip in generations of one length, and how much may change at each.

    `fluxfire.calibrate` finds one for your model.

    It fits generations of as many steps at the noise levels that it was made for. Other levels, as
    with other `sigmas` or a `strength` below 1, need a schedule of their own.

    Attributes:
        steps: number of steps of the generations that it is for.
        limits: for each skipped step, the distance from which the cache computes it after all; None
            skips it at any distance. A limit is for the distance since the schedule's last computed
            step. Give a mapping or pairs. Stored as pairs, sorted by step.

    Raises:
        ValueError: a step is no whole number, or not one of the generation's steps after the first;
            or a limit is not a positive number.

    Example: `Schedule(28, {9: 0.3, 11: 0.25})` skips steps 9 and 11 of 28, unless the first block's
    output has changed by 30% or 25% since the last computed step.
    """

    steps: int
    limits: Limits

    def __post_init__(self) -> None:
        check_whole_number("steps", self.steps, 1)
        found: dict[int, float | None] = {}
        for step, limit in _pairs(self.limits):
            if step in found:
                raise ValueError(f"limits has step {step} twice; keep one")
            if not is_whole_number(step, 1) or step >= self.steps:
                raise ValueError(
                    f"limits has step {step!r}; with steps={self.steps} a step that can be skipped "
                    f"is a whole number from 1 to {self.steps - 1} (step 0 has nothing before it)"
                )
            number = isinstance(limit, float | int) and not isinstance(limit, bool)
            if limit is not None and not (number and isfinite(limit) and limit > 0):
                raise ValueError(
                    f"step {step} has the limit {limit!r}; it must be a number above 0, or None to "
                    f"skip the step at any distance"
                )
            found[step] = None if limit is None else float(limit)
        object.__setattr__(self, "limits", tuple(sorted(found.items())))

    def __repr__(self) -> str:
        """Show an expression that makes it, short where all limits are equal."""
        limits = self.by_step
        if len(set(limits.values())) != 1:
            return f"Schedule({self.steps}, {limits})"
        (limit,) = set(limits.values())
        return f"Schedule({self.steps}, dict.fromkeys({tuple(limits)}, {limit}))"

    @property
    def by_step(self) -> dict[int, float | None]:
        """The limit of each skipped step."""
        return dict(cast("tuple[tuple[int, float | None], ...]", self.limits))


def _pairs(limits: object) -> list[tuple[int, float | None]]:
    pairs: object = limits.items() if isinstance(limits, Mapping) else limits
    try:
        return [(step, limit) for step, limit in cast("Iterable[Any]", pairs)]
    except (TypeError, ValueError):
        raise ValueError(
            f"limits={limits!r}; give a mapping of steps to limits, such as {{9: 0.3, 11: None}}, "
            f"or pairs of the two"
        ) from None


def normalise(schedule: object) -> tuple[int, ...] | tuple[Schedule, ...]:
    """Return a setting as steps in order, or as schedules of different lengths.

    Args:
        schedule: steps, one schedule, or several; a schedule may be a mapping of its fields, as a
            file holds it.

    Raises:
        ValueError: two schedules are for the same number of steps, a schedule has wrong fields, or
            a step is no whole number.
    """
    if isinstance(schedule, Schedule | Mapping):
        schedule = [schedule]
    if not isinstance(schedule, Iterable) or isinstance(schedule, str):
        raise ValueError(  # noqa: TRY004 - settings raise a ValueError for any wrong value
            f"schedule={schedule!r}; give the steps to skip, such as [9, 11], or a Schedule"
        )
    entries: list[object] = list(schedule)
    if not any(isinstance(entry, Schedule | Mapping) for entry in entries):
        return sorted_steps("schedule", entries)
    schedules = sorted((_as_schedule(entry) for entry in entries), key=lambda s: s.steps)
    for one, other in pairwise(schedules):
        if one.steps == other.steps:
            raise ValueError(f"schedule has two schedules for {one.steps} steps; keep one")
    return tuple(schedules)


def _as_schedule(entry: object) -> Schedule:
    if isinstance(entry, Schedule):
        return entry
    if isinstance(entry, Mapping) and entry.keys() == {"steps", "limits"}:
        return Schedule(**entry)
    raise ValueError(
        f"schedule has {entry!r}; it must hold whole numbers, or schedules alone, each with steps "
        f"and limits"
    )
