"""The search of `tune`: bisects each knob, chooses the best list, confirms it on new examples.

The search rejects a lossy list that does not beat plain with as many steps as the list computed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from statistics import mean, median
from typing import Self

from PIL import Image

from fluxfire import api
from fluxfire.bench.budget import Budget
from fluxfire.bench.calibration.recording import Recorder, Trace
from fluxfire.bench.examples import Example
from fluxfire.bench.prices import Prices
from fluxfire.bench.quality import SAME, Quality, Similarity, similarity
from fluxfire.bench.timing import on_device, time_call
from fluxfire.bench.trials import (
    MIN_SPEEDUP,
    Candidate,
    Family,
    FewerStepsComparison,
    Part,
    Trial,
    Verdict,
    describe_passes,
)
from fluxfire.bench.work import equal_steps, work_of_run
from fluxfire.bench.workload import Workload
from fluxfire.diffusers_types import Pipeline
from fluxfire.protocol import Pass, configured
from fluxfire.runtime.conductor import warmup_run
from fluxfire.supported import model_of
from fluxfire.text import count_of

_LARGEST_PARTS = {"search": 24, "choose": 96}  # most examples of each part; the rest confirms
_RECORDED = 8  # edits that make the schedules
_EDITS_TO_JUDGE_SPEED = 12  # edits after which the median speed may reject a list


@dataclass
class Search:
    """Edits examples with lists of passes and records every trial. A context manager.

    Attributes:
        pipe: the pipeline; plain before and afterwards.
        examples: examples in three parts: to search, to choose and to confirm.
        budget: limits on the difference from the plain pictures.
        workload: size and number of steps.
        seed: seed of the first example's noise.
        on_edit: callback with a description of each edit.
        prices: seconds of each kind of step, in place of measured times.
        trials: all trials, in order.
    """

    pipe: Pipeline
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
    _fewer: dict[tuple[tuple[Pass, ...], int], dict[int, Similarity]] = field(default_factory=dict)
    _twins: dict[tuple[Pass, ...], dict[int, Image.Image]] = field(default_factory=dict)
    _made: dict[int, Image.Image] = field(default_factory=dict)
    _present: tuple[Pass, ...] = ()
    _applied: bool = False
    _device: ExitStack = field(default_factory=ExitStack)
    _undo: ExitStack = field(default_factory=ExitStack)

    def __enter__(self) -> Self:
        """Make every edit with the plain pipeline."""
        self._device.enter_context(on_device(self.pipe))
        try:
            self.workload.run(self.pipe, self.examples[0], steps=2)
            for number, example in enumerate(self.examples):
                self.on_edit(f"plain, {number + 1} of {len(self.examples)}")
                picture, seconds = time_call(partial(self._edit, number))
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
        """Make the pipeline plain again."""
        self._unapply()
        self._device.close()

    def numbers(self, part: Part) -> range:
        """Return the positions of a part's examples."""
        n = len(self.examples)
        first = min(_LARGEST_PARTS["search"], n // 3)
        second = first + min(_LARGEST_PARTS["choose"], n // 3)
        return {
            "search": range(first),
            "choose": range(first, second),
            "confirm": range(second, n),
        }[part]

    def plain(self, part: Part) -> Candidate:
        """Return the plain pipeline as a candidate, which is always within the budget."""
        numbers = self.numbers(part)
        quality = Quality((SAME,) * len(numbers), tuple(self._right[n] for n in numbers))
        seconds = median(self._seconds[n] for n in numbers)
        trial = Trial((), part, "within", "", quality, seconds, 1.0, quality.success)
        return Candidate(Family(), 0, trial)

    def traces(self) -> list[Trace]:
        """Record plain edits of a few of the first part's examples."""
        self._unapply()
        recorder = Recorder()
        numbers = self.numbers("search")[:_RECORDED]
        with api.optimized(self.pipe, [recorder]):
            for turn, number in enumerate(numbers, 1):
                self.on_edit(f"recording, {turn} of {len(numbers)}")
                self._edit(number)
        return recorder.traces

    def applies(self, family: Family) -> bool:
        """Whether a family's passes can be applied to this pipeline on this machine."""
        self._unapply()
        return api.plan(self.pipe, family.passes).ok

    def search_knob(self, family: Family, best_speed: float = 0.0) -> Candidate | None:
        """Find a family's fastest setting within the budget on the first part, by bisection.

        It assumes that each setting of the knob is at least as fast as the setting before, and that
        its pictures are no nearer to the plain ones. If that is wrong, the search may miss a faster
        list, but it never accepts a list outside the budget.

        Args:
            family: the family.
            best_speed: speed of the best list so far. A setting that is outside the budget and no
                faster ends the search, since more careful settings are slower still.

        Returns:
            The last setting within the budget that is at least 2% faster than the accepted ones
            before it; None if no setting is within the budget.
        """
        best: Candidate | None = None
        within, outside = -1, len(family)
        while outside - within > 1:
            middle = (within + outside) // 2
            trial = self._try(family, middle, "search")
            if trial.verdict != "within":
                if best is None and trial.verdict != "failed" and trial.speed < best_speed:
                    break
                outside = middle
                continue
            within = middle
            if best is None or trial.speed > MIN_SPEEDUP * best.trial.speed:
                best = Candidate(family, middle, trial)
        return best

    def choose(self, found: Sequence[Candidate]) -> Candidate:
        """Try candidates on the second part, best first, until no remaining one can be better.

        It steps each knob back until all pictures of this part are within the budget, too.
        """
        best = self.plain("choose")
        for candidate in sorted(found, key=lambda c: -c.trial.worth):
            if candidate.trial.worth <= best.trial.worth:
                break
            chosen = self._step_back(candidate, "choose", best.trial.speed)
            if chosen and chosen.trial.worth > best.trial.worth:
                best = chosen
        return best

    def confirm(self, chosen: Candidate) -> tuple[Candidate, int]:
        """Try the chosen candidate on the third part, which the search has not used.

        Returns:
            The candidate, perhaps with its knob stepped back, or else the plain pipeline; and the
            number of lists tried on this part.
        """
        if chosen.is_plain:
            return self.plain("confirm"), 0
        before = len(self.trials)
        confirmed = self._step_back(chosen, "confirm")
        return confirmed or self.plain("confirm"), len(self.trials) - before

    def _step_back(
        self, candidate: Candidate, part: Part, best_speed: float = 0.0
    ) -> Candidate | None:
        """Step a knob back, setting by setting, until all pictures are within the budget."""
        for index in range(candidate.index, -1, -1):
            trial = self._try(candidate.family, index, part, best_speed)
            if trial.verdict == "within":
                return Candidate(candidate.family, index, trial)
            if trial.verdict not in ("outside", "no better than fewer steps"):
                break
        return None

    def _apply(self, family: Family, index: int) -> None:
        """Apply a family's passes, unless the applied passes differ only in the knob."""
        if family.knob and _without_knob(family.knob[index], self._present) == _without_knob(
            family.knob[index], family.passes
        ):
            return
        if family.steps and self._applied and self._present == family.passes:
            return
        self._unapply()
        self.on_edit(f"compiling {describe_passes(family.passes)}")
        self._undo.enter_context(api.optimized(self.pipe, family.passes))
        self._present, self._applied = family.passes, True
        with warmup_run(self.pipe):
            self.workload.run(self.pipe, self.examples[0], steps=2)

    def _unapply(self) -> None:
        self._undo.close()
        self._present, self._applied = (), False

    def _try(self, family: Family, index: int, part: Part, best_speed: float = 0.0) -> Trial:
        """Run a trial of one setting on a part's examples, and record it."""
        try:
            self._apply(family, index)
            with api.using(self.pipe, family.knob[index]) if family.knob else nullcontext():
                trial = self._run_trial(family, index, part, best_speed)
            if trial.lossy and trial.verdict == "within":
                trial = self._compare_with_fewer_steps(trial)
        except Exception as error:  # noqa: BLE001 - third-party code; the search continues
            why = f"{type(error).__name__}: {error}"
            trial = Trial(family.at(index), part, "failed", why, None, float("nan"), 0.0)
            self._unapply()
        self.trials.append(trial)
        return trial

    def _compare_with_fewer_steps(self, trial: Trial) -> Trial:
        """Compare a lossy list with plain at as many steps as it computed.

        On the confirming examples the whole interval must lie above 0. Earlier a mean above 0 is
        enough, because there are fewer examples and a rejected list does not come back.
        """
        assert trial.quality is not None  # noqa: S101 - the trial did not fail
        cost = self._step_cost(trial)
        if trial.work * cost >= self.workload.steps or self.workload.steps == 1:
            return trial  # the list saves no work
        steps = min(equal_steps(trial.work, cost), self.workload.steps - 1)
        numbers = self.numbers(trial.part)
        exact = tuple(p for p in trial.passes if p.exactness != "lossy")
        known = self._fewer.setdefault((exact, steps), {})
        # Both are compared with the same list at all steps, so that compiling cancels out.
        twin = self._twins.setdefault(exact, {} if exact else dict(enumerate(self._pictures)))
        missing = [number for number in numbers if number not in known]
        with self._exact_passes_only(trial.passes) if missing else nullcontext():
            for number in missing:
                label = f"plain, {count_of(steps, 'step')}"
                self.on_edit(f"{label}, {number + 1} of {len(self.examples)}")
                if exact and number not in twin:
                    twin[number] = self._edit(number)
                known[number] = similarity(self._edit(number, steps), twin[number], ())
        fewer = Quality(tuple(known[n] for n in numbers), (None,) * len(numbers))
        mine = tuple(similarity(self._made[n], twin[n], ()) for n in numbers)
        gap = Quality(mine, (None,) * len(numbers)).minus(fewer)
        comparison = FewerStepsComparison(steps, mean(one.psnr for one in fewer.similarities), gap)
        if comparison.beats_fewer_steps if trial.part == "confirm" else gap is None or gap.mean > 0:
            return replace(trial, comparison=comparison)
        verdict: Verdict = "no better than fewer steps"
        return replace(trial, verdict=verdict, why=str(comparison), comparison=comparison)

    @contextmanager
    def _exact_passes_only(self, passes: tuple[Pass, ...]) -> Iterator[None]:
        """Run only the exact passes of an applied list; switching caches off compiles nothing."""
        lossy = [p for p in passes if p.exactness == "lossy"]
        if all(hasattr(p, "off") for p in lossy):
            with api.using(self.pipe, [p.off() for p in lossy]):  # type: ignore[attr-defined]
                yield
            return
        self._apply(Family(tuple(p for p in passes if p not in lossy)), 0)
        yield

    def _step_cost(self, trial: Trial) -> float:
        """Return the cost of a full step relative to an exact list's step.

        It is 1 unless a lossy pass makes each step cheaper. The reference is the fastest trial of
        the exact list. With prices all lists have the same step cost.
        """
        cheaper = any(p.exactness == "lossy" and p.stage != "caching" for p in trial.passes)
        if not cheaper or self.prices is not None:
            return 1.0
        exact = tuple(p for p in trial.passes if p.exactness != "lossy")
        others = [t for t in self.trials if t.passes == exact and t.quality and t.steps is None]
        seconds = min([t.seconds for t in others] or [self.plain(trial.part).trial.seconds])
        return trial.seconds / seconds * self.workload.steps / trial.work

    def _run_trial(self, family: Family, index: int, part: Part, best_speed: float) -> Trial:
        """Edit a part's examples until one exceeds the budget; hard examples come first."""
        passes, steps = family.at(index), family.steps_at(index)
        label = describe_passes(passes) + (f", {count_of(steps, 'step')}" if steps else "")
        seen: dict[int, tuple[Similarity, bool | None]] = {}
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
            near = similarity(picture, self._pictures[number], measures)
            seen[number] = near, self.examples[number].right(picture)
            if broken := self.budget.violation(near):
                self._offenders.insert(0, number)
                verdict, why = "outside", broken
                break
            if len(speeds) >= _EDITS_TO_JUDGE_SPEED and median(speeds) < best_speed:
                verdict, why = "slower", "slower than the best list so far"
                break
        ordered = [seen[number] for number in sorted(seen)]
        quality = Quality(tuple(near for near, _ in ordered), tuple(right for _, right in ordered))
        plain_success = self._plain_success(seen)
        if verdict == "within" and (lost := self.budget.shortfall(quality, plain_success)):
            verdict, why = "outside", lost
        return Trial(
            passes,
            part,
            verdict,
            why,
            quality,
            median(seconds),
            median(speeds),
            plain_success,
            steps,
            mean(works),
        )

    def _timed_edit(self, number: int, steps: int | None) -> tuple[Image.Image, float, float]:
        """Edit an example, and repeat the edit if it compiled for a new size.

        Returns:
            The picture, the seconds, and the computed work in full steps.
        """
        picture, seconds = time_call(partial(self._edit, number, steps))
        runs = api.report(self.pipe).runs
        if runs and runs[-1].compiles and self.prices is None:
            picture, seconds = time_call(partial(self._edit, number, steps))
            runs = api.report(self.pipe).runs
        if not runs:  # a test double of a pipeline
            return picture, seconds, float(steps or self.workload.steps)
        if self.prices is not None:
            seconds = self.prices.of(runs[-1].step_kinds)
        return (
            picture,
            seconds,
            work_of_run(runs[-1], len(model_of(self.pipe).blocks(self.pipe.transformer))).steps,
        )

    def _hardest_first(self, part: Part) -> list[int]:
        """Order a part's examples: ones that exceeded the budget before come first."""
        numbers = self.numbers(part)
        hard = [n for n in dict.fromkeys(self._offenders) if n in numbers]
        return [*hard, *(n for n in numbers if n not in hard)]

    def _plain_success(self, numbers: Iterable[int]) -> float | None:
        known = [r for n in numbers if (r := self._right[n]) is not None]
        return mean(known) if known else None

    def _edit(self, number: int, steps: int | None = None) -> Image.Image:
        seed = self.seed + number
        return self.workload.run(self.pipe, self.examples[number], seed=seed, steps=steps)


def _without_knob(knob: Pass, passes: Sequence[Pass]) -> list[object]:
    """Return a list without its knob's tunable settings, to see if two lists differ in more."""
    return [(type(p), configured(p).fixed) if p.name == knob.name else p for p in passes]
