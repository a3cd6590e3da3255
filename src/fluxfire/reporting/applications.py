"""What was applied to one pipeline: edits to undo, passes, and what the report says of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from typing_extensions import override

from fluxfire.edits.log import EditLog
from fluxfire.protocol import Pass
from fluxfire.reporting.report import PassReport
from fluxfire.reporting.statistics import Statistics
from fluxfire.runtime.conductor import Conductor
from fluxfire.runtime.record import Record

Facts = Mapping[str, Callable[[], Mapping[str, object]]]


@dataclass(eq=False)
class Application:
    """What one call did to a pipeline.

    Attributes:
        transaction: its edits.
        passes: in order; none until all of them are applied.
        reports: what each pass did.
        facts: by the name of a pass, a function that returns facts for the report.
    """

    transaction: EditLog
    passes: tuple[Pass, ...] = ()
    reports: tuple[PassReport, ...] = ()
    facts: Facts = field(default_factory=dict)


@dataclass(eq=False)
class Applications(Record):
    """Everything that was applied to one pipeline.

    Attributes:
        statistics: of the pipeline's generations.
        applied: in order; undone from the last to the first, they give the plain pipeline.
        warmup_seconds: of all warm-ups; None before the first.
    """

    statistics: Statistics = field(default_factory=Statistics)
    applied: list[Application] = field(default_factory=list)
    warmup_seconds: float | None = None

    @classmethod
    def of(cls, conductor: Conductor) -> Applications:
        """Return a conductor's record."""
        assert isinstance(conductor.record, cls)  # noqa: S101 - `optimize` made it
        return conductor.record

    @property
    @override
    def transactions(self) -> list[EditLog]:
        return [one.transaction for one in self.applied]

    @property
    def passes(self) -> list[Pass]:
        """The passes that the pipeline carries, in order."""
        return [pass_ for one in self.applied for pass_ in one.passes]

    @property
    def reports(self) -> list[PassReport]:
        """What each of them did."""
        return [report for one in self.applied for report in one.reports]

    @property
    def facts(self) -> Facts:
        """Functions that return facts for the report, by the name of a pass."""
        return {name: make for one in self.applied for name, make in one.facts.items()}
