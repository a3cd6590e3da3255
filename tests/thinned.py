"""Every k-th case of a large table, so that the suite ends in time on a busy machine.

`FLUXFIRE_ALL_CASES=1` runs all of them: before a release, and where a row or a column changed.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from typing import Any, TypeVar

import pytest

ALL = bool(os.environ.get("FLUXFIRE_ALL_CASES"))
Row, Column = TypeVar("Row"), TypeVar("Column")


def thinned(rows: Iterable[Row], columns: Sequence[Column], every: int) -> list[tuple[Row, Column]]:
    """Return the cases of a table: of each row and each column, one of `every`.

    The cases lie on diagonals, so that no row and no column of at least that length goes untried.
    With 3: row 0 has columns 0, 3, 6; row 1 has columns 2, 5, 8; row 2 has columns 1, 4, 7.
    """
    return [
        (row, column)
        for i, row in enumerate(rows)
        for j, column in enumerate(columns)
        if ALL or (i + j) % every == 0
    ]


def half(cases: Sequence[Row], which: int) -> Sequence[Row]:
    """Return every other case; two tests of different `which`, 0 and 1, share all of them."""
    return cases if ALL else cases[which::2]


exhaustive = pytest.mark.skipif(not ALL, reason="takes minutes: FLUXFIRE_ALL_CASES=1 runs it")
"""Marks a test that runs only where all cases are wanted."""


def names(value: Any) -> str:
    """Return a value's part of a test's id: a function's name, or the text of something else."""
    return getattr(value, "__name__", None) or str(value)
