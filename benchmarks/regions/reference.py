"""The reference, once in a while; and quality against computed work."""

from __future__ import annotations

from fluxfire.bench.intervals import Interval
from fluxfire.bench.tables import format_measure
from regions.results import Row, find, load, markdown, ratio, where


def reference(name: str, *workloads: str) -> str:
    """Steps that compute, reuse and hit, and whole edits, with Spark's schedules."""
    result = load(name)
    rows = [
        row
        for row in result["rows"]
        if row["workload"]["name"] in workloads and not _withdrawn(row["contender"])
    ]
    table = []
    for row in rows:
        whole = find(rows, "eager", row["workload"]["name"])["step"]["median"]
        cells = [
            f"{row[kind]['median'] * 1e3:.0f} ({whole / row[kind]['median']:.2f}×)"
            if row[kind]
            else ""
            for kind in ("step", "reuse_step", "hit_step")
        ]
        left = f"{row['reuses']:.0f} + {row['hits']:.0f}" if row["scheduled"] else ""
        edit = f"{row['edit']['median']:.2f} ({ratio(rows, row, 'edit')})"
        if row["compiles"]:
            edit = "compiled meanwhile"
        name = row["workload"]["name"]
        table.append((row["contender"], name, *cells, left, edit, f"{row['peak_gib']:.1f}"))
    head = (
        "", "workload", "computed step, ms (× eager's)", "reuse step", "hit",
        "reuses + hits", "edit, s", "GiB peak",
    )  # fmt: skip
    return f"{markdown(head, table)}\n\n{where(result)}."


def _withdrawn(name: str) -> bool:
    """Whether a row was measured with settings that no preset has any more."""
    return name in ("balanced", "fast") or name.startswith("caches 0.27")


def reference_on_spark() -> str:
    """What ways to reuse the reference do to Spark's edits."""
    result = load("reference_on_spark.json")
    table = [
        (
            row["way"],
            f"{row['refreshes']:.1f}" if "spacing=" in "".join(row["passes"]) else "",
            "" if row["work"] is None else f"{row['work']:.1f}",
            f"{row['success']:.1%}",
            *(
                ("same",) * 2
                if row["way"] == "plain"
                else (
                    f"{row['psnr']['mean']:.1f} ({row['psnr']['worst']:.1f})",
                    f"{row['psnr']['fifth']:.1f}",
                )
            ),
        )
        for row in result["rows"]
    ]
    head = (
        "", f"refreshes, of {result['steps']} steps", "steps of work", "edits that succeed",
        "PSNR to plain, dB: mean (worst)", "reached by 95 of 100",
    )  # fmt: skip
    return f"{markdown(head, table)}\n\n{result['examples']} held-out edits. {where(result)}."


def frontier() -> str:
    """Each cache on Spark, beside plain with as many steps as it computed."""
    result = load("frontier.json")
    table = []
    for row, rows in frontier_rows():
        if (beside := row["beside_fewer_steps"]) is None:
            continue
        mine, other = row["quality"]["eager"], rows[beside["contender"]]["quality"]["eager"]
        table.append(
            (
                row["contender"],
                f"{row['work']:.1f}",
                *(format_measure(mine[name]) for name in ("psnr", "edited")),
                f"{beside['steps']}",
                *(format_measure(other[name]) for name in ("psnr", "edited")),
                difference(beside["psnr"]),
                Interval(**beside["psnr"]).verdict,
            )
        )
    head = (
        "", f"work, of {result['steps']} steps", "PSNR, dB: mean [95%] (worst)", "inside the edit",
        "plain steps", "their PSNR", "their inside", "difference [95%]", "than fewer steps",
    )  # fmt: skip
    return f"{markdown(head, table)}\n\n{result['examples']} held-out edits. {where(result)}."


def frontier_rows() -> list[tuple[Row, dict[str, Row]]]:
    """Return each row of the frontier, with the rows of its run by name.

    RegionE runs in bfloat16 alone, so it has a run of its own.
    """
    found = []
    for name in ("frontier.json", "regione.json"):
        rows = {row["contender"]: row for row in load(name)["rows"] if not row["error"]}
        found += [(row, rows) for row in rows.values()]
    return found


def difference(one: Row) -> str:
    """Write a paired difference in dB with its interval."""
    return f"{one['mean']:+.1f} [{one['low']:+.1f}, {one['high']:+.1f}]"
