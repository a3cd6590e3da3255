"""The search behind `tune`: turn dials by halving, then check on examples not searched with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field, fields, is_dataclass
from functools import partial
from math import inf
from statistics import mean, median
from typing import Any, Literal, Self

from PIL import Image

from fluxfire import api
from fluxfire.bench.budget import Budget
from fluxfire.bench.examples import Example
from fluxfire.bench.quality import Likeness, Quality, likeness
from fluxfire.bench.timing import timed
from fluxfire.bench.workload import Workload
from fluxfire.planner import configured
from fluxfire.protocol import Pass

_SEARCHED = 24  # examples at most; the rest checks
_TIMED = 12  # edits after which a median says that a list is too slow to matter
_SLOWER = "slower than the best so far"
_FASTER = 0.98  # a setting that is faster by less is not worth its risk
Part = Literal["search", "check"]


@dataclass(frozen=True)
class Family:
    """Lists of passes that differ in the settings of one.

    Attributes:
        passes: what is applied, in order.
        dial: settings of one of these passes, from careful to fast, which `using` can change
            at run time; none if there is nothing to turn.
    """

    passes: tuple[Pass, ...] = ()
    dial: tuple[Pass, ...] = ()

    def at(self, rung: int) -> tuple[Pass, ...]:
        """Return the list with the dial at one of its settings."""
        if not self.dial:
            return self.passes
        turned = self.dial[rung]
        return tuple(turned if p.name == turned.name else p for p in self.passes)


@dataclass(frozen=True)
class Trial:
    """One list of passes on some of the examples.

    Attributes:
        passes: the list.
        part: whether these are the examples searched with, or those held out.
        seconds: of an edit, the median.
        quality: beside the plain pipeline's pictures, example by example.
        exceeded: what was outside the budget; None if nothing was. The first picture
            outside ends a trial.
    """

    passes: tuple[Pass, ...]
    part: Part
    seconds: float
    quality: Quality
    exceeded: str | None

    @property
    def examples(self) -> int:
        """How many were edited."""
        return len(self.quality.likenesses)


@dataclass(frozen=True)
class Candidate:
    """A family with its dial at a setting, and how that did.

    Attributes:
        family: the family.
        rung: position on its dial.
        trial: what was seen of it.
    """

    family: Family
    rung: int
    trial: Trial


@dataclass
class Search:
    """Edits examples with lists of passes, and remembers every trial.

    Attributes:
        pipe: plain between the trials.
        examples: the first few are searched with, the rest is held out.
        budget: what must hold.
        workload: how to edit.
        seed: of the first example's noise.
        on_edit: is told what is being edited.
        trials: in the order made.
    """

    pipe: Any
    examples: Sequence[Example]
    budget: Budget
    workload: Workload
    seed: int
    on_edit: Callable[[str], None]
    trials: list[Trial] = field(default_factory=list)
    _pictures: list[Image.Image] = field(default_factory=list)
    _right: list[bool | None] = field(default_factory=list)
    _seconds: list[float] = field(default_factory=list)
    _offenders: list[int] = field(default_factory=list)
    _present: tuple[Pass, ...] = ()
    _undo: ExitStack = field(default_factory=ExitStack)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        """Leave the pipeline plain."""
        self._undo.close()

    def begin(self) -> Candidate:
        """Make every edit plain, and return the plain pipeline as a candidate."""
        self.workload.run(self.pipe, self.examples[0], steps=2)
        for number, example in enumerate(self.examples):
            self.on_edit("plain")
            picture, seconds = timed(partial(self._edit, number))
            self._pictures.append(picture)
            self._seconds.append(seconds)
            self._right.append(example.check(picture) if example.check else None)
        return Candidate(Family(), 0, self._plain("search"))

    def applies(self, family: Family) -> bool:
        """Whether a family's passes can be applied to this pipeline, here."""
        self._undo.close()
        self._present = ()
        return api.plan(self.pipe, family.passes).ok

    def numbers(self, part: Part) -> range:
        """Return the positions of a part's examples."""
        n = len(self.examples)
        searched = min(_SEARCHED, n // 2)
        return range(searched) if part == "search" else range(searched, n)

    def turn(self, family: Family) -> Candidate | None:
        """Turn a family's dial as far as the search's examples allow, by halving.

        Takes for granted that a further setting is no slower and no nearer.

        Returns:
            The furthest setting within the budget, or None if none is.
        """
        if not family.dial:
            trial = self._try(family, 0, "search")
            return None if trial.exceeded else Candidate(family, 0, trial)
        best: Candidate | None = None
        within, outside = -1, len(family.dial)
        while outside - within > 1:
            middle = (within + outside) // 2
            trial = self._try(family, middle, "search")
            if trial.exceeded:
                outside = middle
                continue
            within = middle
            if best is None or trial.seconds < _FASTER * best.trial.seconds:
                best = Candidate(family, middle, trial)
        return best

    def check(self, candidate: Candidate, than: float = inf) -> Candidate | None:
        """Edit what was held out, turning the dial back until all is within the budget.

        Args:
            candidate: where the search left the dial.
            than: seconds of an edit that it must be faster than to matter.

        Returns:
            The furthest setting within the budget, or None if none is, or none that is faster.
        """
        if not candidate.family.passes:
            return Candidate(candidate.family, 0, self._plain("check"))
        for rung in range(candidate.rung, -1, -1):
            trial = self._try(candidate.family, rung, "check", than)
            if not trial.exceeded:
                return Candidate(candidate.family, rung, trial)
            if trial.exceeded == _SLOWER:
                return None
        return None

    def fastest(self, found: Sequence[Candidate]) -> Candidate:
        """Check candidates, fastest first, until none is left that could be faster.

        Args:
            found: what the search found within the budget; the plain pipeline among them,
                which always is.
        """
        best: Candidate | None = None
        for candidate in sorted(found, key=lambda c: c.trial.seconds):
            than = best.trial.seconds if best else inf
            if candidate.trial.seconds >= than:
                break
            best = self.check(candidate, than) or best
        assert best is not None  # noqa: S101 - the plain pipeline equals itself
        return best

    def plain_success(self, part: Part) -> float | None:
        """Return which share of the plain edits of a part is right, where that is known."""
        known = [r for n in self.numbers(part) if (r := self._right[n]) is not None]
        return mean(known) if known else None

    def _plain(self, part: Part) -> Trial:
        numbers = self.numbers(part)
        same = tuple(likeness(self._pictures[n], self._pictures[n]) for n in numbers)
        quality = Quality(same, tuple(self._right[n] for n in numbers))
        return Trial((), part, median(self._seconds[n] for n in numbers), quality, None)

    def _apply(self, family: Family, rung: int) -> None:
        """Apply a family's passes, unless they are applied and differ only in the dial."""
        if family.dial and _apart_from(family.dial[rung], self._present) == _apart_from(
            family.dial[rung], family.passes
        ):
            return
        self._undo.close()
        self._present = ()
        self.on_edit(f"compiling {names(family.passes)}")
        self._undo.enter_context(api.optimized(self.pipe, family.passes))
        self._present = family.passes
        self.workload.run(self.pipe, self.examples[0], steps=2)

    def _try(self, family: Family, rung: int, part: Part, than: float = inf) -> Trial:
        """Edit a part's examples with the dial at a setting; what fails others comes first."""
        self._apply(family, rung)
        passes, seconds, exceeded = family.at(rung), [], None
        seen: dict[int, tuple[Likeness, bool | None]] = {}
        with api.using(self.pipe, family.dial[rung]) if family.dial else nullcontext():
            for number in self._hardest_first(part):
                self.on_edit(f"{part}: {names(passes)}")
                picture, spent = timed(partial(self._edit, number))
                check = self.examples[number].check
                seconds.append(spent)
                near = likeness(picture, self._pictures[number])
                seen[number] = near, check(picture) if check else None
                if (exceeded := self.budget.broken(near)) is not None:
                    self._offenders.insert(0, number)
                elif len(seconds) >= _TIMED and median(seconds) > than:
                    exceeded = _SLOWER
                if exceeded is not None:
                    break
        told = [seen[number] for number in sorted(seen)]
        quality = Quality(tuple(near for near, _ in told), tuple(right for _, right in told))
        if exceeded is None:
            exceeded = self.budget.exceeded(quality, self.plain_success(part))
        trial = Trial(passes, part, median(seconds), quality, exceeded)
        self.trials.append(trial)
        return trial

    def _hardest_first(self, part: Part) -> list[int]:
        """Order a part's examples: those that were outside the budget before, then the rest."""
        numbers = self.numbers(part)
        hard = [n for n in dict.fromkeys(self._offenders) if n in numbers]
        return [*hard, *(n for n in numbers if n not in hard)]

    def _edit(self, number: int) -> Any:
        return self.workload.run(self.pipe, self.examples[number], seed=self.seed + number)


def _apart_from(dial: Pass, passes: Sequence[Pass]) -> list[object]:
    """What of a list `using` could not turn into the same list with another setting."""
    kept: list[object] = []
    for pass_ in passes:
        facts = configured(pass_)
        fixed = {k: v for k, v in facts.settings.items() if k not in facts.tunable}
        kept.append((type(pass_), fixed) if pass_.name == dial.name else pass_)
    return kept


def names(passes: Sequence[Pass]) -> str:
    """Write a list in short: names, and of settings those that are not the defaults."""
    return " + ".join(map(_brief, passes)) or "plain"


def _brief(pass_: Pass) -> str:
    if not is_dataclass(pass_):
        return pass_.name
    try:
        usual: Any = type(pass_)()
    except TypeError:
        return repr(pass_)
    own = {f.name: getattr(pass_, f.name) for f in fields(pass_)}
    changed = [f"{k}={v!r}" for k, v in own.items() if v != getattr(usual, k)]
    return f"{pass_.name}({', '.join(changed)})" if changed else pass_.name
