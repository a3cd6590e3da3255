"""The fastest list of passes within a stated budget, and how it was found."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from fluxfire import api, recipes
from fluxfire.bench.budget import Budget
from fluxfire.bench.examples import Example
from fluxfire.bench.results import stamp
from fluxfire.bench.search import Candidate, Family, Search, Trial, names
from fluxfire.bench.tables import decibels
from fluxfire.bench.workload import Workload
from fluxfire.errors import BenchError
from fluxfire.passes import Compile, FirstBlockCache, QKVFusion
from fluxfire.planner import order
from fluxfire.protocol import Pass
from fluxfire.text import human_seconds, table

PUBLISHABLE = 256
"""Examples that must lie behind a minimum before it is worth publishing."""
_THRESHOLDS = (
    0.03, 0.04, 0.05, 0.065, 0.08, 0.1, 0.12, 0.15, 0.18, 0.22, 0.27, 0.33, 0.4, 0.5, 0.65, 0.8,
)  # fmt: skip


@dataclass(frozen=True)
class Tuned:
    """What was found. Prints as what was tried, and the list as Python.

    Attributes:
        passes: the fastest list within the budget; empty if only the plain pipeline is.
        budget: as stated.
        plain: the plain pipeline on the examples held out.
        checked: these passes on them: examples that the search had not seen.
        trials: in the order made.
    """

    passes: tuple[Pass, ...]
    budget: Budget
    plain: Trial
    checked: Trial
    trials: tuple[Trial, ...]

    @property
    def speed(self) -> float:
        """How many times as fast as the plain pipeline, by the medians of the edits held out."""
        return self.plain.seconds / self.checked.seconds

    def to_python(self) -> str:
        """Return lines of Python that make the list."""
        homes: dict[str, set[str]] = {}
        for pass_ in self.passes:
            cls = type(pass_)
            home = "fluxfire.passes" if cls.__module__.startswith("fluxfire.") else cls.__module__
            homes.setdefault(home, set()).add(cls.__name__)
        lines = [f"from {home} import {', '.join(sorted(of))}" for home, of in homes.items()]
        return "\n".join([*lines, "passes = [", *(f"    {p!r}," for p in self.passes), "]"])

    def to_dict(self) -> dict[str, Any]:
        """What was found and tried, as plain data."""
        return {
            "budget": asdict(self.budget),
            "speed": self.speed,
            "plain": _told(self.plain),
            "checked": _told(self.checked),
            "trials": [_told(trial) for trial in self.trials],
        }

    def save(self, path: str | Path) -> None:
        """Write the list where `optimize(pipe, "….json")` finds it, and how it was found.

        Raises:
            PlanError: the name does not end in `.json`, or a setting cannot be written.
            OSError: the file cannot be written.
        """
        recipes.write(self.passes, Path(path), **stamp(), tuned=self.to_dict())

    def __str__(self) -> str:
        head = (
            "passes",
            "on",
            "examples",
            "an edit",
            "speed",
            "worst PSNR, dB",
            "right",
            "verdict",
        )
        told = table(head, [self._row(trial) for trial in (*self.trials, self.checked)])
        return f"{told}\n\n{self._verdict()}\n\n{self.to_python()}"

    def _row(self, trial: Trial) -> tuple[str, ...]:
        right = trial.quality.success
        return (
            names(trial.passes),
            "held out" if trial.part == "check" else "search",
            f"{trial.examples}",
            human_seconds(trial.seconds),
            f"{self.plain.seconds / trial.seconds:.2f}x",
            decibels(trial.quality.worst_psnr),
            "-" if right is None else f"{right:.1%}",
            trial.exceeded or "within",
        )

    def _verdict(self) -> str:
        if not self.passes:
            return f"Nothing faster than the plain pipeline keeps to the budget ({self.budget})."
        checked = self.checked
        said = (
            f"Within the budget ({self.budget}) on {checked.examples} examples that the search "
            f"did not see: {self.speed:.2f} times as fast as plain, worst PSNR "
            f"{decibels(checked.quality.worst_psnr)} dB"
        )
        right, plainly = checked.quality.success, self.plain.quality.success
        if right is not None and plainly is not None:
            said += f", {right:.1%} of the edits right (plain {plainly:.1%})"
        if checked.examples < PUBLISHABLE:
            said += (
                f".\nA minimum over {checked.examples} examples is a rough one: let {PUBLISHABLE} "
                f"or more check what you publish"
            )
        return f"{said}."


def _told(trial: Trial) -> dict[str, Any]:
    return {
        "passes": [repr(p) for p in trial.passes],
        "part": trial.part,
        "seconds": trial.seconds,
        "exceeded": trial.exceeded,
        **{k: v for k, v in trial.quality.to_dict().items() if k != "each"},
    }


def bases() -> list[Family]:
    """Return the exact lists of which the fastest carries the lossy ones."""
    return [Family((Compile(),)), Family((QKVFusion(), Compile()))]


def caches(base: Sequence[Pass] = ()) -> list[Family]:
    """Return the lossy lists that are searched by default, on top of an exact one."""
    cache = FirstBlockCache()
    kinds = (
        cache,
        replace(cache, distance="noise"),
        replace(cache, max_consecutive_hits=4),
        replace(cache, predict="quadratic"),
        replace(cache, predict="hold"),
    )
    return [
        Family(tuple(order([*base, kind])), tuple(replace(kind, threshold=t) for t in _THRESHOLDS))
        for kind in kinds
    ]


def tune(
    pipe: Any,
    examples: Sequence[Example],
    budget: Budget,
    *,
    candidates: Sequence[Family] | None = None,
    workload: Workload | None = None,
    seed: int = 0,
    on_edit: Callable[[str], None] = lambda _: None,
) -> Tuned:
    """Find the fastest list of passes whose worst picture keeps to a budget.

    First the fastest of the exact lists is found. Then each lossy list's dial is turned as
    far as the budget allows, by halving: a trial ends with its first picture outside. What is
    fastest then is checked on examples that the search did not see, and turned back where
    one of these is outside. The worst example decides, not the mean.

    Args:
        pipe: a plain pipeline, with trained weights; it is plain again at the end, also after
            an exception.
        examples: two or more; a few (24 at most, half at most) are searched with, the others
            check.
        budget: what must hold beside the plain pipeline's own pictures.
        candidates: lists to search, in place of exact passes and caches.
        workload: how to edit; the pipeline's usual size and 28 steps by default.
        seed: of the first example's noise; each has its own.
        on_edit: is told what is being edited, before each edit.

    Raises:
        BenchError: fewer than two examples, or a budget that cannot be measured on them.
        PlanError: the pipeline is not plain, or a candidate cannot be applied to it.
    """
    if len(examples) < 2:  # noqa: PLR2004 - one to search with and one to check on
        raise BenchError(
            f"tune needs two examples or more, one to search with and one to check on; "
            f"there are {len(examples)}"
        )
    budget.check_measurable(checked=any(e.check for e in examples))
    with api.optimized(pipe, []):  # or it is not plain
        pass
    for family in candidates or ():
        api.plan(pipe, family.passes).raise_if_bad()
    with Search(pipe, examples, budget, workload or Workload.usual(pipe), seed, on_edit) as search:
        plain = search.begin()
        found = [plain]
        if candidates is None:
            found += _turned(search, bases())
            base = min(found, key=lambda c: c.trial.seconds)
            candidates = caches(base.family.passes)
        found += _turned(search, candidates)
        best = search.fastest(found)
    checked = search.check(plain)
    assert checked is not None  # noqa: S101 - the plain pipeline equals itself
    trials = tuple(t for t in search.trials if t is not best.trial)
    return Tuned(best.trial.passes, budget, checked.trial, best.trial, trials)


def _turned(search: Search, families: Sequence[Family]) -> list[Candidate]:
    """Turn the dials of the families that can be applied here."""
    applicable = [f for f in families if search.applies(f)]
    return [found for f in applicable if (found := search.turn(f)) is not None]
