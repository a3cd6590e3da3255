"""Whole edits: stacks of passes beside eager."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from regions.results import Row, find, load, markdown, name_of, ratio, spread, where

_SIZES = ("presets.json", "presets_512.json")
"""What one run on one GPU measured, at each of two sizes."""


def summary() -> str:
    """A step and whole edits of the lists that compute every step."""
    rows = [row for row in load(_SIZES[0])["rows"] if not row["skipped"]]
    listed = [(name_of(row),) * 2 for row in rows if row["role"] != "fewer steps"]
    return _both_sizes("a step (1024 / 512)", _step, [[pair] for pair in listed])


def lossy() -> str:
    """Whole edits of what is lossy, each beside `faithful` at as many steps as it computed."""
    runs = [load(name)["rows"] for name in _SIZES]
    big, small = ({name_of(r): _twin(r, rows) for r in rows if r["lossy"]} for rows in runs)
    listed = [[(name, name), (big[name], small[name])] for name in big]
    return _both_sizes("steps computed (1024 / 512)", _computed, listed)


def _twin(row: Row, rows: Sequence[Row]) -> str:
    """Return the row with fewer steps that stands beside a lossy one.

    A run that was cut short did not note it. Then it is the row with the fewest steps that is not
    faster.
    """
    if row["beside_fewer_steps"] is not None:
        name: str = row["beside_fewer_steps"]["contender"]
        return name
    slower = [
        r
        for r in rows
        if r["role"] == "fewer steps" and r["edit"]["median"] >= row["edit"]["median"]
    ]
    return name_of(min(slower, key=lambda r: r["steps"]))


def _both_sizes(
    what: str, cell: Callable[[Row], str], listed: Sequence[Sequence[tuple[str, str]]]
) -> str:
    """Lay out rows of both sizes.

    Args:
        what: the head of the first column.
        cell: what stands there.
        listed: names of contenders at the first size and at the second; a second pair of an item
            is the list with fewer steps.
    """
    results = [load(name) for name in _SIZES]
    loads = [result["rows"][0]["workload"]["name"] for result in results]
    table = []
    for pairs in listed:
        for names in pairs:
            pair = [
                find(result["rows"], name, load_name)
                for result, name, load_name in zip(results, names, loads, strict=True)
            ]
            steps = " / ".join(f"{row['steps']}" for row in pair)
            name = names[0] if names[0] == names[1] else f"faithful with {steps} steps"
            edits = [
                f"{row['edit']['median']:.2f} s ({ratio(result['rows'], row, 'edit')})"
                for row, result in zip(pair, results, strict=True)
            ]
            peak = f"{pair[0]['peak_gib']:.1f} GiB"
            table.append([name, " / ".join(map(cell, pair)), *edits, peak])
    rows = [row for result in results for row in result["rows"]]
    apart = max(
        max(row["edit"]["max"] / middle, middle / row["edit"]["min"]) - 1
        for row in rows
        if (middle := row["edit"]["median"])
    )
    times = sorted({len(row["edit"]["seconds"]) for row in rows})
    counts = " or ".join(map(str, times))
    return (
        f"{markdown(('', what, *loads, 'peak memory'), table)}\n\nMedian of {counts} edits, all "
        f"within {apart:.1%} of it. Random weights of FLUX's size. {where(results[0])}."
    )


def _step(row: Row) -> str:
    return f"{row['step']['median'] * 1e3:.0f} ms"


def _computed(row: Row) -> str:
    return f"{row['steps'] - row['skipped']:.0f}"


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
            )
        )
    head = (
        "stack", "workload", "hits", "step without a cache, ms", "computed step, ms",
        "hit, ms (of a step)",
    )  # fmt: skip
    return f"{markdown(head, table)}\n\n{where(result)}."


def ladder() -> str:
    """Each pass alone and the stack, with memory and energy, beside another library."""
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
        "", "edit, s (× eager)", "computed step, ms (× eager)", "steps skipped", "GiB peak",
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
