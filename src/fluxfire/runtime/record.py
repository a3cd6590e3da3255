"""What was changed on one pipeline, so that it can be undone."""

from __future__ import annotations

from abc import ABC, abstractmethod

from fluxfire.edits.log import EditLog


class Record(ABC):
    """The edits made to one pipeline; its conductor keeps them.

    Whoever applies passes derives from this, and keeps there what it wants to remember of them.
    """

    @property
    @abstractmethod
    def transactions(self) -> list[EditLog]:
        """The edits, in order; undone from the last to the first, they give the plain pipeline."""

    @property
    def irreversible(self) -> list[str]:
        """Why the plain pipeline cannot be had back; empty while it can."""
        return [why for transaction in self.transactions for why in transaction.irreversible]
