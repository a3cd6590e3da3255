"""What was applied to one pipeline."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from fluxfire.edits import EditLog
from fluxfire.protocol import Pass
from fluxfire.reporting.report import PassReport
from fluxfire.reporting.statistics import Statistics

Facts = Mapping[str, Callable[[], Mapping[str, object]]]


@dataclass(eq=False)
class Application:
    """What one call did to a pipeline.

    Attributes:
        transaction: its edits.
        passes: in order; none until all of them are applied.
        reports: what each of them did.
        facts: by the name of a pass, what makes the facts that it tells the report.
    """

    transaction: EditLog
    passes: tuple[Pass, ...] = ()
    reports: tuple[PassReport, ...] = ()
    facts: Facts = field(default_factory=dict)


@dataclass(eq=False)
class Record:
    """What was applied to one pipeline; kept on its conductor.

    Attributes:
        statistics: of its generations.
        applied: in order; undone from the last to the first, they give the plain pipeline back.
        warmup_seconds: of all warm-ups; None before the first.
    """

    statistics: Statistics = field(default_factory=Statistics)
    applied: list[Application] = field(default_factory=list)
    warmup_seconds: float | None = None

    @property
    def passes(self) -> list[Pass]:
        """The passes that the pipeline carries, in order."""
        return [p for one in self.applied for p in one.passes]

    @property
    def reports(self) -> list[PassReport]:
        """What each of them did."""
        return [report for one in self.applied for report in one.reports]

    @property
    def facts(self) -> Facts:
        """What makes the facts that they tell the report, by name."""
        return {name: make for one in self.applied for name, make in one.facts.items()}

    @property
    def transactions(self) -> list[EditLog]:
        """Their edits, in order."""
        return [one.transaction for one in self.applied]

    @property
    def irreversible(self) -> list[str]:
        """Why the plain pipeline cannot be had back; empty while it can."""
        return [why for transaction in self.transactions for why in transaction.irreversible]
