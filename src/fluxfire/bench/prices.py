"""What steps take on another machine: quality is found here, speed is told of there."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from fluxfire.errors import BenchError
from fluxfire.reporting.statistics import StepKind


@dataclass(frozen=True, kw_only=True)
class Prices:
    """Seconds of a step, by what caches leave out of it, and of what surrounds the steps.

    A small model's steps on a small machine do not cost what a large model's do on a GPU: there a
    hit is all but free, and here it is not. What caches decide, though, and what that does to
    pictures, is the same at any speed. Only caches are priced: what other passes make of a step's
    time is not seen by its kind.

    Attributes:
        computed: a step in full.
        reused: a step that reuses the reference.
        hit: a step that runs the first block alone.
        around: all outside the steps, of one edit.

    Raises:
        BenchError: when made: something is not above 0.
    """

    computed: float
    reused: float
    hit: float
    around: float

    def __post_init__(self) -> None:
        for name, seconds in asdict(self).items():
            if not seconds > 0:
                raise BenchError(f"prices: {name}={seconds!r}; it must be above 0, in seconds")

    def of(self, kinds: Sequence[StepKind]) -> float:
        """Return the seconds of an edit with such steps."""
        each = asdict(self)
        steps: float = sum(each[kind] * n for kind, n in Counter(kinds).items())
        return self.around + steps
