"""The command `bisect`: find the first pass of a list that breaks a picture."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from fluxfire.cli.console import UsageError, say
from fluxfire.cli.options import (
    MAX_EXAMPLES,
    Commands,
    add_check,
    add_command,
    add_model,
    add_passes,
    add_picture,
    add_sampling,
    load_model,
    selected_passes,
)
from fluxfire.cli.values import psnr, whole_number

if TYPE_CHECKING:  # so that the command line answers before torch is loaded
    from PIL import Image


def add(commands: Commands) -> None:
    """Add `bisect`."""
    parser = add_command(
        commands, "bisect", bisect_passes, "find the first pass of a list that breaks a picture",
        example="fluxfire bisect --preset fast --min-psnr 35",
    )  # fmt: skip
    add_model(parser)
    add_passes(parser)
    add_picture(parser)
    parser.add_argument(
        "--example", type=whole_number, default=0, metavar="N",
        help="without --image: the number of a held-out scene of Spark's (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--min-psnr", type=psnr, default=30.0, metavar="DB",
        help="a picture is broken below this PSNR to the plain picture (default: %(default)g)",
    )  # fmt: skip
    add_sampling(parser)
    add_check(parser, _check_example)


def _check_example(arguments: argparse.Namespace) -> None:
    if arguments.example >= MAX_EXAMPLES:
        raise UsageError(
            f"--example {arguments.example} is past the last scene, {MAX_EXAMPLES - 1}"
        )


def bisect_passes(arguments: argparse.Namespace) -> int:
    """Find the first pass that breaks the picture; 1 means that one does."""
    passes = selected_passes(arguments)
    from fluxfire.bench import Example, Workload, bisect, held_out
    from fluxfire.bench.quality import EQUAL, similarity

    if arguments.image is None:
        (example,) = held_out(1, first=arguments.example)
    else:
        example = Example(arguments.prompt, arguments.picture)
    pipe = load_model(arguments.model)
    load = Workload.for_pipeline(pipe, steps=arguments.steps)

    def is_right(picture: Image.Image) -> bool:
        return example.right(picture) is not False

    plain = load.run(pipe, example, seed=arguments.seed)
    plain_is_right = is_right(plain)

    def judge(_: object) -> tuple[bool, str]:
        picture = load.run(pipe, example, seed=arguments.seed)
        distance = similarity(picture, plain).psnr
        spoiled = plain_is_right and not is_right(picture)
        remark = "same as plain" if distance == EQUAL else f"PSNR to plain {distance:.1f} dB"
        remark += ", edit no longer right" if spoiled else ""
        return spoiled or distance < arguments.min_psnr, remark

    result = bisect(pipe, passes, judge)
    say(result)
    return 0 if result.first is None else 1
