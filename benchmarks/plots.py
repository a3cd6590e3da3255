"""Draws the published plots from the committed results; needs matplotlib (group `plots`).

python benchmarks/plots.py    # rewrite docs/pages/assets/*.svg
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib import pyplot as plt

from fluxfire.bench.plots import error_bars
from regions.reference import frontier_rows
from regions.results import FORMER_FAST, load

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
ASSETS = ROOT / "docs" / "pages" / "assets"


def loss() -> Any:
    """Spark's losses over the minutes of its training."""
    records = list(map(json.loads, (RESULTS / "spark_training.jsonl").read_text().splitlines()))
    figure, axes = plt.subplots(figsize=(7, 3.5), layout="constrained")
    for part in ("recogniser", "flow", "guided"):
        mine = [r for r in records if r["part"] == part and "loss" in r]
        minutes = [record["seconds"] / 60 for record in mine]
        axes.plot(minutes, [record["loss"] for record in mine], label=part)
    axes.set(xlabel="minutes of training", ylabel="loss", yscale="log")
    axes.grid(visible=True, which="both", alpha=0.3)
    axes.legend()
    return figure


def frontier() -> Any:
    """Quality against computed work on Spark: plain with fewer steps is the line to beat."""
    result = load("frontier.json")
    families = {"RegionE": "RegionE", **result["families"]}
    # The first of a name: RegionE's run repeats plain rows in bfloat16.
    named = {row["contender"]: row for row, _ in reversed(frontier_rows())}
    rows = [row for name, row in named.items() if name != "eager"]
    figure, panels = plt.subplots(1, 2, figsize=(10, 4.4), layout="constrained")
    for axes, measure in zip(panels, ("psnr", "edited"), strict=True):
        points: dict[str, list[tuple[float, dict[str, Any]]]] = {}
        for row in rows:
            family = families.get(row["contender"], "plain, fewer steps")
            points.setdefault(family, []).append((row["work"], row["quality"]["eager"][measure]))
        for number, (family, some) in enumerate(points.items()):
            some.sort(key=lambda point: point[0])
            x, y = [work for work, _ in some], [one["mean"] for _, one in some]
            errors = error_bars([one for _, one in some])
            plain = family == "plain, fewer steps"
            axes.errorbar(
                x, y, yerr=errors, label=family, color="0.35" if plain else f"C{number}",
                fmt="-" if plain else _MARKS.get(family, "o"), ms=9 if family in _STARS else 5,
                mfc=None if family in _OURS else "none", lw=1.5 if plain else 0.8, capsize=2,
            )  # fmt: skip
        axes.set(xlabel=f"computed work, in steps of {result['steps']}")
        axes.set_title(
            "whole picture" if measure == "psnr" else "inside the edit", fontsize="medium"
        )
        axes.grid(visible=True, alpha=0.3)
    panels[0].set(ylabel="PSNR to plain, dB: mean, 95% interval")
    panels[1].legend(fontsize="x-small", loc="center left", bbox_to_anchor=(1.01, 0.5))
    figure.suptitle(f"{result['examples']} held-out edits by Spark", fontsize="medium")
    return figure


_STARS = ("balanced", FORMER_FAST)
_OURS = (*_STARS, "FirstBlockCache", "ReferenceCache", "0.1.0's presets")
_MARKS = {
    "balanced": "*", FORMER_FAST: "*", "para-attn": "s", "MagCache": "D", "0.1.0's presets": "x",
}  # fmt: skip


def main() -> None:
    """Draw every plot; the same results give the same bytes."""
    mpl.use("svg")
    mpl.rcParams["svg.hashsalt"] = "fluxfire"
    plots = {"spark_loss": loss, "frontier": frontier}
    for name, plot in plots.items():
        plot().savefig(ASSETS / f"{name}.svg", metadata={"Date": None})


if __name__ == "__main__":
    main()
