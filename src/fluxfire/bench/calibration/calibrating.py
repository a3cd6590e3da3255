"""Calibrates a schedule: plain edits propose, whole edits decide, other edits confirm."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from itertools import product
from pathlib import Path
from statistics import mean, median
from typing import Any

from PIL import Image

from fluxfire import api
from fluxfire.bench.calibration.journal import Edit, Journal, Plain, fingerprint
from fluxfire.bench.calibration.proposing import Bounds, Errors, schedules
from fluxfire.bench.calibration.recording import Recorder, Trace
from fluxfire.bench.contenders import check_plain
from fluxfire.bench.examples import Example
from fluxfire.bench.quality import Quality, Similarity, similarity
from fluxfire.bench.results import stamp
from fluxfire.bench.tables import format_decibels
from fluxfire.bench.timing import on_device, time_call
from fluxfire.bench.trials import Family, FewerStepsComparison
from fluxfire.bench.work import equal_steps, work_of_run
from fluxfire.bench.workload import Workload
from fluxfire.diffusers_types import DiffusersPipeline
from fluxfire.errors import BenchError
from fluxfire.passes import FirstBlockCache, Schedule
from fluxfire.passes.shared.step_settings import is_whole_number
from fluxfire.planning import recipes
from fluxfire.planning.resolve import Passes, order
from fluxfire.protocol import Pass
from fluxfire.runtime.conductor import warmup_run
from fluxfire.supported import model_of
from fluxfire.text import count_of, human_seconds, table

_OF = 28  # the counts below are meant for so many steps
_WARMUPS = (4, 6, 8)
_EARLY = (0.0, 1.0, 2.0)
_CAP, _TAIL = 4, 1
_SHARES = (0.64, 0.5, 0.4)  # of the steps that are computed, by default
_FEWEST = 4  # examples: two to choose, two to confirm
_FEWEST_STEPS = 4
_FEWEST_JUDGES = 4


@dataclass(frozen=True)
class Calibration:
    """A schedule for one number of computed steps, measured on the confirming examples.

    Attributes:
        schedule: the steps to skip, with limits.
        computed: number of steps that the schedule computes; each exceeded limit adds one.
        candidates: number of schedules of as many steps that whole edits decided between.
        quality: similarity to the same passes with all steps.
        comparison: the difference to as much work in fewer steps, on the same edits and noise.
        fewer: similarity of those fewer steps.
        seconds: median seconds of an edit.
        overruled: the share of skipped steps that a limit had computed after all.
        work: mean work of an edit, in full steps; each exceeded limit adds nearly one.
    """

    schedule: Schedule
    computed: int
    candidates: int
    quality: Quality
    comparison: FewerStepsComparison
    fewer: Quality
    seconds: float
    overruled: float
    work: float

    @property
    def wins(self) -> bool:
        """Whether it saves work, and clearly beats plain with as much work."""
        saves = equal_steps(self.work) < self.schedule.steps
        return saves and self.comparison.beats_fewer_steps

    @property
    def cache(self) -> FirstBlockCache:
        """The cache that follows the schedule."""
        return _cache(self.schedule)


@dataclass(frozen=True)
class Calibrated:
    """The result of `calibrate`. Prints as a table.

    Attributes:
        found: a schedule for each number of computed steps, most steps first.
        passes: the other passes of the list.
        workload: size and number of steps.
        seed: seed of the first example's noise.
        seconds: median seconds of an edit with all steps.
        calibrating: number of examples that made the schedules.
        confirming: number of examples that the figures are from.
    """

    found: tuple[Calibration, ...]
    passes: tuple[Pass, ...]
    workload: Workload
    seed: int
    seconds: float
    calibrating: int
    confirming: int

    def best(self, computed: int | None = None) -> Calibration:
        """Return the schedule of a number of computed steps.

        Args:
            computed: the number; None for the least work that beats plain with as much.

        Raises:
            BenchError: there is no such schedule.
        """
        if computed is not None:
            for one in self.found:
                if one.computed == computed:
                    return one
            have = ", ".join(str(one.computed) for one in self.found)
            raise BenchError(f"no schedule computes {computed} steps; there are {have}")
        winners = [one for one in self.found if one.wins]
        if not winners:
            raise BenchError(
                "no schedule clearly beats plain with fewer steps on these examples; use more "
                "examples, or take one by its number of computed steps"
            )
        return min(winners, key=lambda one: one.work)

    def list_of(self, computed: int | None = None) -> tuple[Pass, ...]:
        """Return the whole list of passes with a schedule's cache.

        Args:
            computed: as in `best`.
        """
        return tuple(order([*self.passes, self.best(computed).cache]))

    def save(self, path: str | Path, computed: int | None = None) -> None:
        """Save the list for `optimize(pipe, "….json")`, together with this result.

        Args:
            path: the file; its name ends in `.json`.
            computed: as in `best`.

        Raises:
            BenchError: there is no such schedule.
            PlanError: the name does not end in `.json`, or a pass cannot be written.
            OSError: the file cannot be written.
        """
        recipes.write(self.list_of(computed), Path(path), **stamp(), calibrated=self.to_dict())

    def to_dict(self) -> dict[str, Any]:
        """Return the result as plain data."""
        return {
            "passes": [repr(p) for p in self.passes],
            "workload": asdict(self.workload),
            "seed": self.seed,
            "seconds": self.seconds,
            "calibrating": self.calibrating,
            "confirming": self.confirming,
            "found": [
                {
                    "computed": one.computed,
                    "schedule": asdict(one.schedule),
                    "candidates": one.candidates,
                    "seconds": one.seconds,
                    "overruled": one.overruled,
                    "work": one.work,
                    "quality": one.quality.to_dict(),
                    "fewer_steps": {"steps": one.comparison.steps, **one.fewer.to_dict()},
                    "beside_fewer_steps": asdict(one.comparison),
                }
                for one in self.found
            ],
        }

    def __str__(self) -> str:
        head = (
            "computed", "skips overruled", "work", "an edit", "PSNR, dB", "worst", "inside",
            "fewer steps", "worst", "difference",
        )  # fmt: skip
        steps = self.workload.steps
        rows = [(f"{steps} of {steps}", "-", f"{steps}", human_seconds(self.seconds), *["-"] * 6)]
        rows += [_row(one, steps) for one in self.found]
        return (
            f"{table(head, rows)}\n\n{self.confirming} examples that did not make the schedules; "
            f'"fewer steps" is plain with as many steps as the work, rounded up, on the same edits '
            f"and noise."
        )


def _row(one: Calibration, steps: int) -> tuple[str, ...]:
    gap = one.comparison.difference
    quality, fewer = one.quality, one.fewer
    inside = [s.edited for s in quality.similarities if s.edited is not None]
    return (
        f"{one.computed} of {steps}",
        f"{one.overruled:.1%}",
        f"{one.work:.1f}",
        human_seconds(one.seconds),
        format_decibels(mean(s.psnr for s in quality.similarities)),
        format_decibels(quality.worst_psnr),
        format_decibels(mean(inside)) if inside else "-",
        f"{one.comparison.steps}: {format_decibels(one.comparison.psnr)}",
        format_decibels(fewer.worst_psnr),
        f"{gap.mean:+.1f} [{gap.low:+.1f}, {gap.high:+.1f}]" if gap else "-",
    )


def calibrate(
    pipe: DiffusersPipeline,
    examples: Iterable[Example],
    *,
    passes: Passes = (),
    computed: Sequence[int] | None = None,
    workload: Workload | None = None,
    seed: int = 0,
    folder: str | Path | None = None,
    on_edit: Callable[[str], None] = lambda _: None,
) -> Calibrated:
    """Find the best steps to skip for one model.

    Half of the examples make the schedules. Their plain edits give the inner products of what the
    blocks add at each step. From these follows the error of every damped line, so dynamic
    programming finds the schedule of least expected error for each number of computed steps, under
    several bounds. Whole edits decide between these candidates: of the examples with the largest
    expected errors, the best worst picture wins. The other half of the examples confirms: all
    figures of the result are from there.

    Args:
        pipe: a plain pipeline with trained weights; it is plain again afterwards, even after an
            exception.
        examples: 16 or more edits of the kind that you will make. Four are the minimum. With fewer
            than ten no schedule can be shown to beat fewer steps, so `save` needs `computed`.
            Pictures may have several sizes.
        passes: other passes to use with the schedule, such as `"faithful"`. The schedule's cache
            replaces a cache of the list. An `EncodingCache` stays in the list, but is off here, so
            that all seconds are those of a new prompt and a new picture.
        computed: numbers of computed steps; by default 64%, 50% and 40% of the steps.
        workload: size, number of steps, and other arguments of the edits, such as true CFG; the
            pipeline's default size and 28 steps by default. Calibrate what you will run: a schedule
            is right for its noise levels alone.
        seed: seed of the first example's noise; each example has its own.
        folder: keeps every edit, so that the same call goes on after an interrupt, or measures
            another number of computed steps without making the plain edits again.
        on_edit: callback before each edit, with a description of it.

    Raises:
        BenchError: there are fewer than four examples, an example or the seed is none, a number of
            computed steps is impossible, or the folder holds another calibration or is in use.
        PlanError: the pipeline is not plain, or the passes cannot be applied to it.
    """
    examples = list(examples)
    for example in examples:
        if not (isinstance(example, Example) and isinstance(example.instruction, str)):
            raise BenchError(
                f"calibrate edits examples, such as Example('make it night', picture), with one "
                f"instruction each; there is {example!r}"
            )
    if not is_whole_number(seed, 0):
        raise BenchError(f"seed={seed!r}; it must be a whole number of 0 or more")
    if len(examples) < _FEWEST:
        raise BenchError(
            f"calibrate needs {_FEWEST} examples or more, half of them to make the schedules and "
            f"half to confirm; there are {len(examples)}"
        )
    check_plain(pipe)
    load = workload or Workload.for_pipeline(pipe)
    wanted = budgets(computed, load.steps)
    planned = api.plan(pipe, passes)
    planned.raise_if_bad()
    others = tuple(p for p in (step.pass_ for step in planned.steps) if p.slot != "block-cache")
    # Its pictures are bitwise the same, but only later edits of an example would be faster by it.
    timed = tuple(p for p in others if p.slot != "encoding-cache")
    recorder = Recorder()
    # The first wrapper is the outermost: the recorder sees whole runs through the blocks.
    listed = order([recorder, *timed, FirstBlockCache().off()])
    api.plan(pipe, listed).raise_if_bad()
    journal = Journal.open(folder, partial(fingerprint, pipe, examples, others, load, seed))
    with closing(journal), on_device(pipe), api.optimized(pipe, listed):
        bench = _Bench(pipe, examples, load, seed, on_edit, recorder, journal)
        half = len(examples) // 2
        bench.edit_plainly(range(half), record=True)
        bench.edit_plainly(range(half, len(examples)), record=False)
        traces = [trace for i in range(half) for trace in bench.plain[i].traces]
        found = []
        for n in wanted:
            candidates = proposals(traces, n)
            best = bench.decide(candidates, range(half))
            found.append(bench.confirm(best, len(candidates), range(half, len(examples))))
        seconds = median(bench.plain[i].seconds for i in range(half, len(examples)))
    return Calibrated(tuple(found), others, load, seed, seconds, half, len(examples) - half)


def budgets(computed: Iterable[int] | None, steps: int) -> list[int]:
    """Return the numbers of computed steps, most first.

    Raises:
        BenchError: there are too few steps, or a number is impossible.

    Example: of 28 steps the first 4 and the last are always computed. Of the 23 between, at most 4
    in a row are skipped, so 4 are computed: 9 in all.
    """
    if steps < _FEWEST_STEPS:
        raise BenchError(
            f"there is nothing to skip in {steps} steps; calibrate needs {_FEWEST_STEPS} or more"
        )
    always = _scale(_WARMUPS[0], steps) + _TAIL
    fewest = always + max(0, -((_CAP - (steps - always)) // (_CAP + 1)))
    most = steps - 1
    if computed is None:
        computed = [min(most, max(fewest, round(share * steps))) for share in _SHARES]
    numbers = list(computed) if isinstance(computed, Iterable) else [computed]
    for n in numbers:
        if not (is_whole_number(n, fewest) and n <= most):
            raise BenchError(
                f"{n!r} computed steps of {steps} are not possible; choose whole numbers from "
                f"{fewest} to {most}"
            )
    if not numbers:
        raise BenchError(
            f"computed is empty; give one or more whole numbers from {fewest} to {most}"
        )
    return sorted(set(numbers), reverse=True)


def _scale(count: int, steps: int) -> int:
    return max(1, -(-count * steps // _OF))


def proposals(traces: Sequence[Trace], computed: int) -> list[Schedule]:
    """Return the candidates of a number of computed steps: each different schedule once.

    Args:
        traces: of plain edits.
        computed: the number of computed steps.
    """
    errors = Errors(traces)
    found: dict[Schedule, None] = {}
    for warmup, early in product(_WARMUPS, _EARLY):
        bounds = Bounds(_scale(warmup, errors.steps), _TAIL, _CAP, early)
        if (schedule := schedules(errors, bounds).get(computed)) is not None:
            found[schedule] = None
    return list(found)


def schedule_family(traces: Sequence[Trace], base: Sequence[Pass], warmup: int) -> Family:
    """Return schedules of fewer and fewer computed steps, for `tune` to search.

    Args:
        traces: of plain edits.
        base: an exact list.
        warmup: how many of 28 steps are computed at first.

    Raises:
        BenchError: there is nothing to skip.
    """
    errors = Errors(traces)
    found = schedules(errors, Bounds(_scale(warmup, errors.steps), _TAIL, _CAP, early=1.0))
    caches = tuple(_cache(found[n]) for n in sorted(found, reverse=True) if found[n].by_step)
    if not caches:
        raise BenchError(f"there is nothing to skip in {count_of(errors.steps, 'step')}")
    return Family(tuple(order([*base, caches[0]])), caches)


def _cache(schedule: Schedule) -> FirstBlockCache:
    return FirstBlockCache(schedule=schedule, distance="noise", predict="damped")


@dataclass
class _Bench:
    """Edits the examples with all steps, with schedules, and with fewer steps.

    Attributes:
        plain: the edits with all steps, by example.
    """

    pipe: DiffusersPipeline
    examples: Sequence[Example]
    workload: Workload
    seed: int
    on_edit: Callable[[str], None]
    recorder: Recorder
    journal: Journal
    plain: dict[int, Plain] = field(default_factory=dict)
    _warm: bool = False

    def edit_plainly(self, numbers: range, *, record: bool) -> None:
        """Edit with all steps, and record traces if asked."""
        for i in numbers:
            plain = self.journal.plain(i)
            if plain is None:
                self.warm_up()
                self.on_edit(f"all steps, {i + 1} of {len(self.examples)}")
                self.recorder.traces.clear()
                picture, seconds = self._timed(i, record=record)
                plain = Plain(picture, seconds, tuple(self.recorder.traces))
                if record:
                    Errors(plain.traces)  # so that the first edit tells what is unusable
                self.journal.keep_plain(i, plain)
            self.plain[i] = plain

    def decide(self, candidates: Sequence[Schedule], numbers: range) -> Schedule:
        """Return the candidate whose worst picture is best.

        Only the half of the examples with the largest expected errors judges, because the worst
        picture counts. The hardest come first, and a candidate whose picture is worse than the best
        candidate's worst is out: most need one edit or two.
        """
        best, best_worst = candidates[0], -float("inf")
        if len(candidates) == 1:
            return best
        expected = {i: Errors(self.plain[i].traces).of(best) for i in numbers}
        judges = sorted(numbers, key=lambda i: -expected[i])
        judges = judges[: max(_FEWEST_JUDGES, len(judges) // 2)]
        seen: dict[int, float] = {}  # the last PSNR of each judge
        for turn, candidate in enumerate(candidates, 1):
            worst = float("inf")
            for i in sorted(judges, key=lambda i: seen.get(i, 0.0)):
                said = f"candidate {turn} of {len(candidates)}"
                seen[i] = self._edit(i, said, candidate).psnr
                worst = min(worst, seen[i])
                if worst <= best_worst:
                    break
            if worst > best_worst:
                best, best_worst = candidate, worst
        return best

    def confirm(self, schedule: Schedule, candidates: int, numbers: range) -> Calibration:
        """Measure the chosen schedule, and plain with as much work."""
        made, fewer = [], []
        for i in numbers:
            said = f"confirming, {i + 1 - numbers.start} of {len(numbers)}"
            made.append(self._edit(i, said, schedule))
        work = mean(edit.work for edit in made)
        steps = min(equal_steps(work), self.workload.steps - 1)
        for i in numbers:
            said = f"{count_of(steps, 'step')}, {i + 1 - numbers.start} of {len(numbers)}"
            fewer.append(self._edit(i, said, steps=steps))
        quality, beside = _quality(made), _quality(fewer)
        skipped = len(schedule.by_step)
        return Calibration(
            schedule,
            schedule.steps - skipped,
            candidates,
            quality,
            FewerStepsComparison(steps, mean(e.psnr for e in fewer), quality.minus(beside)),
            beside,
            median(edit.seconds for edit in made),
            1 - sum(edit.hits for edit in made) / (skipped * len(numbers)),
            work,
        )

    def _edit(
        self, i: int, said: str, schedule: Schedule | None = None, *, steps: int | None = None
    ) -> Edit:
        """Edit, or take the measurement that the journal has, and compare with all steps.

        Args:
            i: the example.
            said: what to tell of the edit before it is made.
            schedule: to follow; None for no cache.
            steps: number of steps; None for the workload's.
        """
        what = f"{steps} steps" if schedule is None else repr(schedule)
        if (known := self.journal.edit(what, i)) is not None:
            return known
        self.warm_up()
        self.on_edit(said)
        example = self.examples[i]
        picture, seconds = self._timed(i, schedule, steps=steps)
        run = api.report(self.pipe).runs[-1]
        near = similarity(picture, self.plain[i].picture, (), example.picture)
        edit = Edit(
            near.psnr,
            near.edited,
            seconds,
            work_of_run(run, len(model_of(self.pipe).blocks(self.pipe.transformer))).steps,
            sum(kind == "hit" for kind in run.step_kinds),
            example.right(picture),
        )
        self.journal.keep_edit(what, i, edit)
        return edit

    def _timed(
        self,
        i: int,
        schedule: Schedule | None = None,
        *,
        steps: int | None = None,
        record: bool = False,
    ) -> tuple[Image.Image, float]:
        """Edit one example; return the picture and the seconds."""
        cache = FirstBlockCache().off() if schedule is None else _cache(schedule)
        with api.using(self.pipe, [cache, replace(self.recorder, active=record)]):
            return time_call(
                partial(
                    self.workload.run,
                    self.pipe,
                    self.examples[i],
                    seed=self.seed + i,
                    steps=steps,
                )
            )

    def warm_up(self) -> None:
        """Compile whatever compiles, once, so that no edit's time has it."""
        if self._warm:
            return
        self._warm = True
        for example in self.workload.of_each_size(self.pipe, self.examples):
            self.on_edit("warm-up")
            with warmup_run(self.pipe):
                self.workload.run(self.pipe, example, steps=2)


def _quality(edits: Sequence[Edit]) -> Quality:
    return Quality(
        tuple(Similarity(edit.psnr, edited=edit.edited) for edit in edits),
        tuple(edit.right for edit in edits),
    )
