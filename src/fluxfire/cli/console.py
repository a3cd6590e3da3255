"""Functions with which every command prints, and the error for a command line that cannot work."""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

from fluxfire.errors import FluxfireError
from fluxfire.protocol import Pass
from fluxfire.text import spell_non_defaults

_COMPILING = "compiling, once; may take minutes"
_AN_EDIT = re.compile(r"\d+ of \d+$")
_LONG = 60.0  # seconds


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


def estimate_once(
    show: Callable[[str], None], edits: int, what: str, rest: str
) -> Callable[[str], None]:
    """Wrap a bar's function: after the first edit, print how long all edits will take.

    Nothing is printed if that is less than a minute.

    Args:
        show: the function that is called before each edit; the text of an edit ends in "1 of 8".
        edits: number of edits.
        what: what these edits are, as the plural noun.
        rest: what the estimate leaves out.
    """
    began: list[float] = []
    told: list[float] = []

    def show_and_estimate(text: str) -> None:
        if began and not told:
            told.append(edits * (time.perf_counter() - began[0]))
            if told[0] >= _LONG:
                from tqdm import tqdm

                tqdm.write(f"{edits} {what}: {_roughly(told[0])}; {rest}", file=sys.stderr)
        show(text)
        if not began and _AN_EDIT.search(text):
            began.append(time.perf_counter())

    return show_and_estimate


def _roughly(seconds: float) -> str:
    minutes = seconds / 60
    return f"about {minutes:.0f} min" if minutes < 90 else f"about {minutes / 60:.1f} h"  # noqa: PLR2004


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
