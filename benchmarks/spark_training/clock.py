"""A budget of minutes or steps that learning rates follow, and the log of what happened in it."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

_FLOOR = 0.01  # of the learning rate, as a share of its peak
_FALLS = 0.55  # the share of a budget after which the learning rate falls
_ASKED = 10  # steps between two looks at the clock


@dataclass(frozen=True)
class Budget:
    """What a training may spend.

    Attributes:
        amount: how much.
        unit: minutes or steps. In so many minutes a slow machine trains less than a fast one; in
            so many steps it trains as much.
    """

    amount: float
    unit: Literal["minutes", "steps"]


class Clock:
    """Counts a run's steps until its budget is spent; work done before an interruption counts.

    Attributes:
        steps: finished.
        seconds: spent.
        spent: the share of the budget, in [0, 1].
        over: whether nothing is left, or this sitting ends.
    """

    def __init__(
        self,
        budget: Budget,
        *,
        seconds: float = 0.0,
        steps: int = 0,
        stop: float = float("inf"),
        agree: Callable[[float], float] = float,
        now: Callable[[], float] = time.perf_counter,
    ) -> None:
        """Start the clock.

        Args:
            budget: what may be spent.
            seconds: spent before an interruption.
            steps: finished before it.
            stop: when to stop although something is left, by `now`.
            agree: makes all processes that train together read the same.
            now: tells the time, in seconds since any moment.
        """
        self._budget, self._stop, self._agree, self._now = budget, stop, agree, now
        self._began = now() - seconds
        self.steps = steps
        self.spent, self.over = 0.0, False
        self._look()

    def __iter__(self) -> Iterator[int]:
        """Number the steps of this run, from 0, while something is left."""
        step = 0
        while not self.over:
            yield step
            step += 1
            self.steps += 1
            if step % _ASKED == 0 or self._budget.unit == "steps":
                self._look()

    def _look(self) -> None:
        spent = self.steps if self._budget.unit == "steps" else self.seconds / 60
        share = min(1.0, spent / self._budget.amount)
        agreed = self._agree(2.0 if self._now() >= self._stop else share)
        self.over = agreed >= 1
        self.spent = min(1.0, agreed) if agreed < 2 else share  # noqa: PLR2004

    @property
    def seconds(self) -> float:
        """Seconds spent."""
        return self._now() - self._began


def rate(spent: float, step: int, *, warmup: int = 200) -> float:
    """Return the learning rate's share of its peak: up for some steps, level, then down."""
    fall = min(1.0, (1 - spent) / (1 - _FALLS))
    return min(1.0, (step + 1) / warmup) * max(_FLOOR, fall)


class Log:
    """JSON lines: one record a line, appended."""

    def __init__(self, path: Path, *, silent: bool = False) -> None:
        """Open a log; a silent one writes nothing."""
        self._path, self._silent = path, silent

    def write(self, **record: float | str) -> None:
        """Append a record, and print it."""
        if self._silent:
            return
        rounded = {k: round(v, 5) if isinstance(v, float) else v for k, v in record.items()}
        line = json.dumps(rounded)
        with self._path.open("a") as file:
            file.write(line + "\n")
        print(line, flush=True)
