# PYTHON_ARGCOMPLETE_OK
"""The command `fluxfire`: one module for each command, or for a few that belong together.

Each of those modules has `add(commands)`, which adds its commands to the parser. A command first
checks its options, without torch; importing that takes seconds.
"""

from __future__ import annotations

import argparse
import importlib
import os
import signal
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import NoReturn

from fluxfire._version import __version__
from fluxfire.cli import (
    bench,
    bisect,
    calibrate,
    demo,
    info,
    megacache,
    quantize,
    run,
    serve,
    tune,
)
from fluxfire.cli.console import UsageError, note, note_suggestion
from fluxfire.errors import FluxfireError, PlanError

__all__ = ["UsageError", "main"]

_MODULES = (
    info,
    run,
    bench,
    calibrate,
    tune,
    bisect,
    megacache,
    quantize,
    demo,
    serve,
)  # in the order of `fluxfire --help`
_FAILURE, _USAGE_ERROR = 1, 2


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: the arguments; the process's own by default.

    Returns:
        0; 1 if the work failed, or the answer is no; 2 if the command line cannot work as typed;
        130 after Ctrl-C. argparse itself exits with 2.
    """
    parser = _make_parser()
    if "_ARGCOMPLETE" in os.environ:  # set by the shell while it completes a line
        with suppress(ImportError):
            importlib.import_module("argcomplete").autocomplete(parser)
    arguments = parser.parse_args(argv)
    arguments.wait_policy = os.environ.get("OMP_WAIT_POLICY")  # the user's setting, for `doctor`
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # users cannot act on its warnings
    # Threads that spin while they wait can slow a shared CPU down tenfold.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    command: Callable[[argparse.Namespace], int] = arguments.command
    try:
        for check in arguments.checks:
            check(arguments)
        return command(arguments)
    except FluxfireError as error:
        note(f"error: {error}")
        if isinstance(error, PlanError | UsageError):
            note_suggestion(error.suggestion)
        return _USAGE_ERROR if isinstance(error, UsageError) else _FAILURE
    except BrokenPipeError:  # the reader of a pipe has closed it, as head does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _FAILURE
    except KeyboardInterrupt:  # Ctrl-C is no fault that needs a traceback
        return 128 + signal.SIGINT


def _print_help(parser: argparse.ArgumentParser) -> NoReturn:
    """Print the list of commands, if the user typed none."""
    parser.print_help(sys.stderr)
    parser.exit(_USAGE_ERROR)


def _make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("fluxfire", description="Faster FLUX.1 Kontext pipelines.")
    parser.add_argument("--version", action="version", version=f"fluxfire {__version__}")
    parser.set_defaults(command=lambda _: _print_help(parser), checks=[])
    commands = parser.add_subparsers(metavar="COMMAND")
    for module in _MODULES:
        module.add(commands)
    return parser
