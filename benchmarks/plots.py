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
    """Spark's loss over the minutes of its training, one line for each sitting."""
    records = map(json.loads, (RESULTS / "spark_training.jsonl").read_text().splitlines())
    sittings: list[list[dict[str, Any]]] = []
    for record in records:
        if record["part"] == "pool":  # every sitting draws its examples first
            sittings.append([])
        elif record["part"] == "flow":
            sittings[-1].append(record)
    figure, axes = plt.subplots(figsize=(7, 3.5), layout="constrained")
    for number, sitting in enumerate(sittings, 1):
        minutes = [record["seconds"] / 60 for record in sitting]
        axes.plot(minutes, [record["loss"] for record in sitting], label=f"sitting {number}")
    axes.set(xlabel="minutes of training", ylabel="loss, mean of 100 steps", yscale="log")
    axes.grid(visible=True, which="both", alpha=0.3)
    axes.legend()
    return figure


def main() -> None:
    """Draw every plot; the same results give the same bytes."""
    mpl.use("svg")
    mpl.rcParams["svg.hashsalt"] = "fluxfire"
    for name, plot in {"spark_loss": loss}.items():
        plot().savefig(ASSETS / f"{name}.svg", metadata={"Date": None})


if __name__ == "__main__":
    main()
