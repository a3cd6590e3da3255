"""What benchmarks begin with that run at FLUX.1 Kontext's sizes, or tiny, to try them out."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from fluxfire.bench import Workload
from fluxfire.models.loading import load


def parser(description: str | None) -> argparse.ArgumentParser:
    """Make a parser with `--full` or `--tiny`, and `--out`.

    Args:
        description: a module's docstring, whose first line says what the benchmark does.
    """
    made = argparse.ArgumentParser(description=(description or "").splitlines()[0])
    size = made.add_mutually_exclusive_group(required=True)
    size.add_argument("--full", action="store_true", help="FLUX.1 Kontext's sizes, random weights")
    size.add_argument("--tiny", action="store_true", help="a tiny pipeline, for trying this out")
    made.add_argument("--out", type=Path, required=True)
    return made


def pipeline(*, full: bool) -> Any:
    """Load random weights, without a progress bar."""
    pipe = load("random-full" if full else "random-tiny")
    pipe.set_progress_bar_config(disable=True)
    return pipe


def side(*, full: bool) -> int:
    """Return the side of a picture, in pixels."""
    return 1024 if full else 64


def edit(side: int, steps: int, *, full: bool) -> Workload:
    """Return an edit to a square picture, its prompt as long as FLUX's, or short."""
    return Workload(
        name=f"edit {side}, {steps} steps",
        size=(side, side),
        steps=steps,
        auto_resize=full,
        text_tokens=512 if full else 32,
    )
