"""Finds the best steps to skip for one model: record plain edits, propose, decide by whole edits.

- `recording.py`: a pass that records inner products of what the blocks add at each step.
- `proposing.py`: from them, the schedule of least expected error for each number of computed steps.
- `calibrating.py`: whole edits decide between proposals, and confirm the choice on other edits.
- `journal.py`: keeps what was measured in a folder, so that a calibration can go on.
"""

from __future__ import annotations

from fluxfire.bench.calibration.calibrating import budgets

__all__ = ["budgets"]
