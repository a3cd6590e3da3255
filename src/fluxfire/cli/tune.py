"""The command `tune`: the fastest list of passes, or number of steps, within a stated budget."""

from __future__ import annotations

import argparse
from pathlib import Path

from fluxfire.cli.options import (
    Commands,
    UsageError,
    add_command,
    add_examples,
    add_model,
    add_sampling,
    edits_bar,
    examples_wanted,
    load_model,
    note,
    say,
)
from fluxfire.cli.pictures import check_size
from fluxfire.cli.values import prices, size

_BUDGET = ("min_psnr", "mean_psnr", "min_ssim", "max_flip", "max_lost")
_EXAMPLES = 376  # 24 to search with, 96 to choose by, 256 to confirm on


def add(commands: Commands) -> None:
    """Add `tune`.

    Args:
        commands: the commands there are already.
    """
    parser = add_command(
        commands, "tune", tune,
        "find the fastest passes, or number of steps, within a quality budget on your pictures",
    )  # fmt: skip
    add_model(parser)
    add_examples(parser, _EXAMPLES)
    add_sampling(parser)
    parser.add_argument("--size", type=size, help="WIDTHxHEIGHT (default: each picture's shape)")
    budget = parser.add_argument_group("the budget (one limit at least)")
    budget.add_argument("--min-psnr", type=float, metavar="DB", help="PSNR of the worst picture")
    budget.add_argument("--mean-psnr", type=float, metavar="DB", help="PSNR on average")
    budget.add_argument("--min-ssim", type=float, metavar="SSIM", help="SSIM of the worst picture")
    budget.add_argument("--max-flip", type=float, metavar="FLIP", help="FLIP of the worst picture")
    budget.add_argument(
        "--max-lost", type=float, metavar="SHARE",
        help="allowed drop in right edits, as a share: 0.01 is one percentage point (Spark's "
        "scenes only)",
    )  # fmt: skip
    parser.add_argument(
        "--prices", type=prices, metavar="KIND=SECONDS,…",
        help="seconds per step on the target machine: computed, reused and hit, and around for "
        "the rest of an edit (searches caches and fewer steps only)",
    )  # fmt: skip
    parser.add_argument(
        "--out", type=Path, default=Path("tuned.json"),
        help='for optimize(pipe, "tuned.json") and --preset tuned.json (default: %(default)s)',
    )  # fmt: skip


def tune(arguments: argparse.Namespace) -> int:
    """Tune.

    Args:
        arguments: the command's.

    Returns:
        The exit status: 1 if only the plain pipeline with all its steps keeps to the budget.

    Raises:
        UsageError: if nothing can be tuned so.
    """
    asked = {name: getattr(arguments, name) for name in _BUDGET}
    if all(limit is None for limit in asked.values()):
        raise UsageError(
            "state a budget, one or more of "
            + ", ".join(f"--{name.replace('_', '-')}" for name in _BUDGET)
        )
    if arguments.size is not None:
        check_size(*arguments.size)
    out: Path = arguments.out
    if out.suffix != ".json" or not out.resolve().parent.is_dir() or out.is_dir():
        raise UsageError(f"cannot write {out}: it must be a file ending in .json, in a folder")
    from fluxfire import bench, loading

    if arguments.model in loading.RANDOM:
        raise UsageError(
            f"{arguments.model} has random weights, whose pictures are noise: what a pass costs in "
            f"quality cannot be seen on them"
        )
    budget = bench.Budget(**asked)
    examples = examples_wanted(arguments)
    pipe = load_model(arguments.model)
    pipe.set_progress_bar_config(disable=True)
    load = bench.Workload.usual(pipe, steps=arguments.steps, size=arguments.size)
    priced = bench.Prices(**arguments.prices) if arguments.prices else None
    with edits_bar() as tell:
        found = bench.tune(
            pipe, examples, budget, workload=load, prices=priced, seed=arguments.seed, on_edit=tell
        )
    say(found)
    found.save(out)
    if found.passes or not found.steps:
        note(f'saved: optimize(pipe, "{out}") applies it, and --preset {out} on the command line')
    if found.steps:
        note(f"call the pipeline with num_inference_steps={found.steps} (--steps {found.steps})")
    return 0 if found.passes or found.steps else 1
