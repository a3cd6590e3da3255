"""The command `bisect`: find the first pass of a list that breaks a picture."""

from __future__ import annotations

import argparse
from typing import Any

from fluxfire.cli.options import (
    Commands,
    add_command,
    add_model,
    add_passes,
    add_sampling,
    load,
    say,
    wanted,
)
from fluxfire.cli.pictures import check_pair, open_picture, sizes
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
    passes = wanted(arguments)
    import torch

    from fluxfire import spark
    from fluxfire.bench import bisect
    from fluxfire.spark import checking
    from fluxfire.spark.scoring import psnr

    example = None
    if arguments.image is None:
        example = spark.examples(n=arguments.example + 1)[-1]
        picture, prompt = example.source, example.instruction
    else:
        picture, prompt = open_picture(arguments.image), arguments.prompt
    pipe = load(arguments.model)

    def edit() -> Any:
        return pipe(
            prompt=prompt,
            num_inference_steps=arguments.steps,
            generator=torch.Generator().manual_seed(arguments.seed),
            **sizes(pipe, None, picture),
        ).images[0]

    plain = edit()
    was_right = example is not None and example.check(plain)

    def judge(_: Any) -> tuple[bool, str]:
        image = edit()
        value = psnr(checking.as_tensor(image), checking.as_tensor(plain))
        undone = example is not None and was_right and not example.check(image)
        note = f"PSNR to plain {value:.1f} dB" + (", edit no longer right" if undone else "")
        return undone or value < arguments.min_psnr, note

    found = bisect(pipe, passes, judge)
    say(found)
    return 0 if found.first is None else 1
