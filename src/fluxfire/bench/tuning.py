"""The fastest way to edit within a stated budget: a list of passes, or just fewer steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from fluxfire import api
from fluxfire.bench.budget import Budget
from fluxfire.bench.contenders import check_plain
from fluxfire.bench.examples import Example
from fluxfire.bench.prices import Prices
from fluxfire.bench.quality import Quality
from fluxfire.bench.results import stamp
from fluxfire.bench.search import Search
from fluxfire.bench.tables import decibels
from fluxfire.bench.trials import Candidate, Family, Trial, names
from fluxfire.bench.workload import Workload
from fluxfire.errors import BenchError
from fluxfire.passes import Compile, FirstBlockCache, FusedBlocks, ReferenceCache
from fluxfire.planning import recipes
from fluxfire.planning.resolve import order
from fluxfire.protocol import Pass
from fluxfire.text import count_of, human_seconds, table

PUBLISHABLE = 256
"""Examples that must lie behind a minimum before it is worth publishing."""
_THRESHOLDS = (
    0.03, 0.04, 0.05, 0.065, 0.08, 0.1, 0.12, 0.15, 0.18, 0.22, 0.27, 0.33, 0.4, 0.5,
)  # fmt: skip


_SPACINGS = (0.05, 0.1, 0.15, 0.2, 0.25, 0.33, 0.4, 0.5, 0.65)


@dataclass(frozen=True)
class Tuned:
    """What `tune` found. Prints as the trials, a verdict, and the list as Python.

    Attributes:
        passes: the fastest list within the budget; empty if only the plain pipeline is.
        steps: the number of steps to call the pipeline with, where fewer steps are the fastest;
            None means the workload's.
        budget: as stated.
        workload: how the examples were edited: thresholds hold for its steps and size.
        prices: the assumed cost of each kind of step; None if speed was measured.
        seed: of the first example's noise.
        plain: the plain pipeline on the examples that confirm.
        confirmed: what was found, on them.
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
    steps: int | None = None

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
        lines += ["passes = [", *(f"    {p!r}," for p in self.passes), "]"]
        if self.steps is not None:
            lines.append(f"steps = {self.steps}  # pipe(…, num_inference_steps=steps)")
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """What was found and tried, as plain data."""
        return {
            "budget": asdict(self.budget),
            "workload": asdict(self.workload),
            "prices": asdict(self.prices) if self.prices else None,
            "seed": self.seed,
            "attempts": self.attempts,
            "steps": self.steps,
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
            "passes", "part", "examples", "an edit", "speed", "worst PSNR, dB",
            "right (plain)", "verdict",
        )  # fmt: skip
        told = table(head, map(line, self.trials))
        return f"{told}\n\n{self._verdict()}\n\n{self.to_python()}"

    @property
    def no_better(self) -> Trial | None:
        """The fastest lossy trial that does not beat plain with fewer steps, or None."""
        found = [t for t in self.trials if t.verdict == "no better than fewer steps"]
        return max(found, key=lambda t: t.speed, default=None)

    def _verdict(self) -> str:
        quality = self.confirmed.quality
        if quality is None or not (self.passes or self.steps):
            said = f"Nothing faster than the plain pipeline keeps to the budget ({self.budget})."
            return "\n".join([said, *self._turned_down()])
        what = f"num_inference_steps={self.steps}: w" if self.steps else "W"
        said = (
            f"{what}ithin the budget ({self.budget}) on {self.confirmed.examples} examples that "
            f"played no part in the choice: {self.speed:.2f} times as fast as plain"
            f"{' at the prices given' if self.prices else ''}, worst PSNR "
            f"{decibels(quality.worst_psnr)} dB"
        )
        plain = self.plain.quality
        if plain is not None and quality.success is not None and plain.success is not None:
            said += f", {quality.success:.1%} of the edits right (plain {plain.success:.1%})"
            said += self._lost(plain, quality)
        if self.attempts > 1:
            said += (
                f".\n{self.attempts} lists were tried on these examples, because faster ones were "
                f"turned down there: so they did play a small part"
            )
        if self.confirmed.examples < PUBLISHABLE:
            said += (
                f".\nA minimum over {self.confirmed.examples} examples is a rough one: let "
                f"{PUBLISHABLE} or more confirm what you publish"
            )
        lines = [f"{said}."]
        if self.confirmed.beside is not None:
            lines.append(f"At equal computed work {self.confirmed.beside}.")
        return "\n".join([*lines, *self._turned_down()])

    def _turned_down(self) -> list[str]:
        """Say which lossy list, the fastest of them, is no better than fewer plain steps."""
        if (trial := self.no_better) is None:
            return []
        speed = f"{trial.speed:.2f} times as fast as plain"
        return [f"{names(trial.passes)}, {speed}, is not recommended: {trial.why}."]

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
        return f".\nThe plain pipeline gets {lost} of {checked} edits more right: {limit}"


