"""The command `demo`: edit pictures with Spark, plain and with passes, and compare."""

from __future__ import annotations

import argparse

from fluxfire.cli.options import (
    Commands,
    add_command,
    add_passes,
    add_sampling,
    note,
    say,
    wanted,
)
from fluxfire.cli.pictures import check_pair, note_foreign_words, open_picture, writable
from fluxfire.cli.values import positive, words


def add(commands: Commands) -> None:
    """Add `demo`.

    Args:
        commands: the commands there are already.
    """
    parser = add_command(
        commands, "demo", compare, "edit pictures with Spark, plain and with passes, and compare"
    )
    add_passes(parser)
    parser.set_defaults(passes="first-block-cache")  # its gain shows on any machine
    parser.add_argument("--image", help="a picture of your own (default: held-out scenes)")
    parser.add_argument("--prompt", type=words, help="the instruction for it, in Spark's language")
    parser.add_argument("-n", type=positive, default=8, help="scenes (default: %(default)s)")
    parser.add_argument("-o", "--output", default="demo.png", help="default: %(default)s")
    add_sampling(parser)


def compare(arguments: argparse.Namespace) -> int:
    """Edit pictures plain and with passes, and compare.

    Args:
        arguments: the command's.

    Returns:
        The exit status.
    """
    check_pair(arguments)
    output = writable(arguments.output)
    passes = wanted(arguments)
    from fluxfire import api, demo, spark

    if arguments.image is None:
        tasks = demo.held_out(arguments.n)
    else:
        tasks = [demo.Task(open_picture(arguments.image), arguments.prompt)]
        note_foreign_words(arguments.prompt)
    pipe = spark.load()
    planned = api.plan(pipe, passes)
    if not planned.ok and planned.suggestion:
        passes = list(planned.suggestion)
        note("note: left out what does not apply here: " + "; ".join(planned.complaints()))
    note(f"editing {len(tasks)} pictures plain, then with passes, on {pipe.device} …")
    done = demo.run(pipe, passes, tasks, steps=arguments.steps, seed=arguments.seed)
    say(done)
    done.grid().save(output)
    note(f"the pictures are in {output.resolve()}")
    return 0
