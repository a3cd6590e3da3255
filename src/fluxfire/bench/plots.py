"""Plots a benchmark's JSON result as SVG; needs matplotlib."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from fluxfire.bench.contenders import EAGER, shown_name
from fluxfire.bench.tables import speedup

Row = dict[str, Any]
_DPI = 100
_LEGEND = {"fontsize": "small", "loc": "center left", "bbox_to_anchor": (1.01, 0.5)}


def draw(result: dict[str, Any]) -> dict[str, str]:
    """Draw every plot that the result has data for.

    Returns:
        SVG by plot name. The same result gives the same bytes.
    """
    rows = [row for row in result["rows"] if "edit" in row]
    plots: dict[str, Callable[[Any, list[Row]], None]] = {
        "speed": _speed,
        "phases": _phases,
        "speed and quality": _tradeoff,
    }
    drawn = {}
    for name, plot in plots.items():
        for load in dict.fromkeys(row["workload"]["name"] for row in rows):
            some = [row for row in rows if row["workload"]["name"] == load]
            if name != "speed and quality" or _rows_with_quality(some):
                drawn[f"{name}, {load}"] = _svg(plot, some, load)
    return drawn


def draw_calibration(calibrated: dict[str, Any]) -> str:
    """Draw what `calibrate` found: quality against work, beside plain with fewer steps.

    Args:
        calibrated: the result's `to_dict()`.

    Returns:
        SVG. The same result gives the same bytes.
    """
    workload = calibrated["workload"]["name"]
    title = f"{workload}, {calibrated['confirming']} examples that made no schedule"
    return _svg(_schedules, calibrated["found"], title)


def error_bars(measures: Sequence[dict[str, Any]]) -> list[list[float]]:
    """Return how far each interval reaches below and above its mean; 0 without an interval."""
    ends = [(one["mean"], one["interval"] or [one["mean"]] * 2) for one in measures]
    return [[mean - low for mean, (low, _) in ends], [high - mean for mean, (_, high) in ends]]


def _svg(plot: Callable[[Any, list[Row]], None], rows: list[Row], title: str) -> str:
    from matplotlib.figure import Figure

    with _reproducible():
        bars = plot in (_speed, _phases)
        height = 1.2 + 0.32 * len(rows) if bars else 4.5
        figure = Figure(figsize=(9, height), layout="constrained", dpi=_DPI)
        axes = figure.subplots()
        axes.set_title(title, fontsize="medium")
        plot(axes, rows)
        file = io.StringIO()
        figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None})
    return file.getvalue()


@contextmanager
def _reproducible() -> Iterator[None]:
    """Make matplotlib's output reproducible in a `with` block."""
    import matplotlib as mpl

    with mpl.rc_context({"svg.hashsalt": "fluxfire", "font.size": 9}):
        yield


def _speed(axes: Any, rows: list[Row]) -> None:
    """Draw a bar for each contender's edit, with its spread."""
    edits = [row["edit"] for row in rows]
    medians = [one["median"] for one in edits]
    spread = [
        [one["median"] - one["min"] for one in edits],
        [one["max"] - one["median"] for one in edits],
    ]
    axes.barh(_names(rows), medians, xerr=spread, color="tab:orange", ecolor="0.3")
    axes.set(xlabel="seconds an edit: median, minimum and maximum")
    _finish(axes)


def _phases(axes: Any, rows: list[Row]) -> None:
    """Draw a stacked bar of phases for each contender."""
    left = [0.0] * len(rows)
    for name in dict.fromkeys(name for row in rows for name in row["phases"]):
        parts = [row["phases"].get(name, {"median": 0.0})["median"] for row in rows]
        axes.barh(_names(rows), parts, left=left, label=name)
        left = [before + part for before, part in zip(left, parts, strict=True)]
    axes.set(xlabel="seconds of an edit (medians)")
    axes.legend(**_LEGEND)
    _finish(axes)


def _tradeoff(axes: Any, rows: list[Row]) -> None:
    """Draw a point for each contender, and a line through plain at fewer steps."""
    plain: list[tuple[float, float]] = []
    for row in _rows_with_quality(rows):
        psnr = row["quality"][EAGER]["psnr"]
        speed = speedup(rows, row, EAGER)
        fewer = row["role"] == "fewer steps"
        axes.errorbar(
            speed,
            psnr["mean"],
            yerr=error_bars([psnr]),
            fmt="s" if fewer else "o",
            mfc="none" if fewer else None,
            capsize=3,
            label=row["contender"],
        )
        axes.plot([speed], [psnr["worst"]], "v", color="0.5", ms=4)
        if fewer and speed is not None and not row["passes"]:
            plain.append((speed, psnr["mean"]))
    axes.plot(*zip(*sorted(plain), strict=True) if plain else ([], []), ":", color="0.5", zorder=0)
    axes.legend(**_LEGEND)
    axes.set(
        xlabel="times as fast as plain",
        ylabel="PSNR to plain, dB: mean with 95% interval, triangle: worst",
    )
    axes.grid(visible=True, alpha=0.3)


def _schedules(axes: Any, rows: list[Row]) -> None:
    """Draw a point for each schedule and for plain with as many steps, and their worst pictures."""
    schedules = [(row["work"], row["quality"]["psnr"]) for row in rows]
    fewer = [(row["fewer_steps"]["steps"], row["fewer_steps"]["psnr"]) for row in rows]
    for name, points, mark in (("schedules", schedules, "o"), ("plain, fewer steps", fewer, "s")):
        work, psnrs = zip(*sorted(points, key=lambda point: point[0]), strict=True)
        means = [one["mean"] for one in psnrs]
        plain = points is fewer
        colour = "0.5" if plain else "tab:orange"
        axes.errorbar(
            work, means, yerr=error_bars(psnrs), fmt=f"{mark}{':' if plain else '-'}", capsize=3,
            color=colour, mfc="none" if plain else None, label=name,
        )  # fmt: skip
        axes.plot(work, [one["worst"] for one in psnrs], "v", color=colour, ms=4)
    axes.legend(**_LEGEND)
    axes.set(
        xlabel="computed work of an edit, in steps",
        ylabel="PSNR to all steps, dB: mean with 95% interval, triangle: worst",
    )
    axes.grid(visible=True, alpha=0.3)


def _rows_with_quality(rows: list[Row]) -> list[Row]:
    return [r for r in rows if EAGER in r["quality"] and r["contender"] != EAGER]


def _names(rows: list[Row]) -> list[str]:
    return [shown_name(row["contender"]) for row in rows]


def _finish(axes: Any) -> None:
    axes.invert_yaxis()
    axes.grid(visible=True, axis="x", alpha=0.3)
