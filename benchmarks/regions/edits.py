"""Whole edits: stacks of passes beside eager and rivals."""

from __future__ import annotations

from collections.abc import Sequence

from regions.results import Row, find, load, markdown, name_of, ratio, spread, where


def summary() -> str:
    """Steps and whole edits, in brief."""
    result = load("presets.json")
    rows = result["rows"]
    loads = list(dict.fromkeys(row["workload"]["name"] for row in rows))
    table = []
    for stack in dict.fromkeys(map(name_of, rows)):
        some = [find(rows, stack, workload) for workload in loads]
        first = some[0]
        left_out = " and ".join(f"{row['hits']:.0f}" for row in some) if first["hits"] else "0"
        table.append(
            [
                stack,
                f"{first['step']['median'] * 1e3:.0f} ms ({ratio(rows, first, 'step')})",
                left_out,
                *(f"{row['edit']['median']:.2f} s ({ratio(rows, row, 'edit')})" for row in some),
                f"{first['peak_gib']:.1f} GiB",
            ]
        )
    head = ("", "a step computed", "steps left out", *loads, "peak memory")
    apart = max(
        max(row["edit"]["max"] / middle, middle / row["edit"]["min"]) - 1
        for row in rows
        if (middle := row["edit"]["median"])
    )
    times = len(rows[0]["edit"]["seconds"])
    return (
        f"{markdown(head, table)}\n\nMedian of {times} edits, which lay within {apart:.1%} of "
        f"it. {where(result)}."
    )


def edits_detail(name: str) -> str:
    """Every row of a result with its spread."""
    result = load(name)
    rows = plain(result["rows"])
    table = []
    for row in rows:
        step, edit = row["step"], row["edit"]
        table.append(
            (
                name_of(row),
                row["workload"]["name"],
                spread(step),
                ratio(rows, row, "step"),
                f"{edit['median']:.2f}",
                ratio(rows, row, "edit"),
                f"{row['first_seconds'][0]:.1f}",
                f"{row['apply_gib']:+.2f}",
                f"{row['apply_peak_gib']:.2f}",
                f"{row['peak_gib']:.1f}",
            )
        )
    head = (
        "stack", "workload", "step, ms: median (spread)", "× eager", "edit, s", "× eager",
        "first run, s", "GiB added", "GiB peak of optimize", "GiB peak of the edit",
    )  # fmt: skip
    return f"{markdown(head, table)}\n\n{where(result)}."


def plain(rows: Sequence[Row]) -> list[Row]:
    """Leave out the stacks whose cache left steps out: with random weights, only timings."""
    return [row for row in rows if "cache" not in name_of(row)]


def hits(name: str) -> str:
    """What a cache's hits and misses cost, beside the same stack without it."""
    result = load(name)
    rows = result["rows"]
    table = []
    for row in rows:
        stack, _, cache = name_of(row).partition(" and cache, ")
        if not cache:
            continue
        stack = stack.removesuffix(",")
        without = find(rows, stack, row["workload"]["name"])["step"]["median"]
        hit = row["hit_step"]
        table.append(
            (
                stack,
                row["workload"]["name"],
                f"{row['hits']:.0f}",
                f"{without * 1e3:.0f}",
                f"{row['step']['median'] * 1e3:.0f}",
                f"{hit['median'] * 1e3:.1f} ({hit['median'] / without:.1%})" if hit else "",
                f"{row['edit']['median']:.2f} ({ratio(rows, row, 'edit')})",
            )
        )
    head = (
        "stack", "workload", "hits", "step without a cache, ms", "computed step, ms",
        "hit, ms (of a step)", "edit, s (× eager)",
    )  # fmt: skip
    return f"{markdown(head, table)}\n\n{where(result)}."


def ladder() -> str:
    """Each pass alone and the stack, with memory and energy, beside a rival."""
    result = load("bench.json")
    rows = [row for row in result["rows"] if not row["error"]]
    table = [
        (
            row["contender"],
            f"{row['edit']['median']:.2f} ({ratio(rows, row, 'edit')})",
            f"{row['step']['median'] * 1e3:.0f} ({ratio(rows, row, 'step')})",
            f"{row['hits']:.0f}",
            f"{row['peak_gib']:.1f}",
            f"{row['joules']:.0f}",
            f"{row['utilisation']:.0%}",
        )
        for row in rows
    ]
    head = (
        "", "edit, s (× eager)", "computed step, ms (× eager)", "steps left out", "GiB peak",
        "joules an edit", "GPU busy",
    )  # fmt: skip
    return f"{markdown(head, table)}\n\n{where(result)}."


def phases() -> str:
    """Where the time of a whole edit goes."""
    result = load("bench.json")
    names = list(result["rows"][0]["phases"])
    table = [
        (row["contender"], *(f"{row['phases'][n]['median'] * 1e3:.0f}" for n in names))
        for row in result["rows"]
        if not row["error"]
    ]
    return f"{markdown(('milliseconds', *names), table)}\n\n{where(result)}."


def main_job() -> str:
    """The report of one whole edit by the command line."""
    report = load("main_job.json")
    rows = [
        (
            f"`{p['configuration']}`",
            p["exactness"],
            f"{p['change']['count']} {p['change']['what']}",
            f"{p['change']['bytes']:+d}",
            f"{p['seconds']:.2f}",
        )
        for p in report["passes"]
    ]
    run = report["generations"][-1]
    table = markdown(("pass", "exactness", "changed", "bytes", "applied in, s"), rows)
    return (
        f"{table}\n\n{run['steps']} steps in {run['seconds']:.1f} s, the compilation of "
        f"{run['compiles']} graphs included; {run['seconds_a_step'] * 1e3:.0f} ms a step "
        f"(median), {run['graph_breaks']} graph breaks.\n\n{where(report)}."
    )
