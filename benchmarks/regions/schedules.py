"""Which steps to skip on Spark, and how to predict them."""

from __future__ import annotations

from dataclasses import asdict

from fluxfire.bench.intervals import bootstrap
from fluxfire.bench.tables import format_measure
from regions.reference import difference
from regions.results import Row, load, markdown, where

_RUNS = ("schedules_on_spark.json", "schedules_on_spark_2.json")
"""Two runs on the same edits and noise; each row stands beside plain rows of its own run."""
_AGAINST = {
    "calibrated, 16 computed": "threshold 0.12, 8 + 2, cap 2, damped",
    "calibrated, 13 computed": "threshold 0.15, 6 + 2, cap 3, damped",
}
"""Schedules, and thresholds that compute as many steps."""


def schedules() -> str:
    """Caches and schedules on many edits, beside plain with as many steps or seconds."""
    first, second = map(load, _RUNS)
    again = {row["name"] for row in second["rows"]}
    table = []
    for result in (second, first):
        plain = {row["name"]: row for row in result["rows"]}
        for row in result["rows"]:
            if result is first and row["name"] in again:
                continue
            for what in ("as many steps", "as many seconds"):
                if (beside := row.get(f"beside {what}")) is None:
                    continue
                fewer = plain[f"plain, {beside['steps']} steps"]
                table.append(
                    (
                        row["name"],
                        f"{row['work']:.1f}",
                        _measure(row),
                        f"{beside['steps']}, {what}",
                        _measure(fewer),
                        difference(beside),
                    )
                )
    table.sort(key=lambda cells: _KINDS.index(next(k for k in _KINDS if cells[0].startswith(k))))
    head = (
        "", f"work, of {first['steps']} steps", "PSNR, dB: mean [95%] (worst)",
        "plain steps", "their PSNR", "difference [95%]",
    )  # fmt: skip
    commits = f"{where(first)} and, for the rows that it lacks, {second['commit']}"
    return (
        f"{markdown(head, table)}\n\n{first['examples']} held-out edits. {commits}.\n\n"
        f"{_schedules_against_thresholds(first)}"
    )


_KINDS = (
    "balanced", "fast", "calibrated", "published statistics", "threshold", "MagCache", "RegionE",
    "TeaCache", "Float8",
)  # fmt: skip
"""The order of the table, by how a name starts."""


def _schedules_against_thresholds(result: Row) -> str:
    rows = {row["name"]: row for row in result["rows"]}
    lines = []
    for schedule, threshold in _AGAINST.items():
        pairs = zip(rows[schedule]["each"], rows[threshold]["each"], strict=True)
        interval = bootstrap([a - b for a, b in pairs])
        if interval is not None:
            lines.append((schedule, threshold, difference(asdict(interval))))
    return markdown(("a schedule", "a threshold with as much work", "difference [95%]"), lines)


def _measure(row: Row) -> str:
    psnr = row["psnr"]
    return "{mean:.1f} [{low:.1f}, {high:.1f}] ({worst:.1f})".format(**psnr)


def predictors() -> str:
    """Ways to predict a skipped step, at three schedules: two by one run, the third by another."""
    result, third = load("predictors.json"), load("predictors_10.json")
    masks = result["schedules"] | third["schedules"]
    rows = {(row["way"], row["schedule"]): row for row in result["rows"] + third["rows"]}
    ways = list(dict.fromkeys(way for way, _ in rows))
    cells = [(way, *(format_measure(rows[way, n]["psnr"]) for n in masks)) for way in ways]
    head = ("", *(f"{n} of {result['steps']} computed" for n in masks))
    drawn = "\n".join(f"    {n}  {mask}" for n, mask in masks.items())
    return (
        f"{markdown(head, cells)}\n\nPSNR to plain in dB: mean [95%] (worst). The schedules "
        f"(C computed, . skipped):\n\n{drawn}\n\n{result['examples']} held-out edits. "
        f"{where(result)}; the last column commit {third['commit']}."
    )
