"""Step times of a target machine, to tune for it on this machine."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from fluxfire.errors import BenchError
from fluxfire.reporting.statistics import StepKind


@dataclass(frozen=True, kw_only=True)
class Prices:
    """Seconds of each kind of step on the target machine, and of the work around the steps.

    Step times of a small model on a small machine say nothing about a large model on a GPU, where a
    hit costs almost nothing. But the decisions of a cache, and their effect on the pictures, do not
    depend on speed. Prices apply to caches only: other passes change the time of a step and not its
    kind.

    Attributes:
        computed: seconds of a fully computed step.
        reused: seconds of a step that reuses the reference.
        hit: seconds of a step that runs only the first block.
        around: seconds outside the steps, per edit.

    Raises:
        BenchError: the constructor got a value that is not above 0.
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
        """Return the seconds of an edit with steps of these kinds."""
        seconds_by_kind = asdict(self)
        steps: float = sum(seconds_by_kind[kind] * n for kind, n in Counter(kinds).items())
        return self.around + steps
