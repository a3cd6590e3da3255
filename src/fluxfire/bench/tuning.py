"""Finds the fastest way to edit within a budget: a list of passes, or fewer steps."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, is_dataclass, replace
from pathlib import Path
from typing import Any

from fluxfire import api
from fluxfire.bench.budget import Budget
from fluxfire.bench.calibration.calibrating import schedule_family
from fluxfire.bench.contenders import check_plain
from fluxfire.bench.examples import Example
from fluxfire.bench.prices import Prices
from fluxfire.bench.quality import Quality
from fluxfire.bench.results import stamp
from fluxfire.bench.search import Search
from fluxfire.bench.tables import format_decibels
from fluxfire.bench.trials import Candidate, Family, Trial, describe_passes
from fluxfire.bench.workload import Workload
from fluxfire.diffusers_types import DiffusersPipeline
from fluxfire.errors import BenchError, PlanError
from fluxfire.passes import Compile, FirstBlockCache, FusedBlocks, ReferenceCache
from fluxfire.planning import recipes
from fluxfire.planning.resolve import order
from fluxfire.protocol import Pass, configured
from fluxfire.text import count_of, human_seconds, table

PUBLISHABLE = 256
"""Fewest examples for a minimum that is worth publishing."""
_THRESHOLDS = (
    0.03, 0.04, 0.05, 0.065, 0.08, 0.1, 0.12, 0.15, 0.18, 0.22, 0.27, 0.33, 0.4, 0.5,
)  # fmt: skip
_SPACINGS = (0.05, 0.1, 0.15, 0.2, 0.25, 0.33, 0.4, 0.5, 0.65)


@dataclass(frozen=True)
class Tuned:
    """The result of `tune`. Prints as the trials, a verdict, and the list as Python.

    Attributes:
        passes: the fastest list within the budget; empty if only the plain pipeline is within it.
        steps: number of steps for the pipeline's call, if fewer steps are fastest; None means the
            workload's.
        budget: the user's budget.
        workload: size and number of steps of the edits; thresholds hold only for these.
        prices: the assumed seconds of each kind of step; None if speed was measured.
        seed: seed of the first example's noise.
        plain: the plain pipeline's trial on the confirming examples.
        confirmed: the chosen list's trial on the confirming examples.
        attempts: number of lists tried on the confirming examples; 1 if the first passed.
        trials: all trials, in order.
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
        """Speedup over the plain pipeline: the median over the confirming examples."""
        return self.confirmed.speed

    def to_python(self) -> str:
        """Return Python code that creates the list."""
        homes: dict[str, set[str]] = {}
        for cls in itertools.chain.from_iterable(map(_classes_of, self.passes)):
            home = "fluxfire.passes" if cls.__module__.startswith("fluxfire.") else cls.__module__
            homes.setdefault(home, set()).add(cls.__name__)
        lines = [f"from {home} import {', '.join(sorted(of))}" for home, of in homes.items()]
        lines += ["passes = [", *(f"    {p!r}," for p in self.passes), "]"]
        if self.steps is not None:
            lines.append(f"steps = {self.steps}  # pipe(…, num_inference_steps=steps)")
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """Return the result and all trials as plain data."""
        return {
            "budget": asdict(self.budget),
            "workload": asdict(self.workload),
            "prices": asdict(self.prices) if self.prices else None,
            "seed": self.seed,
            "attempts": self.attempts,
            "steps": self.steps,
            "plain": _trial_to_dict(self.plain),
            "confirmed": _trial_to_dict(self.confirmed),
            "trials": [_trial_to_dict(trial) for trial in self.trials],
        }

    def save(self, path: str | Path) -> None:
        """Save the list for `optimize(pipe, "….json")`, together with this result.

        Raises:
            PlanError: the name does not end in `.json`, or a pass cannot be written.
            OSError: the file cannot be written.
        """
        recipes.write(self.passes, Path(path), **stamp(), tuned=self.to_dict())

    def __str__(self) -> str:
        head = (
            "passes",
            "part",
            "examples",
            "an edit",
            "speed",
            "worst PSNR, dB",
            "right (plain)",
            "verdict",
        )
        trials = table(head, map(format_trial, self.trials))
        return f"{trials}\n\n{self._verdict()}\n\n{self.to_python()}"

    @property
    def no_better(self) -> Trial | None:
        """The fastest lossy trial that does not beat plain with fewer steps, or None."""
        found = [t for t in self.trials if t.verdict == "no better than fewer steps"]
        return max(found, key=lambda t: t.speed, default=None)

    def _verdict(self) -> str:
        quality = self.confirmed.quality
        if quality is None or not (self.passes or self.steps):
            verdict = (
                f"Nothing faster than the plain pipeline is within the budget ({self.budget})."
            )
            return "\n".join([verdict, *self._rejected_list()])
        what = f"num_inference_steps={self.steps}: w" if self.steps else "W"
        verdict = (
            f"{what}ithin the budget ({self.budget}) on {self.confirmed.examples} examples that "
            f"the search did not use: {self.speed:.2f} times as fast as plain"
            f"{' at the prices given' if self.prices else ''}, worst PSNR "
            f"{format_decibels(quality.worst_psnr)} dB"
        )
        plain = self.plain.quality
        if plain is not None and quality.success is not None and plain.success is not None:
            verdict += f", {quality.success:.1%} of the edits right (plain {plain.success:.1%})"
            verdict += self._describe_lost_edits(plain, quality)
        if self.attempts > 1:
            verdict += (
                f".\ntune tried {self.attempts} lists on these examples, because faster lists "
                f"failed on them. So these examples had a small part in the choice"
            )
        if self.confirmed.examples < PUBLISHABLE:
            verdict += (
                f".\nA minimum over {self.confirmed.examples} examples is rough: confirm "
                f"what you publish on {PUBLISHABLE} or more"
            )
        lines = [f"{verdict}."]
        if self.confirmed.comparison is not None:
            lines.append(f"At equal computed work {self.confirmed.comparison}.")
        return "\n".join([*lines, *self._rejected_list()])

    def _rejected_list(self) -> list[str]:
        """Return a line about the fastest lossy list that does not beat fewer plain steps."""
        if (trial := self.no_better) is None:
            return []
        speed = f"{trial.speed:.2f} times as fast as plain"
        return [f"{describe_passes(trial.passes)}, {speed}, is not recommended: {trial.why}."]

    def _describe_lost_edits(self, plain: Quality, quality: Quality) -> str:
        """Say how many more edits plain gets right, and what the budget allows."""
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
        return f".\nThe plain pipeline gets {lost} more of {checked} edits right: {limit}"


