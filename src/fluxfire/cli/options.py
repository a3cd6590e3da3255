"""What the commands share: options, the passes and the model that they ask for, and printing."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeAlias

from fluxfire.cli.values import positive, seed, words
from fluxfire.errors import FluxfireError
from fluxfire.protocol import Pass
from fluxfire.text import own_settings

_DEFAULT_MODEL = "spark"
MOST_EXAMPLES = 5000
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


def note_option(passes: Sequence[Pass]) -> None:
    """Note how a suggested list is asked for here, where names alone can.

    Args:
        passes: the list; nothing is noted of none.
    """
    if passes and not any(map(own_settings, passes)):
        note(f"On the command line: --passes {','.join(p.name for p in passes)}")


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


def add_passes(parser: argparse.ArgumentParser, default: str = "faithful") -> None:
    """Add `--preset` and `--passes`, which exclude each other; `wanted` reads them.

    Args:
        parser: the command's parser.
        default: what the help says is done without either.
    """
    which = parser.add_mutually_exclusive_group()
    which.add_argument(
        "--preset",
        help="faithful (nothing lossy), balanced or fast (both skip steps: lossy), article, or a "
        f"file that tune wrote (default: {default})",
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


def add_examples(parser: argparse.ArgumentParser, n: int) -> None:
    """Add what to edit: `-n`, `--examples`, or `--image` with `--prompt`.

    Args:
        parser: the command's parser.
        n: how many of Spark's held-out edits by default.
    """
    what = parser.add_mutually_exclusive_group()
    what.add_argument(
        "-n", type=positive, default=n, help="held-out edits of Spark's (default: %(default)s)"
    )
    what.add_argument(
        "--examples", type=Path, metavar="FILE",
        help='your own: lines such as {"image": "cat.jpg", "prompt": "make it night"}',
    )  # fmt: skip
    what.add_argument("--image", help="a single picture of your own")
    parser.add_argument("--prompt", type=words, help="the instruction for it")


def examples_wanted(arguments: argparse.Namespace) -> list[Any]:
    """Read or draw the examples asked for.

    Args:
        arguments: parsed by a parser with `add_examples`.

    Raises:
        UsageError: if `--image` and `--prompt` are not given both, or neither.
        ExampleError: a file of examples cannot be used.
        PictureError: the picture cannot be read.
    """
    check_pair(arguments)
    from fluxfire.bench import Example, held_out, read_examples
    from fluxfire.pictures import read_picture

    if arguments.examples is not None:
        return read_examples(arguments.examples)
    if arguments.n > MOST_EXAMPLES:
        raise UsageError(f"-n {arguments.n} is more than {MOST_EXAMPLES}, the most that are drawn")
    if arguments.image is not None:
        return [Example(arguments.prompt, read_picture(arguments.image))]
    return held_out(arguments.n)


@contextmanager
def edits_bar(total: int | None = None) -> Iterator[Callable[[str], None]]:
    """Show a progress bar over edits.

    Args:
        total: how many there will be, if that is known.

    Yields:
        What to call before each edit, with words that say which it is.
    """
    from tqdm import tqdm

    shown = "{desc} [{elapsed}]" if total is None else None
    with tqdm(
        desc="starting", total=total, unit="edit", bar_format=shown, leave=False,
        dynamic_ncols=True, mininterval=0, miniters=1,
    ) as bar:  # fmt: skip

        def tell(what: str) -> None:
            bar.set_description_str(what, refresh=False)
            bar.update()

        yield tell


def check_pair(arguments: argparse.Namespace) -> None:
    """Check that `--image` and `--prompt` are given both, or neither.

    Args:
        arguments: parsed by a parser with both.

    Raises:
        UsageError: if one of them is missing.
    """
    if (arguments.image is None) != (arguments.prompt is None):
        raise UsageError("--image and --prompt go together: give both, or neither")


def wanted(arguments: argparse.Namespace) -> list[Pass]:
    """Find the passes asked for; names are checked before any model is loaded.

    Args:
        arguments: parsed by a parser with `add_passes`.

    Returns:
        The passes, in order.

    Raises:
        PlanError: if there is no such preset, file or pass.
    """
    from fluxfire.planning.resolve import chosen

    return chosen(arguments.preset, arguments.passes)


def load_model(model: str) -> Any:
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
