"""The command `demo`: edit pictures with Spark, plain and with passes, and compare.

With lossy passes, plain with as many steps as they computed stands beside them.
"""

from __future__ import annotations

import argparse

from fluxfire.cli.options import (
    Commands,
    add_command,
    add_examples,
    add_passes,
    add_sampling,
    check_pair,
    edits_bar,
    examples_wanted,
    note,
    say,
    wanted,
)
from fluxfire.cli.pictures import note_limits, writable


def add(commands: Commands) -> None:
    """Add `demo`.

    Args:
        commands: the commands there are already.
    """
    parser = add_command(
        commands, "demo", compare, "edit pictures with Spark, plain and with passes, and compare"
    )
    add_passes(parser, default="first-block-cache alone")
    parser.set_defaults(passes="first-block-cache")  # it needs no compiler and no GPU
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
    check_pair(arguments)
    output = writable(arguments.output)
    passes = wanted(arguments)
    from fluxfire import api, spark
    from fluxfire.bench import demo

    examples = examples_wanted(arguments)
    if arguments.image is not None:
        note_limits(arguments.prompt, examples[0].picture)
    pipe = spark.load()
    planned = api.plan(pipe, passes)
    if not planned.ok and arguments.preset is not None and planned.suggestion:
        passes = list(planned.suggestion)
        names = " + ".join(p.name for p in passes) or "no passes"
        note(f"note: here {names} instead of all of it: " + "; ".join(planned.complaints()))
    else:
        planned.raise_if_bad()
    pictures = "one picture" if len(examples) == 1 else f"{len(examples)} pictures"
    note(f"editing {pictures} plain, then with passes, on {pipe.device}")
    with edits_bar() as tell:
        done = demo.run(
            pipe, passes, examples, steps=arguments.steps, seed=arguments.seed, on_edit=tell
        )
    say(done)
    done.grid().save(output)
    note(f"the pictures are in {output.resolve()}")
    return 0