def line(trial: Trial) -> tuple[str, ...]:
    """Write a trial as cells of a table."""
    quality = trial.quality
    if quality is None:
        return (_label(trial), trial.part, "-", "-", "-", "-", "-", f"failed: {trial.why}")
    return (
        _label(trial),
        trial.part,
        f"{trial.examples}",
        human_seconds(trial.seconds),
        f"{trial.speed:.2f}x",
        decibels(quality.worst_psnr),
        _right(quality.success, trial.plain_success),
        trial.why or trial.verdict,
    )


def _label(trial: Trial) -> str:
    return names(trial.passes) + (f", {count_of(trial.steps, 'step')}" if trial.steps else "")


def _right(share: float | None, plain: float | None) -> str:
    """Write how many edits are right, and how many of the same without passes."""
    return "-" if share is None or plain is None else f"{share:.1%} ({plain:.1%})"


def _told(trial: Trial) -> dict[str, Any]:
    """Return a trial as plain data."""
    told = trial.quality.to_dict() if trial.quality else {}
    failed = trial.quality is None
    return {
        "passes": [repr(p) for p in trial.passes],
        "steps": trial.steps,
        "work": trial.work,
        "beside_fewer_steps": asdict(trial.beside) if trial.beside else None,
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


def fewer_steps(steps: int, base: Sequence[Pass] = ()) -> Family:
    """Return an exact list with every number of steps below the workload's.

    Args:
        steps: the workload's.
        base: the list.
    """
    return Family(tuple(base), steps=tuple(range(steps - 1, 0, -1)))


def caches(base: Sequence[Pass] = ()) -> list[Family]:
    """Return the lossy lists that are searched by default, on top of an exact one."""
    cache = FirstBlockCache(warmup_steps=6, max_consecutive_hits=3)
    kinds = (
        cache,
        FirstBlockCache(),
        replace(cache, distance="noise"),
        replace(cache, warmup_steps=4, tail_steps=1, max_consecutive_hits=4),
        replace(cache, predict="quadratic"),
        replace(cache, predict="hold"),
    )
    alone = [
        Family(tuple(order([*base, kind])), tuple(replace(kind, threshold=t) for t in _THRESHOLDS))
        for kind in kinds
    ]
    references = tuple(ReferenceCache(s, warmup_steps=6, tail_steps=2) for s in _SPACINGS)
    alone.append(Family(tuple(order([*base, references[0]])), references))
    both = [
        Family(
            tuple(order([*base, kind, reference])),
            tuple(replace(kind, threshold=t) for t in _THRESHOLDS),
        )
        for reference in references[2::2]
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
    """Find the fastest way to edit whose worst picture keeps to a budget.

    First the fastest exact list is found. Then the number of steps is lowered, and each lossy
    list's dial is turned, as far as the budget allows on a few examples, by halving. The best is
    tried on others, and turned back where one of these is outside. The choice is confirmed on the
    rest, which played no part in it. The worst example decides, not the mean. A lossy list must be
    2% faster than an exact one, and it must clearly beat plain with as many steps as it computed:
    on the confirming examples the whole interval of the paired difference must lie above 0. Where
    it does not, `num_inference_steps` does the same, and the result says so.

    The budget compares with the eager pictures. On the real model compiling alone moves a picture
    to 20 to 30 dB, so a budget of the PSNR must leave room for it. The comparison with fewer steps
    is with the same list at all steps, so there compiling cancels out.

    Args:
        pipe: a plain pipeline, with trained weights; it is plain again at the end, also after
            an exception.
        examples: three or more: at most 24, and a third, to search with; at most 96, and a
            third, to choose by; the rest confirms.
        budget: what must hold beside the plain pipeline's own pictures.
        candidates: lists to search, in place of exact passes, fewer steps (`fewer_steps`) and
            caches. One that fails stands among the trials, and is left out.
        workload: how to edit; the pipeline's usual size and 28 steps by default.
        prices: seconds of each kind of step on the target machine, in place of those measured
            here. By default only fewer steps and caches are searched then, uncompiled; the result
            is for the compiled list that the prices belong to.
        seed: of the first example's noise; each has its own.
        on_edit: called before each edit, with what comes next.

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
            candidates = [fewer_steps(load.steps), *caches()]
        elif candidates is None:
            found += _turned(search, bases())
            base = max([search.plain("search"), *found], key=lambda c: c.trial.worth).family.passes
            candidates = [fewer_steps(load.steps, base), *caches(base)]
        found += _turned(search, candidates)
        attempts = 0
        while True:
            chosen = search.choose(found)
            confirmed, more = search.confirm(chosen)
            attempts += more
            if chosen.is_plain or not confirmed.is_plain:
                break
            found = [c for c in found if c.family is not chosen.family]
        plain = search.plain("confirm")
    return Tuned(
        confirmed.trial.passes, budget, load, prices, seed, plain.trial, confirmed.trial, attempts,
        tuple(search.trials), confirmed.trial.steps,
    )  # fmt: skip


def _turned(search: Search, families: Sequence[Family]) -> list[Candidate]:
    """Turn the dials of the families that can be applied here."""
    found: list[Candidate] = []
    for family in families:
        if search.applies(family):
            best = max([c.trial.speed for c in found], default=0.0)
            candidate = search.turn(family, best)
            found += [candidate] if candidate else []
    return found
