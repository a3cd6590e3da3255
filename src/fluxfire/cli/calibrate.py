"""The command `calibrate`: find the best steps to skip for one model."""

from __future__ import annotations

import argparse
from importlib.util import find_spec
from pathlib import Path

from fluxfire.cli.console import UsageError, edits_bar, estimate_once, note, say
from fluxfire.cli.options import (
    Commands,
    add_check,
    add_command,
    add_examples,
    add_guidance,
    add_model,
    add_output,
    add_passes,
    add_sampling,
    add_size,
    check_outputs,
    load_model,
    selected_examples,
    selected_passes,
    selected_workload,
)
from fluxfire.cli.values import positive_number
from fluxfire.errors import BenchError
from fluxfire.loading import RANDOM
from fluxfire.text import extra_hint

_EXAMPLES = 16
_FEWEST = 5  # of an interval, twice: half of the examples confirm


def add(commands: Commands) -> None:
    """Add `calibrate`."""
    parser = add_command(
        commands, "calibrate", calibrate,
        "find the best steps to skip for your model and pictures",
        example="fluxfire calibrate --model ./kontext --examples edits.jsonl --computed 14",
    )  # fmt: skip
    add_model(parser)
    add_passes(parser)
    add_examples(parser, _EXAMPLES)
    add_sampling(parser)
    add_guidance(parser)
    add_size(parser)
    parser.add_argument(
        "--computed", type=positive_number, nargs="+", metavar="STEPS",
        help="how many of --steps to compute, such as 18 14 11 (default: 64%%, 50%%, 40%%)",
    )  # fmt: skip
    parser.add_argument(
        "--folder", type=Path, metavar="FOLDER",
        help="keeps every edit: the same command goes on after an interrupt, and other numbers of "
        "--computed need no new edits with all steps",
    )  # fmt: skip
    add_output(
        parser, "calibrated.json",
        'the schedule of least work that beats plain with as much, for optimize(pipe, "…")',
    )  # fmt: skip
    parser.add_argument(
        "--plot", type=Path, metavar="FILE", help="quality against work, as SVG (needs matplotlib)"
    )
    add_check(parser, _check)


def _check(arguments: argparse.Namespace) -> None:
    if arguments.output.suffix != ".json":
        raise UsageError(f"cannot write {arguments.output}: it must be a file ending in .json")
    if arguments.plot is not None:
        if arguments.plot.suffix != ".svg":
            raise UsageError(f"cannot write {arguments.plot}: a plot's name must end in .svg")
        check_outputs(arguments, arguments.plot)
        if find_spec("matplotlib") is None:
            raise BenchError(f"a plot needs matplotlib; {extra_hint('bench')}")
    if arguments.model in RANDOM:
        raise UsageError(
            f"{arguments.model} has random weights, whose steps say nothing about a trained "
            f"model's. Give a --model with trained weights"
        )
    if arguments.image is not None or (arguments.examples is None and arguments.n < 2 * _FEWEST):
        raise UsageError(
            f"calibrate needs {2 * _FEWEST} examples or more: half of them make the schedules, and "
            f"half confirm. Give a file with --examples, or -n {_EXAMPLES}"
        )


def calibrate(arguments: argparse.Namespace) -> int:
    """Calibrate; 1 means that no schedule clearly beats plain with fewer steps."""
    examples = selected_examples(arguments)
    if len(examples) < 2 * _FEWEST:
        raise UsageError(
            f"{arguments.examples} has {len(examples)} examples; calibrate needs {2 * _FEWEST}"
        )
    from fluxfire import bench
    from fluxfire.bench.calibration import budgets

    try:
        budgets(arguments.computed, arguments.steps)
    except BenchError as error:
        raise UsageError(str(error)) from None
    passes = selected_passes(arguments)
    pipe = load_model(arguments.model)
    pipe.set_progress_bar_config(disable=True)
    load = selected_workload(arguments, pipe)
    with edits_bar(compiles=any(p.stage == "compile" for p in passes)) as show:
        found = bench.calibrate(
            pipe, examples, passes=passes, computed=arguments.computed, workload=load,
            seed=arguments.seed, folder=arguments.folder,
            on_edit=estimate_once(
                show, len(examples), "edits with all steps come first",
                "then whole edits decide between schedules",
            ),
        )  # fmt: skip
    say(found)
    if arguments.plot is not None:
        from fluxfire.bench.plots import draw_calibration

        arguments.plot.write_text(draw_calibration(found.to_dict()), encoding="utf-8")
    if not any(one.wins for one in found.found):
        say(
            "No schedule clearly beats plain with fewer steps here, so nothing was saved. Try more "
            "examples or more computed steps; with --folder, edits that exist are not made again. "
            "In Python, fluxfire.calibrate(…).save(path, computed=14) saves any schedule."
        )
        return 1
    found.save(arguments.output)
    out = arguments.output
    note(
        f"saved {out}, which computes {found.best().computed} steps: apply it with "
        f'optimize(pipe, "{out}"), or with --preset {out}'
    )
    return 0
