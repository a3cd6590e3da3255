"""The command `fluxfire`: one module for each group of commands.

Each of those modules has `add(commands)`, which adds its commands to the parser. Heavy libraries
are imported inside the commands, so that `--help` and a wrong argument are answered at once.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

from fluxfire._version import __version__
from fluxfire.cli import bench, bisect, demo, look, megacache, run, serve, tune
from fluxfire.cli.options import UsageError, note, note_option
from fluxfire.errors import FluxfireError, PlanError

__all__ = ["UsageError", "main"]

_MODULES = (
    look,
    run,
    bench,
    tune,
    bisect,
    megacache,
    demo,
    serve,
)  # in the order of `fluxfire --help`


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: arguments; those of the process by default.

    Returns:
        0, or 1 after an error (printed as `error: …`), or 130 after Ctrl-C; argparse itself exits
        with 2, as does a call without a command, which shows them.
    """
    arguments = _parser().parse_args(argv)
    arguments.wait_policy = os.environ.get("OMP_WAIT_POLICY")  # the user's own, for `doctor`
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # it warns of what nobody uses
    # Threads that spin while they wait can slow a shared CPU down tenfold.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    command: Callable[[argparse.Namespace], int] = arguments.command
    try:
        return command(arguments)
    except FluxfireError as error:
        note(f"error: {error}")
        if isinstance(error, PlanError):
            note_option(error.suggestion)
        return 1
    except BrokenPipeError:  # as when piped into head; nobody is left to tell
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:  # Ctrl-C, which is no fault to be traced
        return 128 + signal.SIGINT


def _no_command(parser: argparse.ArgumentParser) -> NoReturn:
    """Show what there is to type."""
    parser.print_help(sys.stderr)
    parser.exit(2)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("fluxfire", description="Faster FLUX.1 Kontext pipelines.")
    parser.add_argument("--version", action="version", version=f"fluxfire {__version__}")
    parser.set_defaults(command=lambda _: _no_command(parser))
    commands = parser.add_subparsers(metavar="COMMAND")
    for module in _MODULES:
        module.add(commands)
    return parser
