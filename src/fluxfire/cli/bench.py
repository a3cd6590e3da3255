"""The command `bench`: measure passes alone and stacked, beside controls and baselines."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fluxfire.cli.options import (
    Commands,
    UsageError,
    add_command,
    add_examples,
    add_model,
    add_passes,
    add_sampling,
    edits_bar,
    examples_wanted,
    load_model,
    note,
    say,
    wanted,
)
from fluxfire.cli.pictures import check_size
from fluxfire.cli.values import counts, positive, size, whole
from fluxfire.text import extra_hint


def add(commands: Commands) -> None:
    """Add `bench`.

    Args:
        commands: the commands there are already.
    """
    parser = add_command(
        commands, "bench", bench,
        "measure passes, alone and stacked, beside plain with fewer steps and other libraries",
    )  # fmt: skip
    add_model(parser)
    parser.add_argument(
        "--random-full",
        action="store_const", const="random-full", dest="model",
        help="the full architecture with random weights, as --model random-full: time and "
        "memory are real, pictures are noise",
    )  # fmt: skip
    add_passes(parser)
    add_examples(parser, 8)
    add_sampling(parser)
    parser.add_argument("--size", type=size, help="WIDTHxHEIGHT (default: each picture's shape)")
    parser.add_argument(
        "--rounds", type=positive, default=2, help="turns of each contender (default: %(default)s)"
    )
    parser.add_argument(
        "--warmups", type=whole, default=1,
        help="untimed runs of two steps before each turn; 0 times the first run too "
        "(default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--only-stack", action="store_true",
        help="measure the whole list only, without each pass alone and partial lists",
    )  # fmt: skip
    parser.add_argument(
        "--plain-steps", type=counts, default=[], metavar="N,N,…",
        help="also run the plain pipeline with these numbers of steps; each lossy list gets plain "
        "at its own work anyway",
    )  # fmt: skip
    parser.add_argument(
        "--baselines", metavar="LIST",
        help="other libraries to compare with: cache-dit, mag-cache, para-attn, torchao, separated "
        "by commas, or none (default: all that are installed)",
    )  # fmt: skip
    parser.add_argument("--out", type=Path, default=Path("bench.json"), help="default: %(default)s")
    parser.add_argument("--csv", type=Path, help="a line of numbers for each contender")
    parser.add_argument("--html", type=Path, help="a page with tables, plots and pictures")
    parser.add_argument("--plots", type=Path, metavar="FOLDER", help="where to write plots (SVG)")


def bench(arguments: argparse.Namespace) -> int:
    """Measure.

    Args:
        arguments: the command's.

    Returns:
        The exit status: 1 if a contender failed; the others' rows are kept.

    Raises:
        UsageError: if nothing can be measured so.
    """
    _check(arguments)
    passes = wanted(arguments)
    examples = examples_wanted(arguments)
    from fluxfire.bench import Workload, keeping, measure, tables

    pipe = load_model(arguments.model)
    pipe.set_progress_bar_config(disable=True)
    load = Workload.usual(pipe, steps=arguments.steps, size=arguments.size)
    contenders, notes = _contenders(arguments, passes, examples)
    result = _result(arguments, len(examples), notes)
    with edits_bar() as tell:
        rows = measure(
            pipe, contenders, [load], examples, rounds=arguments.rounds,
            warmups=arguments.warmups, seed=arguments.seed, on_edit=tell,
            on_rows=keeping(result, arguments.out),
        )  # fmt: skip
    say(tables.as_text(result))
    _write(arguments, result, rows, examples)
    return 1 if any(row.error for row in rows) else 0


def _check(arguments: argparse.Namespace) -> None:
    """Refuse what would fail after minutes of work."""
    if arguments.size is not None:
        check_size(*arguments.size)
    if arguments.warmups < 0:
        raise UsageError(f"--warmups {arguments.warmups} is negative")
    for path in (arguments.out, arguments.csv, arguments.html):
        if path is not None and not path.resolve().parent.is_dir():
            raise UsageError(f"cannot write {path}: there is no folder {path.resolve().parent}")
        if path is not None and path.is_dir():
            raise UsageError(f"cannot write {path}: it is a folder")
    given = [p.resolve() for p in (arguments.out, arguments.csv, arguments.html) if p is not None]
    if len(set(given)) < len(given):
        raise UsageError("--out, --csv and --html must name different files")
    if arguments.plots is not None:
        if arguments.plots.exists() and not arguments.plots.is_dir():
            raise UsageError(f"cannot write plots to {arguments.plots}: it is no folder")
        from importlib.util import find_spec

        if find_spec("matplotlib") is None:
            raise UsageError(f"plots need matplotlib; {extra_hint('bench')}")
    if arguments.model == "random-full":
        import torch

        if not torch.cuda.is_available():
            raise UsageError(
                "--random-full measures a CUDA device, and there is none here: an edit of this "
                "size takes hours on a CPU; the default --model spark runs anywhere"
            )


def _names(asked: str | None) -> list[str] | None:
    """Read `--baselines`: None is all that are installed."""
    if asked is None:
        return None
    return [] if asked == "none" else [name.strip() for name in asked.split(",")]


def _contenders(
    arguments: argparse.Namespace, passes: Sequence[Any], examples: Sequence[Any]
) -> tuple[list[Any], list[str]]:
    """Return what is compared, and notes that belong to the tables."""
    from fluxfire import loading
    from fluxfire.bench import Contender, baselines, ladder, quality, schedules
    from fluxfire.bench.intervals import FEWEST
    from fluxfire.bench.power import unavailable

    notes = []
    contenders = ladder(passes, partial=not arguments.only_stack)
    contenders += [Contender("plain").with_steps(n) for n in arguments.plain_steps]
    others = baselines.choose(_names(arguments.baselines), steps=arguments.steps)
    if arguments.model in loading.RANDOM:
        notes.append(
            "the weights are random: pictures are noise, so their comparison only tells exact "
            "passes from lossy ones; quality on Kontext was not measured"
        )
        edits = any(e.picture is not None for e in examples)
        contenders = [schedules.scheduled(c, arguments.steps, edits=edits) for c in contenders]
        if any(c.scheduled for c in contenders):
            notes.append("*: the steps that a cache skips were chosen on Spark, and fixed")
        others = [c for c in others if not baselines.decides_by_content(c)]
    elif len(examples) < FEWEST:
        notes.append(
            f"{len(examples)} examples are too few to tell a method from plain with fewer steps: "
            f"give {FEWEST} or more"
        )
    if missing := quality.missing():
        notes.append(f"not installed: {', '.join(missing)}; {extra_hint('bench')}")
    if why := unavailable():
        notes.append(f"energy and utilisation are not measured: {why}")
    return [*contenders, *others], notes


def _result(arguments: argparse.Namespace, examples: int, notes: list[str]) -> dict[str, Any]:
    from fluxfire import loading
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
        "random_weights": arguments.model in loading.RANDOM,
        "settings": settings,
        "notes": notes,
        "rows": [],
    }


def _write(
    arguments: argparse.Namespace, result: dict[str, Any], rows: Sequence[Any], examples: Any
) -> None:
    note(f"the raw result is in {arguments.out}")
    if arguments.csv is not None:
        from fluxfire.bench import tables

        arguments.csv.write_text(tables.as_csv(result), encoding="utf-8")
        note(f"the numbers are in {arguments.csv}")
    if arguments.html is not None:
        from fluxfire.bench import page

        arguments.html.write_text(page.page(result, rows, examples), encoding="utf-8")
        note(f"the page is {arguments.html}")
    if arguments.plots is not None:
        from fluxfire.bench import plots

        arguments.plots.mkdir(parents=True, exist_ok=True)
        for name, svg in plots.draw(result).items():
            stem = "".join(c if c.isalnum() else "_" for c in name)
            (arguments.plots / f"{stem}.svg").write_text(svg, encoding="utf-8")
        note(f"the plots are in {arguments.plots}")
