"""The command `run`: edit a picture with an optimized pipeline."""

from __future__ import annotations

import argparse
import time
from typing import TYPE_CHECKING

from fluxfire.cli.console import announce_compilation, note, say, say_json
from fluxfire.cli.options import (
    Commands,
    add_command,
    add_guidance,
    add_memory,
    add_model,
    add_output,
    add_passes,
    add_picture,
    add_sampling,
    add_size,
    load_model,
    needs_placing,
    note_spark_limits,
    selected_passes,
    selected_workload,
)
from fluxfire.cli.values import positive_number
from fluxfire.errors import FluxfireError
from fluxfire.loading import SPARK
from fluxfire.text import human_seconds

if TYPE_CHECKING:  # so that the command line answers before torch is loaded
    from collections.abc import Sequence

    from PIL import Image

    from fluxfire.diffusers_types import DiffusersPipeline
    from fluxfire.protocol import Pass
    from fluxfire.reporting.statistics import RunStatistics

_NOTABLE_SECONDS = 1.0


def add(commands: Commands) -> None:
    """Add `run`."""
    parser = add_command(
        commands, "run", run, "edit a picture with an optimized pipeline",
        example='fluxfire run --image scene.png --prompt "make it night" -o night.png',
    )  # fmt: skip
    add_model(parser)
    add_passes(parser)
    add_memory(parser)
    add_picture(parser, required=True)
    add_output(parser, "out.png", "the edited picture", picture=True)
    add_sampling(parser)
    add_guidance(parser)
    add_size(parser)
    parser.add_argument(
        "--gpus", type=positive_number, default=1, metavar="N",
        help="GPUs that share the edit, each with a process of its own (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--device", choices=["cuda", "cpu"],
        help="where to compute (default: cuda, if there is one)",
    )  # fmt: skip
    report = parser.add_mutually_exclusive_group()
    report.add_argument(
        "-v", "--verbose", action="store_true",
        help="also print the full report: passes, memory, time per step, compilation",
    )  # fmt: skip
    report.add_argument("--json", action="store_true", help="print the full report as JSON")


def run(arguments: argparse.Namespace) -> int:
    """Edit the picture, save it, and report."""
    passes = selected_passes(arguments)
    if arguments.model == SPARK:
        note_spark_limits(arguments.prompt, arguments.picture)
    if arguments.gpus > 1:
        from fluxfire.cli.processes import run_together

        run_together(_edit_and_report, arguments, passes)
    else:
        _edit_and_report(arguments, passes)
    return 0


def _edit_and_report(arguments: argparse.Namespace, passes: Sequence[Pass]) -> None:
    """Edit the picture; save it and report, unless another process does.

    Args:
        arguments: the parsed arguments. Its `output` is None in a process that saves nothing.
        passes: the passes to apply.
    """
    import torch

    from fluxfire import api
    from fluxfire.environment import environment

    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise FluxfireError("--device cuda needs a GPU, and torch finds none")
    placed = needs_placing(arguments, passes)
    pipe = load_model(arguments.model, device=arguments.device, placed=placed)
    if arguments.gpus > 1:
        from fluxfire.cli.processes import share

        passes = share(passes, pipe)
    api.optimize(pipe, passes, memory=arguments.memory)
    began = time.perf_counter()
    picture = _edit(pipe, arguments)
    seconds = time.perf_counter() - began
    if arguments.output is None:
        return
    try:
        picture.save(arguments.output)
    except (OSError, ValueError) as error:
        raise FluxfireError(f"cannot write {arguments.output}: {error}") from None
    report = api.report(pipe)
    saved = f"saved {arguments.output} ({picture.width}x{picture.height}) in "
    saved += _summary(seconds, report.runs[-1] if report.runs else None)
    if arguments.json:
        note(saved)
        say_json({"environment": environment().to_dict(), **report.to_dict()})
        return
    say(saved)
    if arguments.verbose:
        say(f"\n{report}")


def _edit(pipe: DiffusersPipeline, arguments: argparse.Namespace) -> Image.Image:
    """Return the edited picture."""
    import torch

    from fluxfire.bench import Example

    pipe.set_progress_bar_config(disable=arguments.output is None)
    load = selected_workload(arguments, pipe)
    example = Example(arguments.prompt, arguments.picture)
    try:
        with announce_compilation():
            return load.run(pipe, example, seed=arguments.seed)
    except torch.OutOfMemoryError as error:
        first = str(error).splitlines()[0]
        raise FluxfireError(f"{first} Try --memory auto, or a smaller --size") from None


def _summary(seconds: float, run: RunStatistics | None) -> str:
    """Say how long an edit took, and what its caches skipped.

    Args:
        seconds: of the whole edit.
        run: its statistics; None for a plain pipeline.
    """
    parts = [human_seconds(seconds)]
    if run is not None:
        compiling = run.compiled.trace_seconds + run.compiled.compile_seconds
        if compiling > _NOTABLE_SECONDS:
            parts[0] += f", including {human_seconds(compiling)} to compile once"
        kinds = run.step_kinds
        if skipped := kinds.count("hit"):
            parts.append(f"{skipped} of {len(kinds)} steps skipped")
        if reused := kinds.count("reused"):
            parts.append(f"the reference reused in {reused} of {len(kinds)} steps")
    return "; ".join(parts)
