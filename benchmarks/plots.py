"""Draws the published plots from the committed results; needs matplotlib (group `plots`).

python benchmarks/plots.py    # rewrite docs/pages/assets/*.svg
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib import pyplot as plt

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
ASSETS = ROOT / "docs" / "pages" / "assets"


def loss() -> Any:
    """Spark's loss over the minutes of its training, one line for each run of it."""
    records = map(json.loads, (RESULTS / "spark_training.jsonl").read_text().splitlines())
    runs: list[list[dict[str, Any]]] = []
    for record in records:
        if record["part"] == "pool":  # every run draws its examples first
            runs.append([])
        elif record["part"] == "flow":
            runs[-1].append(record)
    figure, axes = plt.subplots(figsize=(7, 3.5), layout="constrained")
    for number, run in enumerate(runs, 1):
        minutes = [record["seconds"] / 60 for record in run]
        axes.plot(minutes, [record["loss"] for record in run], label=f"run {number}")
    axes.set(xlabel="minutes of training", ylabel="loss, mean of 100 steps", yscale="log")
    axes.grid(visible=True, which="both", alpha=0.3)
    axes.legend()
    return figure


def thresholds() -> Any:
    """What a cache leaves out against how near its pictures stay, on Spark, by settings."""
    rows = json.loads((RESULTS / "caches.json").read_text())["rows"]
    figure, panels = plt.subplots(1, 2, figsize=(9, 4), sharey=True, layout="constrained")
    for axes, steps in zip(panels, (20, 28), strict=True):
        for distance, line in (("all", "-"), ("noise", "--")):
            for predict, colour in _COLOURS.items():
                some = [
                    r for r in rows
                    if (r["steps"], r["distance"], r["predict"]) == (steps, distance, predict)
                    and r["kind"] == "edit"
                ]  # fmt: skip
                if not some:
                    continue
                hits = [100 * r["hits"] for r in some]
                worst = [r["psnr_to_plain"]["min"] for r in some]
                label = f"{predict}, {distance} tokens"
                axes.plot(hits, worst, line, marker="o", ms=3, color=colour, label=label)
        axes.set(xlabel="steps left out, %", title=f"{steps} steps")
        axes.grid(visible=True, alpha=0.3)
    panels[0].set(ylabel="PSNR of the worst picture, dB")
    panels[0].legend(fontsize="small")
    return figure


def frontier() -> Any:
    """Quality against speed on Spark's edits: ours in lines, others in hollow marks."""
    result = json.loads((RESULTS / "frontier.json").read_text())
    rows = result["rows"]
    figure, panels = plt.subplots(1, 2, figsize=(9.5, 4.2), sharex=True, layout="constrained")
    families = dict.fromkeys(row["family"] for row in rows if row["family"] != "plain")
    for axes, which in zip(panels, ("mean", "worst"), strict=True):
        for number, family in enumerate(families):
            some = sorted((r for r in rows if r["family"] == family), key=lambda r: r["speed"])
            x, y = ([r["speed"] for r in some], [r["psnr"][which] for r in some])
            ours = family in ("FirstBlockCache", "ReferenceCache", "both")
            style = {"color": f"C{number}", "label": family}
            if family in ("balanced", "fast"):
                axes.plot(x, y, "*", ms=9, **style)
            elif ours:
                axes.plot(x, y, "o-", ms=5, **style)
            else:  # hollow: two that do the same are seen around each other
                marker, size = ("s", 10) if family == "para-attn" else ("^", 5)
                axes.plot(x, y, ":", marker=marker, ms=size, mfc="none", **style)
        axes.set(xlabel="times as fast as compiled alone", ylabel=f"PSNR to plain, dB: {which}")
        axes.grid(visible=True, alpha=0.3)
    panels[1].legend(fontsize="x-small")
    figure.suptitle(f"{result['examples']} held-out edits by Spark", fontsize="medium")
    return figure


_COLOURS = {"hold": "tab:blue", "linear": "tab:orange", "quadratic": "tab:green"}


def main() -> None:
    """Draw every plot; the same results give the same bytes."""
    mpl.use("svg")
    mpl.rcParams["svg.hashsalt"] = "fluxfire"
    plots = {"spark_loss": loss, "thresholds": thresholds, "frontier": frontier}
    for name, plot in plots.items():
        plot().savefig(ASSETS / f"{name}.svg", metadata={"Date": None})


if __name__ == "__main__":
    main()
