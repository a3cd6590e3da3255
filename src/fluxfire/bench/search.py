"""The search behind `tune`: turn dials by halving, choose, and confirm on untouched examples."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field, is_dataclass
from functools import partial
from statistics import mean, median
from typing import Any, Literal, Self

from PIL import Image

from fluxfire import api
from fluxfire.bench.budget import Budget
from fluxfire.bench.examples import Example
from fluxfire.bench.prices import Prices
from fluxfire.bench.quality import SAME, Likeness, Quality, likeness
from fluxfire.bench.timing import on_device, timed
from fluxfire.bench.workload import Workload
from fluxfire.conductor import rehearsal
from fluxfire.protocol import Pass, configured

_MOST = {"search": 24, "choose": 96}  # examples of each part; the rest confirms
_TIMED = 12  # edits after which a median says that a list is too slow to matter
_MARGIN = 1.02  # what is faster by less is not worth its risk
Part = Literal["search", "choose", "confirm"]
Verdict = Literal["within", "outside", "slower", "failed"]


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
        part: which examples.
        verdict: whether all is within the budget. A trial ends with the first picture
            outside, or when it is slower than what was found already.
        why: what was outside, or what was raised; empty where all is well.
        quality: beside the plain pipeline's pictures, example by example; None if it failed.
        seconds: of an edit, the median; nan if it failed.
        speed: how many times as fast as plain, the median over the same examples.
        plain_success: how many of the same edits are right without passes; None where no
            program can tell, or if it failed.
    """

    passes: tuple[Pass, ...]
    part: Part
    verdict: Verdict
    why: str
    quality: Quality | None
    seconds: float
    speed: float
    plain_success: float | None = None

    @property
    def examples(self) -> int:
        """How many were edited."""
        return len(self.quality.likenesses) if self.quality else 0

    @property
    def worth(self) -> float:
        """Its speed; what loses nothing counts for a little more, and plain for more still."""
        exact = all(p.exactness != "lossy" for p in self.passes)
        return self.speed * (_MARGIN if exact else 1.0) * (1.0 if self.passes else _MARGIN)


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
    """Edits examples with lists of passes, and remembers every trial; a context manager.

    Attributes:
        pipe: plain before and after.
        examples: in three parts: to search with, to choose by, and to confirm on.
        budget: what must hold.
        workload: how to edit.
        seed: of the first example's noise.
        on_edit: is told what is being edited.
        prices: what steps are taken to cost, in the place of what they take here.
        trials: in the order made.
    """

    pipe: Any
    examples: Sequence[Example]
    budget: Budget
    workload: Workload
    seed: int
    on_edit: Callable[[str], None]
    prices: Prices | None = None
    trials: list[Trial] = field(default_factory=list)
    _pictures: list[Image.Image] = field(default_factory=list)
    _right: list[bool | None] = field(default_factory=list)
    _seconds: list[float] = field(default_factory=list)
    _offenders: list[int] = field(default_factory=list)
    _present: tuple[Pass, ...] = ()
    _device: ExitStack = field(default_factory=ExitStack)
    _undo: ExitStack = field(default_factory=ExitStack)

    def __enter__(self) -> Self:
        """Make every edit plain."""
        self._device.enter_context(on_device(self.pipe))
        try:
            self.workload.run(self.pipe, self.examples[0], steps=2)
            for number, example in enumerate(self.examples):
                self.on_edit(f"plain, {number + 1} of {len(self.examples)}")
                picture, seconds = timed(partial(self._edit, number))
                if self.prices is not None:
                    seconds = self.prices.of(["computed"] * self.workload.steps)
                self._pictures.append(picture)
                self._seconds.append(seconds)
                self._right.append(example.right(picture))
        except BaseException:
            self._device.close()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        """Leave the pipeline plain."""
        self._unapply()
        self._device.close()

    def numbers(self, part: Part) -> range:
        """Return the positions of a part's examples."""
        n = len(self.examples)
        first = min(_MOST["search"], n // 3)
        second = first + min(_MOST["choose"], n // 3)
        return {
            "search": range(first),
            "choose": range(first, second),
            "confirm": range(second, n),
        }[part]

    def plain(self, part: Part) -> Candidate:
        """Return the plain pipeline, which is always within the budget."""
        numbers = self.numbers(part)
        quality = Quality((SAME,) * len(numbers), tuple(self._right[n] for n in numbers))
        seconds = median(self._seconds[n] for n in numbers)
        trial = Trial((), part, "within", "", quality, seconds, 1.0, quality.success)
        return Candidate(Family(), 0, trial)

    def applies(self, family: Family) -> bool:
        """Whether a family's passes can be applied to this pipeline, here."""
        self._unapply()
        return api.plan(self.pipe, family.passes).ok

    def turn(self, family: Family) -> Candidate | None:
        """Turn a family's dial as far as the first examples allow, by halving.

        Takes for granted that a further setting is no slower and no nearer; where one is
        nearer after all, a faster list may be missed, but none outside the budget is taken.

        Returns:
            The furthest setting within the budget that is worth it, or None if none is.
        """
        if not family.dial:
            trial = self._try(family, 0, "search")
            return Candidate(family, 0, trial) if trial.verdict == "within" else None
        best: Candidate | None = None
        within, outside = -1, len(family.dial)
        while outside - within > 1:
            middle = (within + outside) // 2
            trial = self._try(family, middle, "search")
            if trial.verdict != "within":
                outside = middle
                continue
            within = middle
            if best is None or trial.speed > _MARGIN * best.trial.speed:
                best = Candidate(family, middle, trial)
        return best

    def choose(self, found: Sequence[Candidate]) -> Candidate:
        """Try candidates on the second part, the best first, until none could be better.

        Each dial is turned back until all is within the budget there, too.
        """
        best = self.plain("choose")
        for candidate in sorted(found, key=lambda c: -c.trial.worth):
            if candidate.trial.worth <= best.trial.worth:
                break
            chosen = self._turned_back(candidate, "choose", best.trial.speed)
            if chosen and chosen.trial.worth > best.trial.worth:
                best = chosen
        return best

    def confirm(self, chosen: Candidate) -> tuple[Candidate, int]:
        """Try what was chosen on the examples that nothing was found by.

        Returns:
            It, or with its dial turned back as far as these examples ask, or the plain
            pipeline; and how many lists were tried on them.
        """
        if not chosen.family.passes:
            return self.plain("confirm"), 0
        before = len(self.trials)
        confirmed = self._turned_back(chosen, "confirm")
        return confirmed or self.plain("confirm"), len(self.trials) - before

    def _turned_back(self, candidate: Candidate, part: Part, than: float = 0.0) -> Candidate | None:
        """Turn a dial back, setting by setting, until all is within the budget."""
        for rung in range(candidate.rung, -1, -1):
            trial = self._try(candidate.family, rung, part, than)
            if trial.verdict == "within":
                return Candidate(candidate.family, rung, trial)
            if trial.verdict != "outside":
                break
        return None

    def _apply(self, family: Family, rung: int) -> None:
        """Apply a family's passes, unless they are applied and differ only in the dial."""
        if family.dial and _apart_from(family.dial[rung], self._present) == _apart_from(
            family.dial[rung], family.passes
        ):
            return
        self._unapply()
        self.on_edit(f"compiling {names(family.passes)}")
        self._undo.enter_context(api.optimized(self.pipe, family.passes))
        self._present = family.passes
        with rehearsal(self.pipe):
            self.workload.run(self.pipe, self.examples[0], steps=2)

    def _unapply(self) -> None:
        self._undo.close()
        self._present = ()

    def _try(self, family: Family, rung: int, part: Part, than: float = 0.0) -> Trial:
        """Edit a part's examples with the dial at a setting, and remember how that went."""
        try:
            self._apply(family, rung)
            with api.using(self.pipe, family.dial[rung]) if family.dial else nullcontext():
                trial = self._tried(family.at(rung), part, than)
        except Exception as error:  # noqa: BLE001 - anyone's code; the search goes on
            why = f"{type(error).__name__}: {error}"
            trial = Trial(family.at(rung), part, "failed", why, None, float("nan"), 0.0)
            self._unapply()
        self.trials.append(trial)
        return trial

    def _tried(self, passes: tuple[Pass, ...], part: Part, than: float) -> Trial:
        """Edit a part's examples until one is outside; those that failed others come first."""
        seen: dict[int, tuple[Likeness, bool | None]] = {}
        seconds: list[float] = []
        speeds: list[float] = []
        verdict: Verdict = "within"
        why = ""
        numbers = self._hardest_first(part)
        for turn, number in enumerate(numbers, 1):
            self.on_edit(f"{part}, {turn} of {len(numbers)}: {names(passes)}")
            picture, spent = self._timed_edit(number)
            seconds.append(spent)
            speeds.append(self._seconds[number] / spent)
            measures = ("ssim", "flip") if part == "confirm" else self.budget.measures
            near = likeness(picture, self._pictures[number], measures)
            seen[number] = near, self.examples[number].right(picture)
            if broken := self.budget.broken(near):
                self._offenders.insert(0, number)
                verdict, why = "outside", broken
                break
            if len(speeds) >= _TIMED and median(speeds) < than:
                verdict, why = "slower", "slower than what was found"
                break
        told = [seen[number] for number in sorted(seen)]
        quality = Quality(tuple(near for near, _ in told), tuple(right for _, right in told))
        plainly = self._plain_success(seen)
        if verdict == "within" and (lost := self.budget.fallen(quality, plainly)):
            verdict, why = "outside", lost
        return Trial(passes, part, verdict, why, quality, median(seconds), median(speeds), plainly)

    def _timed_edit(self, number: int) -> tuple[Image.Image, float]:
        """Edit an example; again if it had to compile for its size."""
        picture, seconds = timed(partial(self._edit, number))
        runs = api.report(self.pipe).runs
        if self.prices is not None:
            return picture, self.prices.of(runs[-1].step_kinds)
        if runs and runs[-1].compiles:
            picture, seconds = timed(partial(self._edit, number))
        return picture, seconds

    def _hardest_first(self, part: Part) -> list[int]:
        """Order a part's examples: those that were outside the budget before, then the rest."""
        numbers = self.numbers(part)
        hard = [n for n in dict.fromkeys(self._offenders) if n in numbers]
        return [*hard, *(n for n in numbers if n not in hard)]

    def _plain_success(self, numbers: Iterable[int]) -> float | None:
        known = [r for n in numbers if (r := self._right[n]) is not None]
        return mean(known) if known else None

    def _edit(self, number: int) -> Any:
        return self.workload.run(self.pipe, self.examples[number], seed=self.seed + number)


def _apart_from(dial: Pass, passes: Sequence[Pass]) -> list[object]:
    """What of a list `using` could not turn into the same list with another setting."""
    return [(type(p), configured(p).fixed) if p.name == dial.name else p for p in passes]


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
    own = configured(pass_).settings
    changed = [f"{k}={v!r}" for k, v in own.items() if v != getattr(usual, k)]
    return f"{pass_.name}({', '.join(changed)})" if changed else pass_.name
