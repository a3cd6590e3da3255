"""Committed results: reading them, and saying what was measured where."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fluxfire.bench import load_result

RESULTS = Path(__file__).parent.parent / "results"
Row = dict[str, Any]


FORMER_FAST = "published statistics, 6 + 2, cap 3, 13 computed"
"""What the preset `fast` was when these results were measured."""
_WITH_FORMER_FAST = ("frontier.json", "schedules_on_spark.json")


def load(name: str) -> Row:
    """Read a committed result by the name of its file; a preset that has changed is described."""
    result = load_result(RESULTS / name)
    if name in _WITH_FORMER_FAST:
        for row in result["rows"]:
            for key in ("contender", "name"):
                if row.get(key) == "fast":
                    row[key] = FORMER_FAST
        families = result.get("families", {})
        if families.pop("fast", None):
            families[FORMER_FAST] = FORMER_FAST
    return result


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Lay a table out in Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def where(result: Row) -> str:
    """Say on what a result was measured."""
    facts = result["environment"]
    packages = facts["packages"]
    commit, *dirty = result["commit"].split("-")
    return (
        f"{facts['gpu'] or 'CPU'}, torch {packages['torch']}, diffusers {packages['diffusers']}, "
        f"{result['when'][:10]}, commit {'-'.join([commit[:12], *dirty])}"
    )


def name_of(row: Row) -> str:
    """Return what a row calls who ran; older results say stack."""
    name: str = row.get("contender") or row["stack"]
    return name


def find(rows: Sequence[Row], stack: str, workload: str) -> Row:
    """Return the row of a stack on a workload."""
    return next(r for r in rows if name_of(r) == stack and r["workload"]["name"] == workload)


def ratio(rows: Sequence[Row], row: Row, what: str) -> str:
    """Say how many times faster than eager a row is."""
    eager = find(rows, "eager", row["workload"]["name"])
    return f"{eager[what]['median'] / row[what]['median']:.2f}×"


def spread(sample: Row) -> str:
    """Milliseconds: the median, and from the least to the most."""
    least, middle, most = (sample[k] * 1e3 for k in ("min", "median", "max"))
    return f"{middle:.1f} ({least:.1f} to {most:.1f})"
