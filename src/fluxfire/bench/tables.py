"""A benchmark's result as tables for the terminal, and as CSV, from its JSON alone."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Sequence
from statistics import median
from typing import Any

from fluxfire.bench.contenders import COMPILED, EAGER
from fluxfire.bench.intervals import Interval
from fluxfire.text import human_seconds, table

Row = dict[str, Any]
Table = tuple[str, Sequence[str], list[tuple[str, ...]]]
"""A title, the names of the columns, and the cells."""

BUSY = 0.05
"""By how much the first contender's median may move from its first turn to its last."""
_TIMES = ("Speed", "Where an edit's time goes (medians)")
_SKIPPED = ("reuse_step", "hit_step")
_SAME = 99.995  # dB; pictures that differ in no bit have 100


def as_text(result: dict[str, Any]) -> str:
    """Lay a whole result out."""
    parts = [f"{title}\n\n{table(head, rows)}" for title, head, rows in tables(result)]
    parts += [f"note: {note}" for note in (*result["notes"], *remarks(result["rows"]))]
    parts += [f"{row['contender']}: {row['error']}" for row in result["rows"] if row["error"]]
    return "\n\n".join(parts)


def remarks(rows: Sequence[Row]) -> Iterator[str]:
    """Say what a reader of the tables must know: a busy machine, methods that did nothing."""
    for row in rows:
        name, moved = row["contender"], row.get("moved")
        if is_busy(row):
            yield (
                f"this machine was busy: the median edit of {name} moved by {moved:+.0%} from its "
                f"first turn to its last; do not trust differences of that size"
            )
        if row.get("compiles"):
            yield f"{name} compiled {row['compiles']} times within the edits that count"
        if row.get("may_skip") and row.get("skipped") == 0 and not row.get("reuses"):
            yield (
                f"{name} never skipped a step of {row['steps']}: its row shows nothing but its "
                f"overhead"
            )


def is_busy(row: Row) -> bool:
    """Whether the first contender's row says that the machine's speed changed meanwhile."""
    moved: float = row.get("moved") or 0.0
    return abs(moved) > BUSY


def tables(result: dict[str, Any]) -> list[Table]:
    """Return the tables of a result: speed, lossy rows beside fewer steps, phases, quality."""
    done = [row for row in result["rows"] if "edit" in row]
    if not done:
        return []
    found = [_speed(done), *_fewer_steps(done), _phases(done), *_qualities(done)]
    if any(map(is_busy, done)):
        found = [
            (f"{title} (this machine was busy)" if title in _TIMES else title, head, lines)
            for title, head, lines in found
        ]
    several = len({_load(row) for row in done}) > 1
    return found if several else [_without_workload(one) for one in found]


def as_csv(result: dict[str, Any]) -> str:
    """Write a result as CSV: a line for each contender and workload, seconds and dB as numbers."""
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
"""Columns of the CSV, and where each stands in a row of the JSON."""


def _cell(row: Row, path: Sequence[str]) -> Any:
    value: Any = row
    for key in path:
        if isinstance(value, list):
            value = value[int(key)] if int(key) < len(value) else None
        else:
            value = (value or {}).get(key)
    return value


def _without_workload(one: Table) -> Table:
    """Say in the title what would be the same in every line."""
    title, head, lines = one
    (load,) = {line[1] for line in lines}
    return f"{title}: {load}", (head[0], *head[2:]), [(line[0], *line[2:]) for line in lines]


def faster(rows: Sequence[Row], row: Row, control: str) -> float | None:
    """Return how many times as fast as a control a row is: the median over the same examples."""
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
        "computed step", "reuse", "hit", "steps computed", "first run, 2 steps", "peak GiB",
        "J an edit", "GPU busy",
    )  # fmt: skip
    lines: list[tuple[str, ...]] = [
        (
            *_names(row),
            spread(row["edit"]),
            _times(faster(rows, row, EAGER)),
            _times(faster(rows, row, COMPILED)),
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
    """Write how many steps ran all blocks, and how many of these left the reference out."""
    mark = "*" if row["scheduled"] else ""
    reuses = f", {row['reuses']:.1f} without the reference" if row.get("reuse_step") else ""
    none = " (skipped none)" if row["may_skip"] and not row["skipped"] and not reuses else ""
    return f"{row['steps'] - row['skipped']:.4g}{mark} of {row['steps']}{reuses}{none}"


def _fewer_steps(rows: Sequence[Row]) -> Iterator[Table]:
    """Lossy rows beside the same list without what is lossy, at as many steps as they computed."""
    judged = [row for row in rows if row.get("twin") and row["twin"] in row["quality"]]
    if not judged:
        return
    head = (
        "contender", "workload", "steps of work", "PSNR, dB: mean [95%] (worst)",
        "inside the edit", "plain, fewer steps", "plain's PSNR", "plain's inside",
        "difference, dB [95%]", "verdict",
    )  # fmt: skip
    lines = []
    for row in judged:
        beside = row.get("beside_fewer_steps")
        quality = row["quality"][row["twin"]]
        told = ["-"] * 5
        if beside is not None:
            other = next(
                r for r in rows if (r["contender"], _load(r)) == (beside["contender"], _load(row))
            )["quality"][row["twin"]]
            gap = Interval(**beside["psnr"]) if beside["psnr"] else None
            told = [
                f"{beside['steps']} steps",
                measured(other["psnr"]),
                measured(other["edited"]),
                f"{gap.mean:+.1f} [{gap.low:+.1f}, {gap.high:+.1f}]" if gap else "-",
                gap.verdict if gap else "one example is too few to tell",
            ]
        lines.append(
            (
                *_names(row), f"{row['work']:.1f}", measured(quality["psnr"]),
                measured(quality["edited"]), *told,
            )
        )  # fmt: skip
    yield "Lossy methods beside plain with fewer steps, at equal computed work", head, lines


def measured(one: dict[str, Any] | None) -> str:
    """Write a measure in dB: its mean, the mean's interval, and the worst."""
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
            "contender", "workload", "pictures", "PSNR, dB: mean [95%] (worst)",
            "inside the edit", "SSIM", "FLIP", "right [95%]",
        )  # fmt: skip
        yield f"Pictures beside those of {control}", head, lines


def _quality(told: dict[str, Any]) -> tuple[str, ...]:
    right, ends = told["success"], told["success_interval"]
    cells = [f"{told['n']}", measured(told["psnr"]), measured(told["edited"])]
    for name in ("ssim", "flip"):
        one = told[name]
        cells.append(f"{one['mean']:.4f} ({one['worst']:.4f})" if one else "-")
    interval = f" [{ends[0]:.0%}, {ends[1]:.0%}]" if ends else ""
    return (*cells, "-" if right is None else f"{right:.1%}{interval}")