def _classes_of(pass_: Pass) -> Iterator[type]:
    """Yield the classes that a pass's repr names: its own, and those of its settings."""
    yield type(pass_)
    for value in configured(pass_).settings.values():
        several = value if isinstance(value, tuple) else (value,)
        yield from (type(one) for one in several if is_dataclass(one))


def format_trial(trial: Trial) -> tuple[str, ...]:
    """Format a trial as cells of a table."""
    quality = trial.quality
    if quality is None:
        return (_label(trial), trial.part, "-", "-", "-", "-", "-", f"failed: {trial.why}")
    return (
        _label(trial),
        trial.part,
        f"{trial.examples}",
        human_seconds(trial.seconds),
        f"{trial.speed:.2f}x",
        format_decibels(quality.worst_psnr),
        _format_correct(quality.success, trial.plain_success),
        trial.why or trial.verdict,
    )


def _label(trial: Trial) -> str:
    return describe_passes(trial.passes) + (
        f", {count_of(trial.steps, 'step')}" if trial.steps else ""
    )


def _format_correct(share: float | None, plain: float | None) -> str:
    """Format the share of correct edits, and plain's share on the same examples."""
    return "-" if share is None or plain is None else f"{share:.1%} ({plain:.1%})"


def _trial_to_dict(trial: Trial) -> dict[str, Any]:
    """Return a trial as plain data."""
    quality = trial.quality.to_dict() if trial.quality else {}
    failed = trial.quality is None
    return {
        "passes": [repr(p) for p in trial.passes],
        "steps": trial.steps,
        "work": trial.work,
        "beside_fewer_steps": asdict(trial.comparison) if trial.comparison else None,
        "part": trial.part,
        "verdict": trial.verdict,
        "why": trial.why,
        "seconds": None if failed else trial.seconds,
        "speed": None if failed else trial.speed,
        "plain_success": trial.plain_success,
        **{k: v for k, v in quality.items() if k != "each"},
    }


def exact_families() -> list[Family]:
    """Return the exact lists; the fastest one is the base of the lossy lists."""
    return [Family((Compile(),)), Family((FusedBlocks(), Compile()))]


def fewer_steps(steps: int, base: Sequence[Pass] = ()) -> Family:
    """Return an exact list with every number of steps below the workload's.

    Args:
        steps: the workload's number of steps.
        base: the exact list.
    """
    return Family(tuple(base), steps=tuple(range(steps - 1, 0, -1)))


