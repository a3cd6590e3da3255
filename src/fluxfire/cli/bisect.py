"""The command `bisect`: find the first pass of a list that breaks a picture."""

from __future__ import annotations

import argparse
from typing import Any

from fluxfire.cli.options import (
    MOST_EXAMPLES,
    Commands,
    UsageError,
    add_command,
    add_model,
    add_passes,
    add_sampling,
    check_pair,
    load_model,
    say,
    wanted,
)
from fluxfire.cli.values import seed, words


def add(commands: Commands) -> None:
    """Add `bisect`.

    Args:
        commands: the commands there are already.
    """
    parser = add_command(
        commands, "bisect", find, "find the first pass of a list that breaks a picture"
    )
    add_model(parser)
    add_passes(parser)
    parser.add_argument(
        "--image", help="the picture to edit (default: a held-out scene of Spark's)"
    )
    parser.add_argument("--prompt", type=words, help="the instruction for it")
    parser.add_argument(
        "--example", type=seed, default=0, help="which held-out scene (default: %(default)s)"
    )
    parser.add_argument(
        "--min-psnr", type=float, default=30.0, metavar="DB",
        help="broken below this PSNR to the plain picture (default: %(default)s)",
    )  # fmt: skip
    add_sampling(parser)


def find(arguments: argparse.Namespace) -> int:
    """Find the first pass that breaks a picture.

    Args:
        arguments: the command's.

    Returns:
        The exit status: 1 if a pass breaks it.
    """
    check_pair(arguments)
    if arguments.example >= MOST_EXAMPLES:
        raise UsageError(
            f"--example {arguments.example} is past the last scene, {MOST_EXAMPLES - 1}"
        )
    from fluxfire.bench import Example, Workload, bisect, held_out
    from fluxfire.bench.quality import EQUAL, likeness
    from fluxfire.pictures import read_picture

    if not 0 <= arguments.min_psnr <= EQUAL:
        raise UsageError(
            f"--min-psnr {arguments.min_psnr:g} is not between 0 and {EQUAL:g}, which equal "
            f"pictures count as"
        )
    passes = wanted(arguments)

    if arguments.image is None:
        (example,) = held_out(1, first=arguments.example)
    else:
        example = Example(arguments.prompt, read_picture(arguments.image))
    pipe = load_model(arguments.model)
    load = Workload.usual(pipe, steps=arguments.steps)

    def right(picture: Any) -> bool:
        return example.right(picture) is not False

    plain = load.run(pipe, example, seed=arguments.seed)
    was_right = right(plain)

    def judge(_: Any) -> tuple[bool, str]:
        picture = load.run(pipe, example, seed=arguments.seed)
        near = likeness(picture, plain).psnr
        undone = was_right and not right(picture)
        note = "same as plain" if near == EQUAL else f"PSNR to plain {near:.1f} dB"
        note += ", edit no longer right" if undone else ""
        return undone or near < arguments.min_psnr, note

    found = bisect(pipe, passes, judge)
    say(found)
    return 0 if found.first is None else 1
