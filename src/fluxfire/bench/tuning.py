"""The fastest list of passes within a stated budget, and how it was found."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from fluxfire import api, recipes
from fluxfire.bench.budget import Budget
from fluxfire.bench.contenders import check_plain
from fluxfire.bench.examples import Example
from fluxfire.bench.prices import Prices
from fluxfire.bench.quality import Quality
from fluxfire.bench.results import stamp
from fluxfire.bench.search import Candidate, Family, Search, Trial, names
from fluxfire.bench.tables import decibels
from fluxfire.bench.workload import Workload
from fluxfire.errors import BenchError
from fluxfire.passes import Compile, FirstBlockCache, FusedBlocks, ReferenceCache
from fluxfire.protocol import Pass
from fluxfire.resolve import order
from fluxfire.text import human_seconds, table

PUBLISHABLE = 256
"""Examples that must lie behind a minimum before it is worth publishing."""
_THRESHOLDS = (
    0.03, 0.04, 0.05, 0.065, 0.08, 0.1, 0.12, 0.15, 0.18, 0.22, 0.27, 0.33, 0.4, 0.5, 0.65, 0.8,
)  # fmt: skip


_SPACINGS = (0.05, 0.1, 0.15, 0.2, 0.25, 0.33, 0.4, 0.5, 0.65)


@dataclass(frozen=True)
class Tuned:
    """What was found. Prints as what was tried, and the list as Python.

    Attributes:
        passes: the fastest list within the budget; empty if only the plain pipeline is.
        budget: as stated.
        workload: how the examples were edited: thresholds hold for its steps and size.
        prices: what steps were taken to cost; None if speed was measured.
        seed: of the first example's noise.
        plain: the plain pipeline on the examples that confirm.
        confirmed: these passes on them.
        attempts: how many lists were tried on these examples; the first, if 1.
        trials: all, in the order made.
    """

    passes: tuple[Pass, ...]
    budget: Budget
    workload: Workload
    prices: Prices | None
    seed: int
    plain: Trial
    confirmed: Trial
    attempts: int
    trials: tuple[Trial, ...]

    @property
    def speed(self) -> float:
        """How many times as fast as the plain pipeline: the median over the confirming edits."""
        return self.confirmed.speed

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
            "workload": asdict(self.workload),
            "prices": asdict(self.prices) if self.prices else None,
            "seed": self.seed,
            "attempts": self.attempts,
            "plain": _told(self.plain),
            "confirmed": _told(self.confirmed),
            "trials": [_told(trial) for trial in self.trials],
        }

    def save(self, path: str | Path) -> None:
        """Write the list where `optimize(pipe, "….json")` finds it, and how it was found.

        Raises:
            PlanError: the name does not end in `.json`, or a pass cannot be written.
            OSError: the file cannot be written.
        """
        recipes.write(self.passes, Path(path), **stamp(), tuned=self.to_dict())

    def __str__(self) -> str:
        head = (
            "passes",
            "to",
            "examples",
            "an edit",
            "speed",
            "worst PSNR, dB",
            "right (plain)",
            "verdict",
        )
        told = table(head, map(line, self.trials))
        return f"{told}\n\n{self._verdict()}\n\n{self.to_python()}"

    def _verdict(self) -> str:
        quality = self.confirmed.quality
        if not self.passes or quality is None:
            return f"Nothing faster than the plain pipeline keeps to the budget ({self.budget})."
        said = (
            f"Within the budget ({self.budget}) on {self.confirmed.examples} examples that nothing "
            f"was chosen by: {self.speed:.2f} times as fast as plain"
            f"{' at the prices given' if self.prices else ''}, worst PSNR "
            f"{decibels(quality.worst_psnr)} dB"
        )
        plain = self.plain.quality
        if plain is not None and quality.success is not None and plain.success is not None:
            said += f", {quality.success:.1%} of the edits right (plain {plain.success:.1%})"
            said += self._lost(plain, quality)
        if self.attempts > 1:
            said += (
                f".\n{self.attempts} lists were tried on them, since faster ones were outside the "
                f"budget there: so they did choose, a little"
            )
        if self.confirmed.examples < PUBLISHABLE:
            said += (
                f".\nA minimum over {self.confirmed.examples} examples is a rough one: let "
                f"{PUBLISHABLE} or more confirm what you publish"
            )
        return f"{said}."

    def _lost(self, plain: Quality, quality: Quality) -> str:
        """Say how many edits fewer are right than without passes, and what limits that."""
        lost = plain.right.count(True) - quality.right.count(True)
        if lost <= 0:
            return ""
        checked = sum(right is not None for right in plain.right)
        limit = (
            "this budget does not limit that; --max-lost 0.01 (max_lost=0.01 in Python) allows one "
            "in a hundred"
            if self.budget.max_lost is None
            else f"--max-lost {self.budget.max_lost:g} allows that"
        )
        return f".\nAgainst the plain pipeline {lost} of {checked} edits are lost: {limit}"


def line(trial: Trial) -> tuple[str, ...]:
    """Write a trial as cells of a table."""
    quality = trial.quality
    if quality is None:
        return (names(trial.passes), trial.part, "-", "-", "-", "-", "-", f"failed: {trial.why}")
    return (
        names(trial.passes),
        trial.part,
        f"{trial.examples}",
        human_seconds(trial.seconds),
        f"{trial.speed:.2f}x",
        decibels(quality.worst_psnr),
        _right(quality.success, trial.plain_success),
        trial.why or trial.verdict,
    )


def _right(share: float | None, plain: float | None) -> str:
    """Write how many edits are right, and how many of the same without passes."""
    return "-" if share is None or plain is None else f"{share:.1%} ({plain:.1%})"


def _told(trial: Trial) -> dict[str, Any]:
    told = trial.quality.to_dict() if trial.quality else {}
    failed = trial.quality is None
    return {
        "passes": [repr(p) for p in trial.passes],
        "part": trial.part,
        "verdict": trial.verdict,
        "why": trial.why,
        "seconds": None if failed else trial.seconds,
        "speed": None if failed else trial.speed,
        "plain_success": trial.plain_success,
        **{k: v for k, v in told.items() if k != "each"},
    }


def bases() -> list[Family]:
    """Return the exact lists of which the fastest carries the lossy ones."""
    return [Family((Compile(),)), Family((FusedBlocks(), Compile()))]


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
    alone = [
        Family(tuple(order([*base, kind])), tuple(replace(kind, threshold=t) for t in _THRESHOLDS))
        for kind in kinds
    ]
    references = tuple(map(ReferenceCache, _SPACINGS))
    alone.append(Family(tuple(order([*base, references[0]])), references))
    both = [
        Family(
            tuple(order([*base, kind, ReferenceCache(spacing)])),
            tuple(replace(kind, threshold=t) for t in _THRESHOLDS),
        )
        for spacing in _SPACINGS[2::2]
        for kind in (cache, replace(cache, predict="quadratic"))
    ]
    return [*alone, *both]


def tune(
    pipe: Any,
    examples: Sequence[Example],
    budget: Budget,
    *,
    candidates: Sequence[Family] | None = None,
    workload: Workload | None = None,
    prices: Prices | None = None,
    seed: int = 0,
    on_edit: Callable[[str], None] = lambda _: None,
) -> Tuned:
    """Find the fastest list of passes whose worst picture keeps to a budget.

    First the fastest of the exact lists is found. Then each lossy list's dial is turned as
    far as the budget allows on a few examples, by halving. What is best then is tried on
    others, and turned back where one of these is outside. What is chosen so is confirmed on
    the rest, which nothing was chosen by. The worst example decides, not the mean; and what
    loses something must be faster by 2% or more than what does not.

    Args:
        pipe: a plain pipeline, with trained weights; it is plain again at the end, also after
            an exception.
        examples: three or more: at most 24, and a third, to search with; at most 96, and a
            third, to choose by; the rest confirms.
        budget: what must hold beside the plain pipeline's own pictures.
        candidates: lists to search, in place of exact passes and caches. One that fails is
            told among the trials, and left out.
        workload: how to edit; the pipeline's usual size and 28 steps by default.
        prices: what steps are taken to cost, in the place of what they take here; by default
            only caches are searched then, uncompiled, and what is found is for the compiled list
            that the prices are of.
        seed: of the first example's noise; each has its own.
        on_edit: is told what is being edited, before each edit.

    Raises:
        BenchError: fewer than three examples, or a budget that cannot be measured on them.
        PlanError: the pipeline is not plain, or a candidate cannot be applied to it.
    """
    if len(examples) < 3:  # noqa: PLR2004 - to search with, to choose by, and to confirm on
        raise BenchError(
            f"tune needs three examples or more, to search with, to choose by and to confirm on; "
            f"there are {len(examples)}"
        )
    budget.check_measurable(checked=any(e.check for e in examples))
    check_plain(pipe)
    for family in candidates or ():
        api.plan(pipe, family.passes).raise_if_bad()
    load = workload or Workload.usual(pipe)
    with Search(pipe, examples, budget, load, seed, on_edit, prices) as search:
        found: list[Candidate] = []
        if candidates is None and prices is not None:
            candidates = caches()
        elif candidates is None:
            found += _turned(search, bases())
            base = max([search.plain("search"), *found], key=lambda c: c.trial.worth)
            candidates = caches(base.family.passes)
        found += _turned(search, candidates)
        attempts = 0
        while True:
            chosen = search.choose(found)
            confirmed, more = search.confirm(chosen)
            attempts += more
            if confirmed.family.passes or not chosen.family.passes:
                break
            found = [c for c in found if c.family is not chosen.family]
        plain = search.plain("confirm")
    return Tuned(
        confirmed.trial.passes, budget, load, prices, seed, plain.trial, confirmed.trial, attempts,
        tuple(search.trials),
    )  # fmt: skip


def _turned(search: Search, families: Sequence[Family]) -> list[Candidate]:
    """Turn the dials of the families that can be applied here."""
    applicable = [f for f in families if search.applies(f)]
    return [found for f in applicable if (found := search.turn(f)) is not None]
