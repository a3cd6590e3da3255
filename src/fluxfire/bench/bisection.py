"""Finds the first pass of a list that breaks a picture."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from fluxfire import api
from fluxfire.diffusers_types import DiffusersPipeline
from fluxfire.planning.resolve import Passes
from fluxfire.protocol import Pass
from fluxfire.text import table


@dataclass(frozen=True)
class Attempt:
    """A run with the first passes of a list.

    Attributes:
        count: number of passes that were applied.
        last: name of the last applied pass.
        broken: whether the picture is broken.
        note: the judge's note, such as the PSNR.
    """

    count: int
    last: str
    broken: bool
    note: str


@dataclass(frozen=True)
class BisectResult:
    """The result of `bisect`. Prints as a table and a sentence.

    Attributes:
        passes: the searched list.
        attempts: the runs in order; the first run had the whole list.
        first: position of the first pass that breaks the picture; None if no pass does.
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
            verdict = "no pass of the list breaks it"
        else:
            found = self.passes[self.first]
            verdict = f"the first pass that breaks it: {found.name}, {found!r}"
        return f"{table(('passes', 'picture', 'why'), rows)}\n{verdict}"


def bisect(
    pipe: DiffusersPipeline,
    passes: Passes,
    judge: Callable[[DiffusersPipeline], tuple[bool, str]],
) -> BisectResult:
    """Find the first pass of a list that breaks a picture.

    It halves the list, as git bisect halves a history: a list of n passes takes one run of the
    whole list and about log2(n) more runs. Like git bisect, it assumes that no later pass repairs
    the picture.

    Args:
        pipe: a plain pipeline; it is plain again afterwards, even after an exception.
        passes: as for `optimize`: passes in order, or the name of a preset.
        judge: function that makes the picture with the given pipeline, and returns whether the
            picture is broken, and a note for the table.

    Raises:
        PlanError: the list or its first passes cannot be applied, or the pipeline is not plain.
    """
    planned = api.plan(pipe, passes)
    planned.raise_if_bad()
    planned_passes = tuple(step.pass_ for step in planned.steps)
    tried: dict[int, Attempt] = {}

    def broken(count: int) -> bool:
        with api.optimized(pipe, planned_passes[:count]):
            found, note = judge(pipe)
        tried[count] = Attempt(count, planned_passes[count - 1].name, found, note)
        return found

    first: int | None = None
    if planned_passes and broken(len(planned_passes)):
        right, wrong = 0, len(planned_passes)
        while wrong - right > 1:
            middle = (right + wrong) // 2
            right, wrong = (right, middle) if broken(middle) else (middle, wrong)
        first = wrong - 1
    return BisectResult(planned_passes, tuple(tried.values()), first)
