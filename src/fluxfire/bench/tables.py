"""A benchmark's result as tables for the terminal, from its JSON alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from statistics import median
from typing import Any

from fluxfire.bench.contenders import COMPILED, EAGER
from fluxfire.text import human_seconds, table

Row = dict[str, Any]
Table = tuple[str, Sequence[str], list[tuple[str, ...]]]
"""A title, the names of the columns, and the cells."""

_LEFT_OUT = ("reuse_step", "hit_step")
_SAME = 99.995  # dB; pictures that differ in no bit are told as 100


def as_text(result: dict[str, Any]) -> str:
    """Lay a whole result out."""
    parts = [f"{title}\n\n{table(head, rows)}" for title, head, rows in tables(result)]
    parts += [f"note: {note}" for note in result["notes"]]
    parts += [f"{row['contender']}: {row['error']}" for row in result["rows"] if row["error"]]
    parts += [
        f"{row['contender']}: compiled {row['compiles']} times within the edits that count"
        for row in result["rows"]
        if row.get("compiles")
    ]
    return "\n\n".join(parts)


def tables(result: dict[str, Any]) -> list[Table]:
    """Return the tables of a result: speed, phases, and quality beside each control."""
    done = [row for row in result["rows"] if "edit" in row]
    if not done:
        return []
    found = [_speed(done), _phases(done), *_qualities(done)]
    several = len({_load(row) for row in done}) > 1
    return found if several else [_without_workload(one) for one in found]


def _without_workload(one: Table) -> Table:
    """Say in the title what would be the same in every line."""
    title, head, lines = one
    (load,) = {line[1] for line in lines}
    return f"{title}: {load}", (head[0], *head[2:]), [(line[0], *line[2:]) for line in lines]


def faster(rows: Sequence[Row], row: Row, control: str) -> float | None:
    """How many times as fast as a control a row is: the median over the same examples."""
    base = next((r for r in rows if (r["contender"], _load(r)) == (control, _load(row))), None)
    if base is None:
        return None
    ours, theirs = row["edit"]["seconds"], base["edit"]["seconds"]
    if len(ours) != len(theirs):  # one of them was cut short
        return float(base["edit"]["median"] / row["edit"]["median"])
    return float(median(b / a for a, b in zip(ours, theirs, strict=True)))


def _times(ratio: float | None) -> str:
    return "-" if ratio is None else f"{ratio:.2f}x"


def spread(sample: dict[str, Any] | None) -> str:
    """Write a median with its least and greatest."""
    if sample is None:
        return "-"
    least, most = human_seconds(sample["min"]), human_seconds(sample["max"])
    return f"{human_seconds(sample['median'])} ({least} to {most})"


def decibels(value: float) -> str:
    """Write a PSNR."""
    return "same" if value > _SAME else f"{value:.1f}"


def _load(row: Row) -> str:
    name: str = row["workload"]["name"]
    return name


def _names(row: Row) -> tuple[str, str]:
    failed = " (failed later)" if row["error"] else ""
    return f"{row['contender']}{failed}", _load(row)


def _speed(rows: Sequence[Row]) -> Table:
    head = (
        "contender", "workload", "edit: median (spread)", "× eager", "× compiled",
        "computed step", "reuse", "hit", "reuses + hits", "first run, 2 steps", "peak GiB",
        "J an edit", "GPU busy",
    )  # fmt: skip
    lines: list[tuple[str, ...]] = [
        (
            *_names(row),
            spread(row["edit"]),
            _times(faster(rows, row, EAGER)),
            _times(faster(rows, row, COMPILED)),
            human_seconds(row["step"]["median"]) if row["step"] else "-",
            *(human_seconds(row[k]["median"]) if row.get(k) else "-" for k in _LEFT_OUT),
            _hits(row),
            human_seconds(row["first_seconds"][0]) if row["first_seconds"] else "-",
            f"{row['peak_gib']:.1f}" if row["peak_gib"] else "-",
            "-" if row["joules"] is None else f"{row['joules']:.0f}",
            "-" if row["utilisation"] is None else f"{row['utilisation']:.0%}",
        )
        for row in rows
    ]
    return "Speed", head, lines


def _hits(row: Row) -> str:
    if row["hits"] is None:
        return "?"  # a rival that does not tell
    if not any(row.get(kind) for kind in _LEFT_OUT):
        return "-"
    mark = "*" if row["scheduled"] else ""
    reuses = f"{row['reuses']:.1f} + " if row.get("reuse_step") else ""
    return f"{reuses}{row['hits']:.1f}{mark} of {row['workload']['steps']}"


def _phases(rows: Sequence[Row]) -> Table:
    names = list(dict.fromkeys(name for row in rows for name in row["phases"]))
    lines = []
    for row in rows:
        spent = [row["phases"].get(name) for name in names]
        lines.append((*_names(row), *(human_seconds(s["median"]) if s else "-" for s in spent)))
    return "Where an edit's time goes (medians)", ("contender", "workload", *names), lines


def _qualities(rows: Sequence[Row]) -> Iterator[Table]:
    for control in (EAGER, COMPILED):
        judged = [r for r in rows if control in r["quality"] and r["contender"] != control]
        if not judged:
            continue
        lines = [(*_names(row), *_quality(row["quality"][control])) for row in judged]
        head = (
            "contender", "workload", "pictures", "PSNR, dB: mean (worst)", "SSIM", "FLIP", "right",
        )  # fmt: skip
        yield f"Pictures beside those of {control}", head, lines


def _quality(told: dict[str, Any]) -> tuple[str, ...]:
    psnr, right = told["psnr"], told["success"]
    cells = [f"{told['n']}", f"{decibels(psnr['mean'])} ({decibels(psnr['worst'])})"]
    for name in ("ssim", "flip"):
        one = told[name]
        cells.append(f"{one['mean']:.4f} ({one['worst']:.4f})" if one else "-")
    return (*cells, "-" if right is None else f"{right:.1%}")
