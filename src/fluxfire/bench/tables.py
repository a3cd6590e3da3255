"""Formats a benchmark's JSON result as tables for the terminal, and as CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Sequence
from statistics import median
from typing import Any

from fluxfire.bench.contenders import COMPILED, EAGER, shown_name
from fluxfire.bench.intervals import Interval
from fluxfire.text import human_seconds, table

Row = dict[str, Any]
Table = tuple[str, Sequence[str], list[tuple[str, ...]]]
"""A title, the names of the columns, and the cells."""

BUSY = 0.05
"""Largest relative change of the first contender's median that counts as a quiet machine."""
_TIMES = ("Speed", "Where an edit's time goes (medians)")
_SKIPPED = ("reuse_step", "hit_step")
_SAME = 99.995  # dB; pictures that differ in no bit have 100


def as_text(result: dict[str, Any]) -> str:
    """Format a whole result as text."""
    parts = [f"{title}\n\n{table(head, rows)}" for title, head, rows in tables(result)]
    parts += [f"note: {note}" for note in (*result["notes"], *remarks(result["rows"]))]
    failed = [row for row in result["rows"] if row["error"]]
    parts += [f"{shown_name(row['contender'])}: {row['error']}" for row in failed]
    return "\n\n".join(parts)


def remarks(rows: Sequence[Row]) -> Iterator[str]:
    """Yield warnings for readers of the tables: a busy machine, methods that skipped nothing."""
    for row in rows:
        name, moved = shown_name(row["contender"]), row.get("moved")
        if is_busy(row):
            yield (
                f"this machine was busy: the median edit of {name} moved by {moved:+.0%} from its "
                f"first turn to its last; do not trust differences of that size"
            )
        if row.get("compiles"):
            yield f"{name} compiled {row['compiles']} times within the edits that count"
        if row.get("may_skip") and row.get("skipped") == 0 and not row.get("reuses"):
            yield (
                f"{name} never skipped a step of {row['steps']}: its row shows only its overhead"
            )


def is_busy(row: Row) -> bool:
    """Whether the first contender's row shows that the machine's speed changed."""
    moved: float = row.get("moved") or 0.0
    return abs(moved) > BUSY


def tables(result: dict[str, Any]) -> list[Table]:
    """Return the tables of a result: speed, lossy rows against fewer steps, phases, quality."""
    done = [row for row in result["rows"] if "edit" in row]
    if not done:
        return []
    found = [_speed(done), *_fewer_steps(done), _phases(done), *_qualities(done)]
    if any(map(is_busy, done)):
        found = [
            (f"{title} (this machine was busy)" if title in _TIMES else title, head, lines)
            for title, head, lines in found
        ]
    several = len({_workload_name(row) for row in done}) > 1
    return found if several else [_without_workload(one) for one in found]


def as_csv(result: dict[str, Any]) -> str:
    """Format a result as CSV: a line for each contender and workload, in seconds and dB."""
    file = io.StringIO()
    lines = csv.DictWriter(file, list(_CSV), lineterminator="\n")
    lines.writeheader()
    for row in result["rows"]:
        lines.writerow({name: _cell(row, path) for name, path in _CSV.items()})
    return file.getvalue()


_CSV: dict[str, tuple[str, ...]] = {
    "contender": ("contender",),
    "role": ("role",),
    "workload": ("workload", "name"),
    "steps": ("steps",),
    "work": ("work",),
    "skipped": ("skipped",),
    "edit_seconds": ("edit", "median"),
    "edit_seconds_min": ("edit", "min"),
    "edit_seconds_max": ("edit", "max"),
    "step_seconds": ("step", "median"),
    "hit_seconds": ("hit_step", "median"),
    "reuse_seconds": ("reuse_step", "median"),
    "first_seconds": ("first_seconds", "0"),
    "peak_gib": ("peak_gib",),
    "joules": ("joules",),
    **{
        f"{measure}_{which}": ("quality", EAGER, measure, which)
        for measure in ("psnr", "edited", "ssim", "flip")
        for which in ("mean", "worst")
    },
    "psnr_low": ("quality", EAGER, "psnr", "interval", "0"),
    "psnr_high": ("quality", EAGER, "psnr", "interval", "1"),
    "right": ("quality", EAGER, "success"),
    "fewer_steps": ("beside_fewer_steps", "steps"),
    "beside_fewer_mean": ("beside_fewer_steps", "psnr", "mean"),
    "beside_fewer_low": ("beside_fewer_steps", "psnr", "low"),
    "beside_fewer_high": ("beside_fewer_steps", "psnr", "high"),
    "error": ("error",),
}
"""Columns of the CSV, with each value's path in a row of the JSON."""


def _cell(row: Row, path: Sequence[str]) -> Any:
    value: Any = row
    for key in path:
        if isinstance(value, list):
            value = value[int(key)] if int(key) < len(value) else None
        else:
            value = (value or {}).get(key)
    return value


def _without_workload(one: Table) -> Table:
    """Move a workload that all lines share from the lines into the title."""
    title, head, lines = one
    (load,) = {line[1] for line in lines}
    return f"{title}: {load}", (head[0], *head[2:]), [(line[0], *line[2:]) for line in lines]


def speedup(rows: Sequence[Row], row: Row, control: str) -> float | None:
    """Return a row's speedup over a control: the median over the same examples."""
    base = next(
        (r for r in rows if (r["contender"], _workload_name(r)) == (control, _workload_name(row))),
        None,
    )
    if base is None:
        return None
    ours, theirs = row["edit"]["seconds"], base["edit"]["seconds"]
    if len(ours) != len(theirs):  # one of them stopped early
        return float(base["edit"]["median"] / row["edit"]["median"])
    return float(median(b / a for a, b in zip(ours, theirs, strict=True)))


