"""Functions with which every command prints, and the error for a command line that cannot work."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

from fluxfire.errors import FluxfireError
from fluxfire.protocol import Pass
from fluxfire.text import spell_non_defaults

_COMPILING = "compiling, once; may take minutes"


class UsageError(FluxfireError):
    """The command line cannot work as typed; the command exits with 2."""

    def __init__(self, message: str, suggestion: Sequence[Pass] = ()) -> None:
        super().__init__(message)
        self.suggestion = suggestion


@contextmanager
def usage_errors() -> Iterator[None]:
    """Turn fluxfire's errors into usage errors, while a command reads its options."""
    try:
        yield
    except UsageError:
        raise
    except FluxfireError as error:
        raise UsageError(str(error), getattr(error, "suggestion", ())) from error


def say(text: object = "") -> None:
    """Print a result to standard output."""
    print(text)  # noqa: T201 - this is a command line


def say_json(data: object) -> None:
    """Print a result as JSON; what JSON cannot hold becomes text."""
    say(json.dumps(data, indent=2, default=str))


def note(text: str) -> None:
    """Print a remark to standard error, so that standard output holds results only."""
    print(text, file=sys.stderr)  # noqa: T201 - this is a command line


def note_suggestion(passes: Sequence[Pass]) -> None:
    """Print the `--passes` that gives a suggested list, if names alone can give it."""
    if passes and not any(map(spell_non_defaults, passes)):
        note(f"On the command line: --passes {','.join(p.name for p in passes)}")


@contextmanager
def edits_bar(*, compiles: bool) -> Iterator[Callable[[str], None]]:
    """Show a progress bar over edits.

    Args:
        compiles: whether something may compile; the bar then says when.

    Yields:
        A function to call before each edit, with the text to show.
    """
    from tqdm import tqdm

    if compiles:  # so that the first compilation is noticed, too
        import torch._dynamo  # noqa: F401
    with (
        tqdm(desc="starting", bar_format="{desc} [{elapsed}]", leave=False,
             dynamic_ncols=True, mininterval=0, miniters=1) as bar,
        ExitStack() as watching,
    ):  # fmt: skip

        def show(text: str) -> None:
            watching.close()  # resetting the compiler between edits ends a watch
            bar.set_description_str(text, refresh=False)
            bar.update()
            watching.enter_context(
                _watch_compilation(
                    lambda: bar.set_description_str(f"{text}: {_COMPILING}"),
                    lambda: bar.set_description_str(text),
                )
            )

        yield show


@contextmanager
def announce_compilation() -> Iterator[None]:
    """Print a line above the progress bar when the first compilation begins."""
    from tqdm import tqdm

    told: list[str] = []

    def announce() -> None:
        if not told:
            told.append(_COMPILING)
            tqdm.write(_COMPILING, file=sys.stderr)

    with _watch_compilation(announce, lambda: None):
        yield


@contextmanager
def _watch_compilation(begin: Callable[[], None], end: Callable[[], None]) -> Iterator[None]:
    """Call `begin` and `end` when torch compiles."""
    from fluxfire.reporting.compile_counts import on_compilation

    with on_compilation(lambda _: begin(), lambda _: end()):
        yield
