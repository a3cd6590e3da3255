"""What benchmarks begin with that run at FLUX.1 Kontext's sizes, or tiny, to try them out."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from fluxfire.bench import Contender, Example, Workload, measure, row_saver, stamp
from fluxfire.loading import load

INSTRUCTION = "make it a snowy winter evening"


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


def noise(side: int) -> Example:
    """Return a square picture of noise to edit.

    Args:
        side: of the picture, in pixels.
    """
    return Example(INSTRUCTION, Image.effect_noise((side, side), 60).convert("RGB"))


def contest(
    benchmark: str,
    contenders: Iterable[Contender],
    workloads: Sequence[Workload],
    example: Example,
    arguments: argparse.Namespace,
    *,
    rounds: int = 1,
) -> list[dict[str, Any]]:
    """Let those contenders that `--only` leaves edit an example; rows are saved after each.

    Args:
        benchmark: what the result is called.
        contenders: what to compare.
        workloads: what to run.
        example: what to edit.
        arguments: `full`, `only` and `out`.
        rounds: whole edits of each contender.

    Returns:
        The rows, as saved.
    """
    result: dict[str, Any] = {"benchmark": benchmark, **stamp(), "rows": []}
    wanted = [c for c in contenders if not arguments.only or c.name in arguments.only]
    rows = measure(
        pipeline(full=arguments.full), wanted, workloads, [example], rounds=rounds,
        fewer_steps=False,  # pictures are noise: only times count
        on_rows=row_saver(result, arguments.out), on_edit=lambda said: print(said, flush=True),
    )  # fmt: skip
    return [row.to_dict() for row in rows]
