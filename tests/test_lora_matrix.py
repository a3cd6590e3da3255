"""The table of what people do with a LoRA under every pass: no cell is wrong, or out of date."""

from __future__ import annotations

import numpy as np
import pytest

import lora_matrix
from lora_matrix import BEFORE, COLUMNS, EVENTS, LOSS, ROWS
from thinned import exhaustive


@pytest.fixture(scope="module")
def committed():
    """The table of the page: for each column, the cell of each row, and the reasons by number."""
    lines = lora_matrix.committed().splitlines()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if "|" in line]
    head, _, *body = rows
    cells = {name: {row[0]: row[i] for row in body} for i, name in enumerate(head) if i}
    return cells, dict(line.split(". ", 1) for line in lines if line[:1].isdigit())


def test_the_table_has_every_column_and_row(committed):
    cells, _ = committed
    assert list(cells) == [column.name for column in COLUMNS]
    assert all(list(of) == list(ROWS) for of in cells.values())


SLOW = {"`Compile`": [pytest.mark.slow, exhaustive], "`MegaCache`": [pytest.mark.slow]}
"""Columns that compile. `MegaCache` compiles the same, and is tried for every change."""
CASES = [
    pytest.param(column, marks=SLOW.get(column.name, []), id=column.name.strip("`"))
    for column in COLUMNS
]


def test_what_compiles_is_marked_slow():
    assert {column.name for column in COLUMNS if column.slow} == {*SLOW}


@pytest.mark.parametrize("column", CASES)
def test_a_column_says_what_happens(column, committed):
    cells, reasons = committed
    made = dict(lora_matrix.column(column))
    assert list(made) == [*BEFORE, *EVENTS]
    assert {row for row, said in made.items() if not said.startswith(("right", "refused: "))} == (
        set()
    )
    for row, said in made.items():
        written = cells[column.name][row]
        if written.startswith("refused"):
            number = written.removeprefix("refused (").removesuffix(")")
            written = f"refused: {reasons[number]}"
        assert said == written, row


def test_the_plain_pipeline_shows_each_thing():
    """Else a pass that ignores it would look right."""
    pictures = lora_matrix.expected(lora_matrix.picture)
    without = lora_matrix.picture(lora_matrix.small())
    rows = list(EVENTS)
    before = dict(zip(rows, [without, *(pictures[row] for row in rows)], strict=False))
    same = {row for row in rows if np.abs(pictures[row] - before[row]).max() < LOSS}
    assert same == {"`fuse_lora`", "`unfuse_lora`"}
    assert np.abs(pictures["`unload_lora_weights`"] - without).max() < 1e-5
    for row in BEFORE:
        assert np.abs(pictures[row] - without).max() > LOSS


def test_a_cell_can_be_wrong():
    plain = np.zeros((2, 2))
    assert lora_matrix.cell(plain + 0.5, plain, 0.1) == "wrong by 0.5"
    assert lora_matrix.cell(plain[:1], plain, 0.1) == "wrong: other sizes"
    assert lora_matrix.cell(plain + 0.05, plain, 0.1) == "right"