def _format_speedup(ratio: float | None) -> str:
    return "-" if ratio is None else f"{ratio:.2f}x"


def format_spread(sample: dict[str, Any] | None) -> str:
    """Format a median with its minimum and maximum."""
    if sample is None:
        return "-"
    least, most = human_seconds(sample["min"]), human_seconds(sample["max"])
    return f"{human_seconds(sample['median'])} ({least} to {most})"


def format_decibels(value: float) -> str:
    """Format a PSNR."""
    return "same" if value > _SAME else f"{value:.1f}"


def _workload_name(row: Row) -> str:
    name: str = row["workload"]["name"]
    return name


def _names(row: Row) -> tuple[str, str]:
    failed = " (failed later)" if row["error"] else ""
    return f"{shown_name(row['contender'])}{failed}", _workload_name(row)


def _speed(rows: Sequence[Row]) -> Table:
    head = (
        "contender",
        "workload",
        "edit: median (spread)",
        "× plain",
        "× compiled",
        "computed step",
        "reuse",
        "hit",
        "steps computed",
        "first run, 2 steps",
        "peak GiB",
        "J an edit",
        "GPU busy",
    )
    lines: list[tuple[str, ...]] = [
        (
            *_names(row),
            format_spread(row["edit"]),
            _format_speedup(speedup(rows, row, EAGER)),
            _format_speedup(speedup(rows, row, COMPILED)),
            human_seconds(row["step"]["median"]) if row["step"] else "-",
            *(human_seconds(row[k]["median"]) if row.get(k) else "-" for k in _SKIPPED),
            _computed(row),
            human_seconds(row["first_seconds"][0]) if row["first_seconds"] else "-",
            f"{row['peak_gib']:.1f}" if row["peak_gib"] else "-",
            "-" if row["joules"] is None else f"{row['joules']:.0f}",
            "-" if row["utilisation"] is None else f"{row['utilisation']:.0%}",
        )
        for row in rows
    ]
    return "Speed", head, lines


def _computed(row: Row) -> str:
    """Format how many steps ran all blocks, and how many of these skipped the reference."""
    mark = "*" if row["scheduled"] else ""
    reuses = f", {row['reuses']:.1f} without the reference" if row.get("reuse_step") else ""
    none = " (skipped none)" if row["may_skip"] and not row["skipped"] and not reuses else ""
    return f"{row['steps'] - row['skipped']:.4g}{mark} of {row['steps']}{reuses}{none}"


def _fewer_steps(rows: Sequence[Row]) -> Iterator[Table]:
    """Compare lossy rows with their exact lists at as many steps as the rows computed."""
    judged = [row for row in rows if row.get("twin") and row["twin"] in row["quality"]]
    if not judged:
        return
    head = (
        "contender",
        "workload",
        "steps of work",
        "PSNR, dB: mean [95%] (worst)",
        "inside the edit",
        "plain, fewer steps",
        "plain's PSNR",
        "plain's inside",
        "difference, dB [95%]",
        "verdict",
    )
    lines = []
    for row in judged:
        comparison = row.get("beside_fewer_steps")
        quality = row["quality"][row["twin"]]
        cells = ["-"] * 5
        if comparison is not None:
            other = next(
                r
                for r in rows
                if (r["contender"], _workload_name(r))
                == (comparison["contender"], _workload_name(row))
            )["quality"][row["twin"]]
            gap = Interval(**comparison["psnr"]) if comparison["psnr"] else None
            cells = [
                f"{comparison['steps']} steps",
                format_measure(other["psnr"]),
                format_measure(other["edited"]),
                f"{gap.mean:+.1f} [{gap.low:+.1f}, {gap.high:+.1f}]" if gap else "-",
                gap.verdict if gap else "one example is too few to tell",
            ]
        lines.append(
            (
                *_names(row),
                f"{row['work']:.1f}",
                format_measure(quality["psnr"]),
                format_measure(quality["edited"]),
                *cells,
            )
        )
    yield "Lossy methods beside plain with fewer steps, at equal computed work", head, lines


def format_measure(one: dict[str, Any] | None) -> str:
    """Format a measure in dB: its mean, the mean's interval, and the worst value."""
    if one is None:
        return "-"
    if one["worst"] > _SAME:
        return "same"
    ends = one["interval"]
    interval = f" [{ends[0]:.1f}, {ends[1]:.1f}]" if ends else ""
    return f"{one['mean']:.1f}{interval} ({one['worst']:.1f})"


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
            "contender",
            "workload",
            "pictures",
            "PSNR, dB: mean [95%] (worst)",
            "inside the edit",
            "SSIM",
            "FLIP",
            "right [95%]",
        )
        yield f"Similarity to the pictures of {shown_name(control)}", head, lines


def _quality(quality: dict[str, Any]) -> tuple[str, ...]:
    right, ends = quality["success"], quality["success_interval"]
    cells = [f"{quality['n']}", format_measure(quality["psnr"]), format_measure(quality["edited"])]
    for name in ("ssim", "flip"):
        one = quality[name]
        cells.append(f"{one['mean']:.4f} ({one['worst']:.4f})" if one else "-")
    interval = f" [{ends[0]:.0%}, {ends[1]:.0%}]" if ends else ""
    return (*cells, "-" if right is None else f"{right:.1%}{interval}")
