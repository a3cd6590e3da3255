"""A budget of minutes that learning rates follow, and the log of what happened in it."""

from __future__ import annotations

import json
import time
from pathlib import Path

_FLOOR = 0.02  # of the learning rate, as a share of its peak


class Clock:
    """How much of a budget is spent; work done before an interruption counts.

    Attributes:
        spent: the share in [0, 1].
        over: whether nothing is left.
    """

    def __init__(self, minutes: float, *, before: float = 0.0) -> None:
        self._seconds = minutes * 60
        self._began = time.perf_counter() - before

    @property
    def seconds(self) -> float:
        """Seconds spent."""
        return time.perf_counter() - self._began

    @property
    def spent(self) -> float:
        """The share spent."""
        return min(1.0, self.seconds / self._seconds)

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
        print(line, flush=True)  # noqa: T201 - training talks to a terminal
