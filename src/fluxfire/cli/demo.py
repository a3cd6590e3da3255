"""The command `demo`: edit pictures with Spark, plain and with passes, and compare."""

from __future__ import annotations

import argparse

from fluxfire.cli.options import (
    Commands,
    add_command,
    add_examples,
    add_passes,
    add_sampling,
    examples_wanted,
    note,
    say,
    wanted,
)
from fluxfire.cli.pictures import note_foreign_words, writable


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
    add_examples(parser, 8)
    parser.add_argument("-o", "--output", default="demo.png", help="default: %(default)s")
    add_sampling(parser)


def compare(arguments: argparse.Namespace) -> int:
    """Edit pictures plain and with passes, and compare.

    Args:
        arguments: the command's.

    Returns:
        The exit status.
    """
    output = writable(arguments.output)
    passes = wanted(arguments)
    from fluxfire import api, demo, spark

    examples = examples_wanted(arguments)
    if arguments.prompt is not None:
        note_foreign_words(arguments.prompt)
    pipe = spark.load()
    planned = api.plan(pipe, passes)
    if not planned.ok and planned.suggestion:
        passes = list(planned.suggestion)
        note("note: left out what does not apply here: " + "; ".join(planned.complaints()))
    note(f"editing {len(examples)} pictures plain, then with passes, on {pipe.device} …")
    done = demo.run(pipe, passes, examples, steps=arguments.steps, seed=arguments.seed)
    say(done)
    done.grid().save(output)
    note(f"the pictures are in {output.resolve()}")
    return 0
