"""The search behind `tune`: turn knobs by halving, choose, and confirm on untouched examples.

A lossy list must also beat plain with as many steps as it computed, or it is left out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from statistics import mean, median
from typing import Any, Self

from PIL import Image

from fluxfire import api
from fluxfire.bench.budget import Budget
from fluxfire.bench.examples import Example
from fluxfire.bench.prices import Prices
from fluxfire.bench.quality import SAME, Likeness, Quality, likeness
from fluxfire.bench.timing import on_device, timed
from fluxfire.bench.trials import MARGIN, Beside, Candidate, Family, Part, Trial, Verdict, names
from fluxfire.bench.work import equal_steps, of_run
from fluxfire.bench.workload import Workload
from fluxfire.protocol import Pass, configured
from fluxfire.runtime.conductor import warmup_run
from fluxfire.supported import model_of
from fluxfire.text import count_of

_MOST = {"search": 24, "choose": 96}  # examples of each part; the rest confirms
_TIMED = 12  # edits after which a median says that a list is too slow to matter


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
    _fewer: dict[tuple[tuple[Pass, ...], int], dict[int, Likeness]] = field(default_factory=dict)
    _twins: dict[tuple[Pass, ...], dict[int, Image.Image]] = field(default_factory=dict)
    _made: dict[int, Image.Image] = field(default_factory=dict)
    _present: tuple[Pass, ...] = ()
    _applied: bool = False
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

    def turn(self, family: Family, than: float = 0.0) -> Candidate | None:
        """Turn a family's dial as far as the first examples allow, by halving.

        It assumes that a further setting is no slower and no nearer. Where one is nearer after
        all, the search may miss a faster list, but takes none outside the budget.

        Args:
            family: the family.
            than: the speed of the best so far: a setting that is outside the budget and no faster
                ends the search, since more careful ones are slower still.

        Returns:
            The furthest setting within the budget that is worth it, or None if none is.
        """
        best: Candidate | None = None
        within, outside = -1, len(family)
        while outside - within > 1:
            middle = (within + outside) // 2
            trial = self._try(family, middle, "search")
            if trial.verdict != "within":
                if best is None and trial.verdict != "failed" and trial.speed < than:
                    break
                outside = middle
                continue
            within = middle
            if best is None or trial.speed > MARGIN * best.trial.speed:
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
        if chosen.is_plain:
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
            if trial.verdict not in ("outside", "no better than fewer steps"):
                break
        return None

    def _apply(self, family: Family, rung: int) -> None:
        """Apply a family's passes, unless they are applied and differ only in the dial."""
        if family.dial and _apart_from(family.dial[rung], self._present) == _apart_from(
            family.dial[rung], family.passes
        ):
            return
        if family.steps and self._applied and self._present == family.passes:
            return
        self._unapply()
        self.on_edit(f"compiling {names(family.passes)}")
        self._undo.enter_context(api.optimized(self.pipe, family.passes))
        self._present, self._applied = family.passes, True
        with warmup_run(self.pipe):
            self.workload.run(self.pipe, self.examples[0], steps=2)

    def _unapply(self) -> None:
        self._undo.close()
        self._present, self._applied = (), False

    def _try(self, family: Family, rung: int, part: Part, than: float = 0.0) -> Trial:
        """Edit a part's examples with the dial at a setting, and remember how that went."""
        try:
            self._apply(family, rung)
            with api.using(self.pipe, family.dial[rung]) if family.dial else nullcontext():
                trial = self._tried(family, rung, part, than)
            if trial.lossy and trial.verdict == "within":
                trial = self._beside_fewer_steps(trial)
        except Exception as error:  # noqa: BLE001 - anyone's code; the search goes on
            why = f"{type(error).__name__}: {error}"
            trial = Trial(family.at(rung), part, "failed", why, None, float("nan"), 0.0)
            self._unapply()
        self.trials.append(trial)
        return trial

    def _beside_fewer_steps(self, trial: Trial) -> Trial:
        """Compare a lossy list with plain at as many steps as it computed.

        On the examples that confirm, the whole interval must lie above 0. Earlier, a mean above 0
        is enough: there are fewer examples, and a list that is turned down is gone.
        """
        assert trial.quality is not None  # noqa: S101 - it did not fail
        cost = self._step_cost(trial)
        if trial.work * cost >= self.workload.steps or self.workload.steps == 1:
            return trial  # it saves nothing
        steps = min(equal_steps(trial.work, cost), self.workload.steps - 1)
        numbers = self.numbers(trial.part)
        exact = tuple(p for p in trial.passes if p.exactness != "lossy")
        known = self._fewer.setdefault((exact, steps), {})
        # Both are compared with the same list at all steps, so that compiling cancels out.
        twin = self._twins.setdefault(exact, {} if exact else dict(enumerate(self._pictures)))
        missing = [number for number in numbers if number not in known]
        with self._without_loss(trial.passes) if missing else nullcontext():
            for number in missing:
                said = f"plain, {count_of(steps, 'step')}"
                self.on_edit(f"{said}, {number + 1} of {len(self.examples)}")
                if exact and number not in twin:
                    twin[number] = self._edit(number)
                known[number] = likeness(self._edit(number, steps), twin[number], ())
        fewer = Quality(tuple(known[n] for n in numbers), (None,) * len(numbers))
        mine = tuple(likeness(self._made[n], twin[n], ()) for n in numbers)
        gap = Quality(mine, (None,) * len(numbers)).minus(fewer)
        beside = Beside(steps, mean(one.psnr for one in fewer.likenesses), gap)
        if beside.beaten if trial.part == "confirm" else gap is None or gap.mean > 0:
            return replace(trial, beside=beside)
        verdict: Verdict = "no better than fewer steps"
        return replace(trial, verdict=verdict, why=str(beside), beside=beside)

    @contextmanager
    def _without_loss(self, passes: tuple[Pass, ...]) -> Iterator[None]:
        """Run the exact part of an applied list; caches are switched off, so nothing compiles."""
        lossy = [p for p in passes if p.exactness == "lossy"]
        if all(hasattr(p, "off") for p in lossy):
            with api.using(self.pipe, [p.off() for p in lossy]):  # type: ignore[attr-defined]
                yield
            return
        self._apply(Family(tuple(p for p in passes if p not in lossy)), 0)
        yield

    def _step_cost(self, trial: Trial) -> float:
        """Return what a full step costs beside an exact one, where passes make each step cheaper.

        An exact list of the same part tells what a step costs without what is lossy. Priced steps
        have one cost for all lists.
        """
        cheaper = any(p.exactness == "lossy" and p.stage != "caching" for p in trial.passes)
        if not cheaper or self.prices is not None:
            return 1.0
        exact = tuple(p for p in trial.passes if p.exactness != "lossy")
        others = [t for t in self.trials if t.passes == exact and t.quality and t.steps is None]
        seconds = min([t.seconds for t in others] or [self.plain(trial.part).trial.seconds])
        return trial.seconds / seconds * self.workload.steps / trial.work

    def _tried(self, family: Family, rung: int, part: Part, than: float) -> Trial:
        """Edit a part's examples until one is outside; earlier offenders come first."""
        passes, steps = family.at(rung), family.steps_at(rung)
        label = names(passes) + (f", {count_of(steps, 'step')}" if steps else "")
        seen: dict[int, tuple[Likeness, bool | None]] = {}
        seconds: list[float] = []
        speeds: list[float] = []
        works: list[float] = []
        verdict: Verdict = "within"
        why = ""
        numbers = self._hardest_first(part)
        for turn, number in enumerate(numbers, 1):
            self.on_edit(f"{part}, {turn} of {len(numbers)}: {label}")
            picture, spent, work = self._timed_edit(number, steps)
            self._made[number] = picture
            seconds.append(spent)
            works.append(work)
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
        ordered = [seen[number] for number in sorted(seen)]
        quality = Quality(tuple(near for near, _ in ordered), tuple(right for _, right in ordered))
        plainly = self._plain_success(seen)
        if verdict == "within" and (lost := self.budget.fallen(quality, plainly)):
            verdict, why = "outside", lost
        return Trial(
            passes, part, verdict, why, quality, median(seconds), median(speeds), plainly, steps,
            mean(works),
        )  # fmt: skip

    def _timed_edit(self, number: int, steps: int | None) -> tuple[Image.Image, float, float]:
        """Edit an example, again if it had to compile for its size.

        Returns:
            The picture, the seconds, and the computed work in full steps.
        """
        picture, seconds = timed(partial(self._edit, number, steps))
        runs = api.report(self.pipe).runs
        if runs and runs[-1].compiles and self.prices is None:
            picture, seconds = timed(partial(self._edit, number, steps))
            runs = api.report(self.pipe).runs
        if not runs:  # a pretended pipeline
            return picture, seconds, float(steps or self.workload.steps)
        if self.prices is not None:
            seconds = self.prices.of(runs[-1].step_kinds)
        return (
            picture,
            seconds,
            of_run(runs[-1], len(model_of(self.pipe).blocks(self.pipe.transformer))).steps,
        )

    def _hardest_first(self, part: Part) -> list[int]:
        """Order a part's examples: those that were outside the budget before, then the rest."""
        numbers = self.numbers(part)
        hard = [n for n in dict.fromkeys(self._offenders) if n in numbers]
        return [*hard, *(n for n in numbers if n not in hard)]

    def _plain_success(self, numbers: Iterable[int]) -> float | None:
        known = [r for n in numbers if (r := self._right[n]) is not None]
        return mean(known) if known else None

    def _edit(self, number: int, steps: int | None = None) -> Any:
        seed = self.seed + number
        return self.workload.run(self.pipe, self.examples[number], seed=seed, steps=steps)


def _apart_from(dial: Pass, passes: Sequence[Pass]) -> list[object]:
    """What of a list `using` could not turn into the same list with another setting."""
    return [(type(p), configured(p).fixed) if p.name == dial.name else p for p in passes]