def cache_families(base: Sequence[Pass] = ()) -> list[Family]:
    """Return the lossy lists that `tune` searches by default, on top of an exact list."""
    cache = FirstBlockCache(warmup_steps=6, max_consecutive_hits=3)
    kinds = (
        cache,
        FirstBlockCache(),
        replace(cache, distance="noise"),
        replace(cache, warmup_steps=4, tail_steps=1, max_consecutive_hits=4),
        replace(cache, predict="linear"),
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
        for kind in (cache, replace(cache, predict="linear"))
    ]
    return [*alone, *both]


def schedule_families(search: Search, base: Sequence[Pass] = ()) -> list[Family]:
    """Return schedules made from plain edits of the search's examples, as `calibrate` makes them.

    Args:
        search: edits the examples.
        base: an exact list.
    """
    try:
        traces = search.traces()
        made = [schedule_family(traces, base, warmup) for warmup in (4, 8)]
    except (BenchError, PlanError):
        # Nothing to skip, noise levels that do not fall, or blocks that nothing can wrap: the
        # thresholds remain, where they can be applied.
        return []
    return made[:1] if made[0] == made[1] else made


def tune(
    pipe: DiffusersPipeline,
    examples: Sequence[Example],
    budget: Budget,
    *,
    candidates: Sequence[Family] | None = None,
    workload: Workload | None = None,
    prices: Prices | None = None,
    seed: int = 0,
    on_edit: Callable[[str], None] = lambda _: None,
) -> Tuned:
    """Find the fastest way to edit whose worst picture stays within a budget.

    `tune` first finds the fastest exact list. Then it bisects the number of steps, and the knob of
    each lossy list, on the first part of the examples. Among the lossy lists are schedules that it
    makes from plain edits of these examples, as `calibrate` does. It tries the best list on the
    second part, and steps its knob back while a picture exceeds the budget. It confirms the choice
    on the third part, which the search did not use. The worst example decides, not the mean.

    A lossy list must be 2% faster than an exact one, and it must clearly beat plain with as many
    steps as it computed: on the confirming examples the whole interval of the paired difference
    must lie above 0. Otherwise `num_inference_steps` does the same, and the result says so.

    The budget compares with the eager pictures. On the real model compiling alone changes a picture
    to 20 to 30 dB, so a PSNR budget must allow for that. The comparison with fewer steps uses the
    same list at all steps as its reference, so there compiling cancels out.

    Args:
        pipe: a plain pipeline with trained weights; it is plain again afterwards, even after an
            exception.
        examples: three or more. A third of them, at most 24, are for the search; a third, at most
            96, are for the choice; the rest confirms.
        budget: limits on the difference from the plain pipeline's pictures.
        candidates: lists to search, in place of exact passes, fewer steps (`fewer_steps`) and
            caches. A list that fails stays among the trials and is rejected.
        workload: size and number of steps; the pipeline's default size and 28 steps by default.
        prices: seconds of each kind of step on the target machine, in place of measured times. Then
            `tune` searches by default only fewer steps and caches, uncompiled; the result is for
            the compiled list that the prices belong to.
        seed: seed of the first example's noise; each example has its own.
        on_edit: callback before each edit, with a description of it.

    Raises:
        BenchError: there are fewer than three examples, or the budget cannot be measured on them.
        PlanError: the pipeline is not plain, or a candidate cannot be applied to it.
    """
    if len(examples) < 3:  # noqa: PLR2004 - one each to search, choose and confirm
        raise BenchError(
            f"tune needs three examples or more, for its search, choice and confirmation; "
            f"there are {len(examples)}"
        )
    budget.check_measurable(checked=any(e.check for e in examples))
    check_plain(pipe)
    for family in candidates or ():
        api.plan(pipe, family.passes).raise_if_bad()
    load = workload or Workload.for_pipeline(pipe)
    with Search(pipe, examples, budget, load, seed, on_edit, prices) as search:
        found: list[Candidate] = []
        if candidates is None and prices is not None:
            candidates = [fewer_steps(load.steps), *schedule_families(search), *cache_families()]
        elif candidates is None:
            found += _search_families(search, exact_families())
            base = max([search.plain("search"), *found], key=lambda c: c.trial.worth).family.passes
            candidates = [
                fewer_steps(load.steps, base),
                *schedule_families(search, base),
                *cache_families(base),
            ]
        found += _search_families(search, candidates)
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
        confirmed.trial.passes,
        budget,
        load,
        prices,
        seed,
        plain.trial,
        confirmed.trial,
        attempts,
        tuple(search.trials),
        confirmed.trial.steps,
    )


def _search_families(search: Search, families: Sequence[Family]) -> list[Candidate]:
    """Search the knobs of all families that can be applied on this machine."""
    found: list[Candidate] = []
    for family in families:
        if search.applies(family):
            best = max([c.trial.speed for c in found], default=0.0)
            candidate = search.search_knob(family, best)
            found += [candidate] if candidate else []
    return found
