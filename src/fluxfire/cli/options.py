"""What the commands share: options, the passes and the model that they ask for, and printing."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import Any, TypeAlias

from fluxfire.cli.values import positive, seed
from fluxfire.errors import FluxfireError
from fluxfire.protocol import Pass

_DEFAULT_MODEL = "spark"
_RANDOM_NOTE = (
    "note: {} has random weights: the result is noise, and only shows that all parts work"
)

# What `add_subparsers` returns; argparse has no public name for it.
Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"  # noqa: SLF001


class UsageError(FluxfireError):
    """The command line asks for something impossible."""


def say(text: object = "") -> None:
    """Print a command's result.

    Args:
        text: what to print; an empty line by default.
    """
    print(text)  # noqa: T201 - this is a command line


def note(text: str) -> None:
    """Print what is not the result itself, apart from it: on the standard error stream.

    Args:
        text: what to print.
    """
    print(text, file=sys.stderr)  # noqa: T201 - this is a command line


def add_command(
    commands: Commands, name: str, command: Callable[[argparse.Namespace], int], about: str
) -> argparse.ArgumentParser:
    """Add a command to the parser.

    Args:
        commands: the commands there are already.
        name: what the user types.
        command: what then runs; it returns the exit status.
        about: one line of help.

    Returns:
        The command's own parser, to which its options are added.
    """
    parser = commands.add_parser(name, help=about, description=about)
    parser.set_defaults(command=command)
    return parser


def add_model(parser: argparse.ArgumentParser) -> None:
    """Add `--model`.

    Args:
        parser: the command's parser.
    """
    parser.add_argument(
        "--model",
        default=_DEFAULT_MODEL,
        help="spark, a folder, a hub id, random-tiny or random-full (default: %(default)s)",
    )


def add_passes(parser: argparse.ArgumentParser) -> None:
    """Add `--preset` and `--passes`, which exclude each other; `wanted` reads them.

    Args:
        parser: the command's parser.
    """
    which = parser.add_mutually_exclusive_group()
    which.add_argument(
        "--preset", help="faithful or article (default: faithful; of demo: first-block-cache alone)"
    )
    which.add_argument("--passes", help="names in order, separated by commas, or none")


def add_sampling(parser: argparse.ArgumentParser) -> None:
    """Add `--seed` and `--steps`.

    Args:
        parser: the command's parser.
    """
    parser.add_argument("--seed", type=seed, default=0, help="default: %(default)s")
    parser.add_argument(
        "--steps", type=positive, default=28, help="denoising steps (default: %(default)s)"
    )


def wanted(arguments: argparse.Namespace) -> list[Pass]:
    """Find the passes asked for; names are checked before any model is loaded.

    Args:
        arguments: parsed by a parser with `add_passes`.

    Returns:
        The passes, in order.

    Raises:
        UsageError: if `--passes` holds no name.
    """
    from fluxfire import plugins, presets

    if arguments.preset is not None or arguments.passes is None:
        return list(presets.named(arguments.preset or "faithful"))
    if arguments.passes == "none":
        return []
    names = [name.strip() for name in arguments.passes.split(",") if name.strip()]
    if not names:
        raise UsageError(f"--passes {arguments.passes!r} names no pass; write none for none")
    return [plugins.make(name) for name in names]


def load(model: str) -> Any:
    """Load a model, with a note if its weights are random.

    Args:
        model: the value of `--model`.

    Returns:
        The pipeline.
    """
    from fluxfire import loading

    if model in loading.RANDOM:
        note(_RANDOM_NOTE.format(model))
    return loading.load(model)
