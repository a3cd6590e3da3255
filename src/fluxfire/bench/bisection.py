"""Which pass breaks a picture: the first of a list with which it is no longer right."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from fluxfire import api
from fluxfire.planning.resolve import Passes
from fluxfire.protocol import Pass
from fluxfire.text import table


@dataclass(frozen=True)
class Attempt:
    """A run with the first passes of a list.

    Attributes:
        count: how many of them.
        last: the name of the last of them.
        broken: whether the picture was.
        note: what the judge said, such as its PSNR.
    """

    count: int
    last: str
    broken: bool
    note: str


@dataclass(frozen=True)
class Culprit:
    """What a search found. Prints as a table and a sentence.

    Attributes:
        passes: the list that was searched.
        attempts: in the order tried; the whole list is the first.
        first: position in the list of the first pass that breaks the picture; None if none does.
    """

    passes: tuple[Pass, ...]
    attempts: tuple[Attempt, ...]
    first: int | None

    def __str__(self) -> str:
        rows = [
            (f"the first {t.count} (up to {t.last})", "broken" if t.broken else "right", t.note)
            for t in self.attempts
        ]
        if self.first is None:
            said = "no pass of the list breaks it"
        else:
            guilty = self.passes[self.first]
            said = f"the first pass that breaks it: {guilty.name}, {guilty!r}"
        return f"{table(('passes', 'picture', 'why'), rows)}\n{said}"


def bisect(pipe: Any, passes: Passes, judge: Callable[[Any], tuple[bool, str]]) -> Culprit:
    """Find the first pass of a list with which a picture is broken.

    Halves the list, as git bisect halves a history: a list of n passes takes about log2(n)
    runs beyond that of the whole. Like it, it takes for granted that what one pass broke no
    later pass mends.

    Args:
        pipe: a plain pipeline; it is plain again at the end, also after an exception.
        passes: as for `optimize`: passes in order, or the name of a preset.
        judge: makes the picture with the pipeline it is given, and returns whether it is
            broken, and a note for the table.

    Raises:
        PlanError: the list, or a beginning of it, cannot be applied, or the pipeline is not plain.
    """
    planned = api.plan(pipe, passes)
    planned.raise_if_bad()
    wanted = tuple(step.pass_ for step in planned.steps)
    tried: dict[int, Attempt] = {}

    def broken(count: int) -> bool:
        with api.optimized(pipe, wanted[:count]):
            found, note = judge(pipe)
        tried[count] = Attempt(count, wanted[count - 1].name, found, note)
        return found

    first: int | None = None
    if wanted and broken(len(wanted)):
        right, wrong = 0, len(wanted)
        while wrong - right > 1:
            middle = (right + wrong) // 2
            right, wrong = (right, middle) if broken(middle) else (middle, wrong)
        first = wrong - 1
    return Culprit(wanted, tuple(tried.values()), first)
