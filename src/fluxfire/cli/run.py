"""The command `run`: edit a picture with an optimized pipeline."""

from __future__ import annotations

import argparse
import json
import time

from fluxfire.cli.options import (
    Commands,
    UsageError,
    add_command,
    add_model,
    add_passes,
    add_sampling,
    load_model,
    note,
    say,
    wanted,
)
from fluxfire.cli.pictures import check_size, note_limits, writable
from fluxfire.cli.values import size, words
from fluxfire.text import human_seconds


def add(commands: Commands) -> None:
    """Add `run`.

    Args:
        commands: the commands there are already.
    """
    parser = add_command(
        commands, "run", run, "edit a picture with an optimized pipeline, and report"
    )
    add_model(parser)
    add_passes(parser)
    parser.add_argument("--image", required=True, help="the picture to edit")
    parser.add_argument("--prompt", type=words, required=True, help="the instruction")
    parser.add_argument(
        "-o", "--output", default="out.png", help="where to write (default: out.png)"
    )
    add_sampling(parser)
    parser.add_argument("--size", type=size, help="WIDTHxHEIGHT (default: the picture's shape)")
    parser.add_argument("--report", choices=("table", "json"), default="table")


def run(arguments: argparse.Namespace) -> int:
    """Edit a picture, and report.

    Args:
        arguments: the command's.

    Returns:
        The exit status.

    Raises:
        UsageError: if a file or the size is impossible, or memory runs out.
    """
    from fluxfire.pictures import read_picture

    picture = read_picture(arguments.image)
    output = writable(arguments.output)
    if arguments.size is not None:
        check_size(*arguments.size)
    passes = wanted(arguments)
    if arguments.model == "spark":
        note_limits(arguments.prompt, picture)
    import torch

    from fluxfire import api
    from fluxfire.bench import Example, Workload
    from fluxfire.environment import environment

    pipe = load_model(arguments.model)
    api.optimize(pipe, passes)
    pipe.set_progress_bar_config(disable=False)
    began = time.perf_counter()
    try:
        load = Workload.usual(pipe, steps=arguments.steps, size=arguments.size)
        result = load.run(pipe, Example(arguments.prompt, picture), seed=arguments.seed)
    except torch.OutOfMemoryError as error:
        first = str(error).splitlines()[0]
        raise UsageError(f"{first} Try a smaller --size, or a GPU with more memory") from None
    seconds = time.perf_counter() - began
    try:
        result.save(output)
    except (OSError, ValueError) as error:
        raise UsageError(f"cannot write {output}: {error}") from None
    note(f"{output}: {result.width}x{result.height} in {human_seconds(seconds)}")
    report = api.report(pipe)
    if arguments.report == "json":
        facts = {"environment": environment().to_dict(), **report.to_dict()}
        say(json.dumps(facts, indent=2))
    else:
        say(report)
    return 0
