"""The record of everything applied to one pipeline: edits, passes, and facts for the report."""

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
    """What one call of `optimize` or `warmup` did to a pipeline.

    Attributes:
        transaction: the edits.
        passes: the passes, in order; empty until the call has applied all of them.
        reports: one report for each pass.
        facts: for a pass's name, a function that returns facts for the report.
    """

    transaction: EditLog
    passes: tuple[Pass, ...] = ()
    reports: tuple[PassReport, ...] = ()
    facts: Facts = field(default_factory=dict)


@dataclass(eq=False)
class Applications(Record):
    """Everything applied to one pipeline.

    Attributes:
        statistics: statistics of the pipeline's generations.
        applied: the applications in order; `restore` undoes them from the last to the first.
        warmup_seconds: total duration of all warm-ups; None before the first.
    """

    statistics: Statistics = field(default_factory=Statistics)
    applied: list[Application] = field(default_factory=list)
    warmup_seconds: float | None = None

    @classmethod
    def of(cls, conductor: Conductor) -> Applications:
        """Return the record of a conductor."""
        assert isinstance(conductor.record, cls)  # noqa: S101 - `optimize` creates no other
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
        """The reports of these passes."""
        return [report for one in self.applied for report in one.reports]

    @property
    def facts(self) -> Facts:
        """For a pass's name, a function that returns facts for the report."""
        return {name: make for one in self.applied for name, make in one.facts.items()}
