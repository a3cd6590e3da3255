"""The record of all edits made to one pipeline."""

from __future__ import annotations

from abc import ABC, abstractmethod

from fluxfire.edits.log import EditLog


class Record(ABC):
    """The edits made to one pipeline. The pipeline's conductor holds it.

    `reporting.applications.Applications` is the one subclass. It also holds passes and reports,
    which this package must not import.
    """

    @property
    @abstractmethod
    def transactions(self) -> list[EditLog]:
        """The logs of edits, in order. To restore the pipeline, undo them from the last one."""

    @property
    def irreversible(self) -> list[str]:
        """Reasons why the pipeline cannot be restored; empty while it can."""
        return [why for transaction in self.transactions for why in transaction.irreversible]
