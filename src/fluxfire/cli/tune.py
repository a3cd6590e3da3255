"""The command `tune`: find the fastest passes, or number of steps, within a quality budget."""

from __future__ import annotations

import argparse

from fluxfire.cli.console import UsageError, edits_bar, estimate_once, note, say
from fluxfire.cli.options import (
    Commands,
    add_check,
    add_command,
    add_examples,
    add_guidance,
    add_model,
    add_output,
    add_sampling,
    add_size,
    load_model,
    selected_examples,
    selected_workload,
)
from fluxfire.cli.values import fraction, prices, psnr
from fluxfire.loading import RANDOM

_BUDGET = ("min_psnr", "mean_psnr", "min_ssim", "max_flip", "max_lost")
_EXAMPLES = 376  # 24 for the search, 96 for the choice, 256 for the confirmation
_MIN_EXAMPLES = 3


def add(commands: Commands) -> None:
    """Add `tune`."""
    parser = add_command(
        commands, "tune", tune,
        "find the fastest passes, or number of steps, within a quality budget on your pictures",
        example="fluxfire tune --model ./kontext --examples edits.jsonl --min-psnr 25",
    )  # fmt: skip
    add_model(parser)
    add_examples(parser, _EXAMPLES)
    add_sampling(parser)
    add_guidance(parser)
    add_size(parser)
    budget = parser.add_argument_group("the budget (at least one limit)")
    budget.add_argument(
        "--min-psnr", type=psnr, metavar="DB", help="lowest PSNR of the worst picture"
    )
    budget.add_argument("--mean-psnr", type=psnr, metavar="DB", help="lowest mean PSNR")
    budget.add_argument(
        "--min-ssim", type=fraction, metavar="SSIM", help="lowest SSIM of the worst picture"
    )
    budget.add_argument(
        "--max-flip", type=fraction, metavar="FLIP", help="highest FLIP of the worst picture"
    )
    budget.add_argument(
        "--max-lost", type=fraction, metavar="FRACTION",
        help="allowed drop in correct edits (0.01 = 1 percentage point; Spark's scenes only)",
    )  # fmt: skip
    parser.add_argument(
        "--prices", type=prices, metavar="KIND=SECONDS,…",
        help="cost of a step on the target machine, such as "
        "computed=0.27,reused=0.15,hit=0.006,around=0.2, where around is the rest of an edit "
        "(searches only caches and fewer steps)",
    )  # fmt: skip
    add_output(
        parser, "tuned.json", 'the list, for optimize(pipe, "tuned.json") and --preset tuned.json'
    )
    add_check(parser, _check_budget)


def _check_budget(arguments: argparse.Namespace) -> None:
    if all(getattr(arguments, name) is None for name in _BUDGET):
        options = ", ".join(f"--{name.replace('_', '-')}" for name in _BUDGET)
        raise UsageError(f"state a budget, one or more of {options}")
    if arguments.output.suffix != ".json":
        raise UsageError(f"cannot write {arguments.output}: it must be a file ending in .json")
    if arguments.model in RANDOM:
        raise UsageError(
            f"{arguments.model} has random weights, whose pictures are noise: they cannot show "
            f"what a pass costs in quality. Give a --model with trained weights"
        )
    own = arguments.examples is not None or arguments.image is not None
    if own and arguments.max_lost is not None:
        raise UsageError(
            "--max-lost needs Spark's scenes: no program can tell whether your own edits are "
            "right. Use --min-psnr instead"
        )
    if arguments.examples is None:
        _check_number(1 if arguments.image is not None else arguments.n)


def _check_number(examples: int) -> None:
    if examples < _MIN_EXAMPLES:
        raise UsageError(
            f"tune needs {_MIN_EXAMPLES} examples or more, to search, to choose and to confirm; "
            f"there are {examples}"
        )


def tune(arguments: argparse.Namespace) -> int:
    """Tune; 1 means that only the plain pipeline with all its steps is within the budget."""
    examples = selected_examples(arguments)
    _check_number(len(examples))
    from fluxfire import bench

    budget = bench.Budget(**{name: getattr(arguments, name) for name in _BUDGET})
    pipe = load_model(arguments.model)
    pipe.set_progress_bar_config(disable=True)
    load = selected_workload(arguments, pipe)
    costs = bench.Prices(**arguments.prices) if arguments.prices else None
    with edits_bar(compiles=costs is None) as show:
        tuned = bench.tune(
            pipe, examples, budget, workload=load, prices=costs, seed=arguments.seed,
            on_edit=estimate_once(
                show, len(examples), "plain edits come first", "then the search edits with passes"
            ),
        )  # fmt: skip
    say(tuned)
    out = arguments.output
    tuned.save(out)
    if tuned.passes or not tuned.steps:
        note(f'saved {out}: apply it with optimize(pipe, "{out}"), or with --preset {out}')
    if tuned.steps:
        note(f"call the pipeline with num_inference_steps={tuned.steps} (--steps {tuned.steps})")
    return 0 if tuned.passes or tuned.steps else 1
