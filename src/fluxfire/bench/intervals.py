"""Bootstrap intervals: how far a mean over a few examples can be trusted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

CONFIDENCE = 0.95
FEWEST = 5
"""Examples that a claim needs. If chance decides, all of 5 examples are better in one of 32 cases;
with 4 examples it is one of 16, which is no evidence at 95%."""
_RESAMPLES = 2000


@dataclass(frozen=True)
class Interval:
    """A mean over examples and its 95% interval.

    Attributes:
        mean: over the examples.
        low: lower end of the interval.
        high: upper end of the interval.
        n: number of examples.
    """

    mean: float
    low: float
    high: float
    n: int

    @property
    def above_zero(self) -> bool:
        """Whether the whole interval lies above 0, with at least `FEWEST` examples behind it."""
        return self.n >= FEWEST and self.low > 0

    @property
    def verdict(self) -> str:
        """What a difference shows, in words: `"better"` where it lies above 0."""
        if self.n < FEWEST:
            return f"{self.n} examples are too few to tell"
        if self.low > 0:
            return "better"
        return "worse" if self.high < 0 else "no difference shown"


def bootstrap(values: Sequence[float]) -> Interval | None:
    """Return the mean of values with its percentile bootstrap interval (Efron, 1979).

    To compare two methods on the same examples, pass the differences example by example: that is
    the paired interval. The same values always give the same interval.

    Args:
        values: one for each example.

    Returns:
        None for fewer than two values: one value says nothing about the spread.
    """
    if len(values) < 2:  # noqa: PLR2004 - a spread needs two
        return None
    found = np.asarray(values, dtype=np.float64)
    picks = np.random.default_rng(0).integers(0, len(found), (_RESAMPLES, len(found)))
    tail = 100 * (1 - CONFIDENCE) / 2
    low, high = np.percentile(found[picks].mean(axis=1), [tail, 100 - tail])
    return Interval(float(found.mean()), float(low), float(high), len(found))
