"""The command `bench`: measure passes alone and stacked, beside controls and baselines."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fluxfire.cli.console import (
    UsageError,
    edits_bar,
    estimate_once,
    note,
    say,
    usage_errors,
)
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
from fluxfire.cli.values import positive_number, positive_numbers, whole_number
from fluxfire.errors import BenchError
from fluxfire.loading import RANDOM
from fluxfire.text import count_of, did_you_mean, extra_hint

if TYPE_CHECKING:  # so that the command line answers before torch is loaded
    from fluxfire.bench import Contender, Example
    from fluxfire.bench.rows import Row
    from fluxfire.protocol import Pass

BASELINES = ("cache-dit", "mag-cache", "para-attn", "torchao")
_NO_BASELINES = "none"


def add(commands: Commands) -> None:
    """Add `bench`."""
    parser = add_command(
        commands, "bench", bench,
        "measure passes beside the plain pipeline, fewer steps, and other libraries",
        example="fluxfire bench --preset faithful --html bench.html",
    )  # fmt: skip
    add_model(parser)
    parser.add_argument(
        "--random-full", action="store_const", const="random-full", dest="model",
        help="same as --model random-full: the full architecture with random weights; time and "
        "memory are real, pictures are noise",
    )  # fmt: skip
    add_passes(parser)
    add_examples(parser, 8)
    add_sampling(parser)
    add_guidance(parser)
    add_size(parser)
    parser.add_argument(
        "--rounds", type=positive_number, default=2, metavar="N",
        help="turns per contender (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--warmups", type=whole_number, default=1, metavar="N",
        help="untimed warm-up runs of two steps per turn; 0 times the first run too "
        "(default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--no-ablation", action="store_true",
        help="measure the whole list only: no single passes, no partial lists",
    )  # fmt: skip
    parser.add_argument(
        "--plain-steps", type=positive_numbers, default=[], metavar="N,N,…",
        help="also measure the plain pipeline with these numbers of steps; bench always adds one "
        "for each lossy list, at equal computed work",
    )  # fmt: skip
    parser.add_argument(
        "--baselines", type=_read_baselines, metavar="NAME,NAME,…",
        help=f"other libraries to compare with: {', '.join(BASELINES)}, or {_NO_BASELINES} "
        f"(default: all that are installed)",
    )  # fmt: skip
    add_output(parser, "bench.json", "the raw result, as JSON")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="a row of numbers per contender")
    parser.add_argument(
        "--html", type=Path, metavar="FILE", help="a page with tables, plots and pictures"
    )
    parser.add_argument("--plots", type=Path, metavar="FOLDER", help="plots, as SVG")
    add_check(parser, _check_files)


def bench(arguments: argparse.Namespace) -> int:
    """Measure; 1 means that a contender failed. The result keeps the rows of the others."""
    _check_device(arguments.model)
    passes = selected_passes(arguments)
    examples = selected_examples(arguments)
    from fluxfire.bench import measure, row_saver, tables
    from fluxfire.bench.contenders import with_twins

    pipe = load_model(arguments.model)
    pipe.set_progress_bar_config(disable=True)
    load = selected_workload(arguments, pipe)
    contenders, notes = _contenders(arguments, passes, examples)
    result = _empty_result(arguments, len(examples), notes)
    edits = arguments.rounds * len(with_twins(contenders)) * len(examples)
    with edits_bar(compiles=True) as show:
        rows = measure(
            pipe, contenders, [load], examples, rounds=arguments.rounds,
            warmups=arguments.warmups, seed=arguments.seed,
            on_edit=estimate_once(
                show, edits, "edits at the plain pipeline's speed",
                "compiling and the rows with fewer steps come on top",
            ),
            on_rows=row_saver(result, arguments.output),
        )  # fmt: skip
    say(tables.as_text(result))
    _write(arguments, result, rows, examples)
    return 1 if any(row.error for row in rows) else 0


def _read_baselines(text: str) -> list[str]:
    """Read names of baselines, separated by commas, or `none`."""
    names = [] if text == _NO_BASELINES else [name.strip() for name in text.split(",")]
    for name in names:
        if name not in BASELINES:
            raise argparse.ArgumentTypeError(
                f"there is no baseline {name!r}; there are {', '.join(BASELINES)}"
                f"{did_you_mean(name, BASELINES)}"
            )
    return names


def _check_files(arguments: argparse.Namespace) -> None:
    check_outputs(arguments, arguments.csv, arguments.html)
    files = [p.resolve() for p in (arguments.output, arguments.csv, arguments.html) if p]
    if len(set(files)) < len(files):
        raise UsageError("--output, --csv and --html must name different files")
    folder = arguments.plots
    if folder is None:
        return
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"cannot write plots to {folder}: it is not a folder")
    if not arguments.overwrite and any(folder.glob("*.svg")):
        raise UsageError(f"{folder} holds plots; name another folder, or add --overwrite")
    if find_spec("matplotlib") is None:
        raise BenchError(f"plots need matplotlib; {extra_hint('bench')}")


def _check_device(model: str) -> None:
    import torch

    if model == "random-full" and not torch.cuda.is_available():
        raise UsageError(
            "random-full needs a CUDA device, and there is none here: an edit of this size takes "
            "hours on a CPU. The default --model spark runs anywhere"
        )


def _contenders(
    arguments: argparse.Namespace, passes: Sequence[Pass], examples: Sequence[Example]
) -> tuple[list[Contender], list[str]]:
    """Return the contenders, and notes for the tables."""
    from fluxfire.bench import Contender, baselines, ladder, quality, schedules
    from fluxfire.bench.intervals import MIN_EXAMPLES
    from fluxfire.bench.power import why_unavailable

    notes = []
    contenders = ladder(passes, partial=not arguments.no_ablation)
    contenders += [Contender("plain").with_steps(n) for n in arguments.plain_steps]
    with usage_errors():
        others = baselines.choose(arguments.baselines, steps=arguments.steps)
    if arguments.model in RANDOM:
        notes.append(
            "the weights are random and the pictures are noise: comparing them only tells exact "
            "passes from lossy passes. This run does not measure quality"
        )
        edits = any(e.picture is not None for e in examples)
        contenders = [
            schedules.schedule_contender(c, arguments.steps, edits=edits) for c in contenders
        ]
        if any(c.scheduled for c in contenders):
            notes.append("*: the cache skips fixed steps, chosen on Spark")
        others = [c for c in others if not baselines.decides_by_content(c)]
    elif len(examples) < MIN_EXAMPLES:
        notes.append(
            f"{count_of(len(examples), 'example')} cannot tell whether a method beats plain at "
            f"fewer steps: give {MIN_EXAMPLES} or more"
        )
    if missing := quality.missing():
        notes.append(f"not installed: {', '.join(missing)}; {extra_hint('bench')}")
    if why := why_unavailable():
        notes.append(f"energy and utilization are not measured: {why}")
    return [*contenders, *others], notes


def _empty_result(arguments: argparse.Namespace, examples: int, notes: list[str]) -> dict[str, Any]:
    from fluxfire.bench import stamp

    settings = {
        "examples": examples,
        "steps": arguments.steps,
        "rounds": arguments.rounds,
        "warmups": arguments.warmups,
        "seed": arguments.seed,
    }
    return {
        "benchmark": "bench",
        "schema": 2,
        **stamp(),
        "model": arguments.model,
        "random_weights": arguments.model in RANDOM,
        "settings": settings,
        "notes": notes,
        "rows": [],
    }


def _write(
    arguments: argparse.Namespace,
    result: dict[str, Any],
    rows: Sequence[Row],
    examples: Sequence[Example],
) -> None:
    """Write the files that the command line asks for; the raw result is written already."""
    note(f"saved the raw result: {arguments.output}")
    if arguments.csv is not None:
        from fluxfire.bench import tables

        arguments.csv.write_text(tables.as_csv(result), encoding="utf-8")
        note(f"saved the numbers: {arguments.csv}")
    if arguments.html is not None:
        from fluxfire.bench import page

        arguments.html.write_text(page.page(result, rows, examples), encoding="utf-8")
        note(f"saved the page: {arguments.html}")
    if arguments.plots is not None:
        from fluxfire.bench import plots

        arguments.plots.mkdir(parents=True, exist_ok=True)
        for name, svg in plots.draw(result).items():
            stem = "".join(c if c.isalnum() else "_" for c in name)
            (arguments.plots / f"{stem}.svg").write_text(svg, encoding="utf-8")
        note(f"saved the plots: {arguments.plots}")
