"""A budget of minutes or steps that learning rates follow, and the log of what happened in it."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

_FLOOR = 0.02  # of the learning rate, as a share of its peak


@dataclass(frozen=True)
class Budget:
    """What a training may spend.

    Attributes:
        amount: how much.
        unit: of what. In so many minutes a slow machine trains less than a fast one; in so
            many steps it trains as much.
    """

    amount: float
    unit: Literal["minutes", "steps"]


class Clock:
    """Counts a run's steps until its budget is spent; work done before an interruption counts.

    Attributes:
        steps: finished.
        seconds: spent.
        spent: the share of the budget, in [0, 1].
        over: whether nothing is left.
    """

    def __init__(
        self,
        budget: Budget,
        *,
        seconds: float = 0.0,
        steps: int = 0,
        now: Callable[[], float] = time.perf_counter,
    ) -> None:
        """Start the clock.

        Args:
            budget: what may be spent.
            seconds: spent before an interruption.
            steps: finished before it.
            now: tells the time, in seconds since any moment.
        """
        self._budget = budget
        self._now = now
        self._began = now() - seconds
        self.steps = steps

    def __iter__(self) -> Iterator[int]:
        """Number the steps of this run, from 0, while something is left."""
        step = 0
        while not self.over:
            yield step
            step += 1
            self.steps += 1

    @property
    def seconds(self) -> float:
        """Seconds spent."""
        return self._now() - self._began

    @property
    def spent(self) -> float:
        """The share spent."""
        spent = self.steps if self._budget.unit == "steps" else self.seconds / 60
        return min(1.0, spent / self._budget.amount)

    @property
    def over(self) -> bool:
        """Whether nothing is left."""
        return self.spent >= 1


def rate(spent: float, step: int, *, warmup: int = 300) -> float:
    """Return the learning rate's share of its peak: up for some steps, then down to a floor."""
    return min(1.0, (step + 1) / warmup) * max(_FLOOR, 1 - spent)


class Log:
    """JSON lines: one record a line, appended."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def write(self, **record: float | str) -> None:
        """Append a record, and print it."""
        rounded = {k: round(v, 5) if isinstance(v, float) else v for k, v in record.items()}
        line = json.dumps(rounded)
        with self._path.open("a") as file:
            file.write(line + "\n")
        print(line, flush=True)
