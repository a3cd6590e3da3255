"""The command `demo`: edit pictures with Spark, plain and with passes, and compare.

With lossy passes, a row for plain with fewer steps, at equal computed work, stands beside them.
"""

from __future__ import annotations

import argparse

from fluxfire.cli.console import edits_bar, note, say
from fluxfire.cli.options import (
    Commands,
    add_command,
    add_examples,
    add_output,
    add_passes,
    add_sampling,
    note_spark_limits,
    selected_examples,
    selected_passes,
)
from fluxfire.text import count_of


def add(commands: Commands) -> None:
    """Add `demo`."""
    parser = add_command(
        commands, "demo", compare, "edit pictures with Spark, plain and with passes, and compare",
        example="fluxfire demo -n 2",
    )  # fmt: skip
    add_passes(parser, default="first-block-cache alone")
    parser.set_defaults(passes="first-block-cache")  # it needs no compiler and no GPU
    add_examples(parser, 3)
    add_output(parser, "demo.png", "the pictures, side by side", picture=True)
    add_sampling(parser)


def compare(arguments: argparse.Namespace) -> int:
    """Edit the pictures plain and with passes, and print the comparison."""
    passes = selected_passes(arguments)
    from fluxfire import api, spark
    from fluxfire.bench import demo

    examples = selected_examples(arguments)
    if arguments.image is not None:
        note_spark_limits(arguments.prompt, arguments.picture)
    pipe = spark.load()
    plan = api.plan(pipe, passes)
    if not plan.ok and arguments.preset is not None and plan.suggestion:
        passes = list(plan.suggestion)
        names = " + ".join(p.name for p in passes) or "no passes"
        note(f"note: {arguments.preset} does not apply here: {'; '.join(plan.complaints())}")
        note(f"note: the demo uses {names}")
    else:
        plan.raise_if_bad()
    note(f"editing {count_of(len(examples), 'picture')} plain, then with passes, on {pipe.device}")
    with edits_bar(compiles=any(p.stage == "compile" for p in passes)) as show:
        comparison = demo.run(
            pipe, passes, examples, steps=arguments.steps, seed=arguments.seed, on_edit=show
        )
    say(comparison)
    comparison.grid().save(arguments.output)
    note(f"saved the pictures: {arguments.output.resolve()}")
    return 0
