"""The benchmark loop: contenders take turns to edit all examples on one pipeline and device."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from statistics import mean, median

import torch
from PIL import Image

from fluxfire import api
from fluxfire.bench.contenders import (
    COMPILED,
    EAGER,
    Contender,
    check_plain,
    shown_name,
    twin_of,
    with_twins,
)
from fluxfire.bench.examples import Example
from fluxfire.bench.phases import phases
from fluxfire.bench.power import measure_energy
from fluxfire.bench.quality import SAME, Quality, compare
from fluxfire.bench.rows import Row, TimedEdit
from fluxfire.bench.timing import on_device, time_call
from fluxfire.bench.work import BlockCounter, equal_steps, work_of_run
from fluxfire.bench.workload import Workload
from fluxfire.diffusers_types import DiffusersPipeline, Pipeline
from fluxfire.errors import BenchError, FluxfireError
from fluxfire.runtime.conductor import warmup_run
from fluxfire.supported import model_of

_GIB = 2**30


def measure(
    pipe: DiffusersPipeline,
    contenders: Sequence[Contender],
    workloads: Sequence[Workload],
    examples: Sequence[Example],
    *,
    rounds: int = 2,
    warmups: int = 1,
    seed: int = 0,
    keep: int = 16,
    fewer_steps: bool = True,
    repeated: int | None = None,
    on_edit: Callable[[str], None] = lambda _: None,
    on_rows: Callable[[list[Row]], None] = lambda _: None,
) -> list[Row]:
    """Measure contenders on workloads, and compare lossy ones with plain at fewer steps.

    Contenders alternate for several rounds, forwards and backwards, because a GPU slows down when
    it gets warm. In each round the benchmark applies a contender's passes, makes warm-up runs of
    two steps (the first one compiles), and then edits every example once. Between turns it resets
    torch's compiler, but not the compiler's cache on disk. So a first run is a cold start only if
    no earlier run compiled the same graphs.

    A lossy contender gets two companions. Its *twin* is the same list without lossy passes; the
    twin's pictures are the reference. After the first round the twin also runs with fewer steps: as
    many as the contender computed, rounded up. A method that does not beat this baseline is
    useless, because `num_inference_steps` does the same.

    The first contender runs again at the end. If its median changed by more than 5%, another
    program slowed the machine down, and `Row.moved` shows that.

    A contender that raises an exception is skipped afterwards, and its row has the error.

    Args:
        pipe: a plain pipeline; it is plain again afterwards, even after an exception.
        contenders: the contenders, with unique names. If the first ones are named `EAGER` and
            `COMPILED`, all pictures are compared with theirs.
        workloads: sizes and numbers of steps.
        examples: the examples to edit.
        rounds: number of timed edits of each example.
        warmups: warm-up runs for each size before the timed edits; with 0 the first timed edits
            include the warm-up.
        seed: seed of the first example's noise; each example has its own.
        keep: with more examples than this, a contender keeps only its worst pictures. Controls
            keep all.
        fewer_steps: whether to run the companions; False measures only the given contenders.
        repeated: number of examples that the first contender edits again at the end; None for all.
        on_edit: callback before each edit, with a description of it.
        on_rows: callback after each turn with the rows so far, so that a crash loses little.

    Returns:
        A row for each contender and workload; a companion's rows follow the given ones.

    Raises:
        BenchError: contenders, workloads or examples are empty, or two have the same name.
        PlanError: the pipeline is not plain.
    """
    for what, names in (
        ("contender", [c.name for c in contenders]),
        ("workload", [w.name for w in workloads]),
    ):
        if not names:
            raise BenchError(f"there is no {what} to measure")
        if twice := next((n for n in names if names.count(n) > 1), None):
            raise BenchError(f"two {what}s are called {twice!r}; give each its own name")
    if not examples:
        raise BenchError("there is no example to edit")
    check_plain(pipe)
    if fewer_steps:
        contenders = with_twins(contenders)
    bench = _Bench(pipe, examples, rounds, warmups, seed, keep, on_edit, on_rows)
    bench.rows = [Row(c, w) for c in contenders for w in workloads]
    bench.run_round(0, contenders)
    if fewer_steps:
        contenders = [*contenders, *bench.add_fewer_steps(contenders)]
    for number in range(1, rounds):
        bench.run_round(number, contenders)
    bench.repeat_first(examples[:repeated])
    bench.compare_with_fewer_steps()
    return bench.rows


@dataclass(eq=False)
class _Bench:
    """One call of `measure`."""

    pipe: Pipeline
    examples: Sequence[Example]
    rounds: int
    warmups: int
    seed: int
    keep: int
    on_edit: Callable[[str], None]
    on_rows: Callable[[list[Row]], None]
    rows: list[Row] = field(default_factory=list)
    _latest: Contender | None = None

    def run_round(self, number: int, contenders: Sequence[Contender]) -> None:
        """Run every contender once; odd rounds run backwards."""
        turns = _turns(contenders)
        if number % 2 == 1:
            turns = [turn[::-1] for turn in reversed(turns)]
        for turn in turns:
            self._run_group([row for c in turn for row in self._rows_of(c)], number)

    def _run_group(self, rows: Sequence[Row], number: int) -> None:
        failed = {row.contender.name for row in rows if row.error}
        rows = [row for row in rows if row.contender.name not in failed]
        if rows:
            self._run_turn(rows, f"round {number + 1} of {self.rounds}")
            for row in rows:
                self._compare_pictures(row)
            self._latest = rows[-1].contender
        self._report_rows()

    def _run_turn(
        self, rows: Sequence[Row], label: str, examples: Sequence[Example] | None = None
    ) -> None:
        turn = _Turn(
            self.examples if examples is None else examples,
            self.warmups,
            self.seed,
            label,
            self.on_edit,
        )
        with on_device(self.pipe):
            turn.run(self.pipe, rows)

    def _report_rows(self) -> None:
        self.on_rows([row for row in self.rows if row.has_content])

    def add_fewer_steps(self, contenders: Sequence[Contender]) -> list[Contender]:
        """Run each lossy contender's twin with as many steps as the contender computed.

        Returns:
            The new contenders, for all further rounds.
        """
        added: dict[str, Contender] = {}
        for row in list(self.rows):
            twin = twin_of(row.contender, contenders)
            base = twin and self._row(twin.name, row.workload)
            if twin is None or not base or not base.edits or not row.edits:
                continue
            row.twin = twin.name
            work, cost = mean(edit.work.steps for edit in row.edits), _step_cost(row, base)
            if work * cost >= base.steps or base.steps == 1:
                continue  # the contender saves no work
            fewer = self._fewer_steps_twin(twin, min(equal_steps(work, cost), base.steps - 1))
            row.fewer_steps_name = fewer.name
            if self._row(fewer.name, row.workload) is None:
                added[fewer.name] = fewer
                self.rows.append(Row(fewer, row.workload))
        self.run_round(0, list(added.values()))
        return list(added.values())

    def _fewer_steps_twin(self, twin: Contender, steps: int) -> Contender:
        """Return a twin with fewer steps: a measured contender if there is one, else a new one."""
        wanted, known = twin.with_steps(steps), [row.contender for row in self.rows]
        for one in known:
            if one.bare and (one.passes, one.steps) == (wanted.passes, steps):
                return one
        taken = any(one.name == wanted.name for one in known)
        return replace(wanted, name=f"{wanted.name} of {twin.name}") if taken else wanted

    def repeat_first(self, examples: Sequence[Example]) -> None:
        """Run the first contender again, unless it just ran, to see if the machine slowed down."""
        first = self.rows[0].contender
        rows = [row for row in self._rows_of(first) if row.edits and not row.error]
        again = rows
        if rows and (self._latest is not first or self.rounds == 1):
            again = [Row(first, row.workload) for row in rows]
            self._run_turn(again, "once more", examples)
        for row, other in zip(rows, again, strict=True):
            latest = other.edits[-len(self.examples) :][: len(examples)]
            row.again = [edit.seconds for edit in latest]
        self._report_rows()

    def compare_with_fewer_steps(self) -> None:
        """Give every lossy row the fewer-steps row that it must beat."""
        for row in self.rows:
            if row.fewer_steps_name is not None:
                row.fewer_steps_row = self._row(row.fewer_steps_name, row.workload)
        self._report_rows()

    def _compare_pictures(self, row: Row) -> None:
        """Compare a row's pictures with its references once, then drop pictures without a use."""
        if row.quality or not row.pictures:
            return
        numbers = sorted(row.pictures)
        control = row.contender.name in (EAGER, COMPILED) or self._is_twin(row.contender)
        for name in self._references(row.contender):
            other = self._row(name, row.workload)
            if other is row:
                row.quality[name] = Quality((SAME,) * len(numbers), tuple(row.right))
            elif other and sorted(other.pictures) == numbers:
                made, wanted = ([r.pictures[n] for n in numbers] for r in (row, other))
                sources = [self.examples[n].picture for n in numbers]
                if not row.workload.reference:
                    sources = [None] * len(numbers)
                try:
                    row.quality[name] = compare(made, wanted, row.right, sources)
                except ValueError as error:  # the pictures have different sizes
                    row.error = str(error)
        if len(numbers) > self.keep and not control:
            worst = {quality.worst for quality in row.quality.values()}
            row.pictures = {n: p for n, p in row.pictures.items() if n in worst}

    def _references(self, contender: Contender) -> list[str]:
        """Return the names of the controls and of the contender's twin."""
        names = [EAGER, COMPILED]
        others = [row.contender for row in self.rows]
        if contender.role == "fewer steps":
            names += [
                c.name for c in others if c.bare and not c.steps and c.passes == contender.passes
            ]
        elif (twin := twin_of(contender, others)) is not None:
            names.append(twin.name)
        elif self._is_twin(contender):
            names.append(contender.name)
        return list(dict.fromkeys(names))

    def _is_twin(self, contender: Contender) -> bool:
        others = [row.contender for row in self.rows]
        return any(twin_of(other, others) is contender for other in others)

    def _rows_of(self, contender: Contender) -> list[Row]:
        return [row for row in self.rows if row.contender.name == contender.name]

    def _row(self, name: str, workload: Workload) -> Row | None:
        wanted = name, workload.name
        found = (r for r in self.rows if (r.contender.name, r.workload.name) == wanted)
        return next(found, None)


def _turns(contenders: Sequence[Contender]) -> list[list[Contender]]:
    """Group contenders that differ only in their steps, so that passes are applied once."""
    turns: list[list[Contender]] = []
    for contender in contenders:
        for turn in turns:
            if _same_but_for_steps(turn[0], contender):
                turn.append(contender)
                break
        else:
            turns.append([contender])
    return turns


def _same_but_for_steps(one: Contender, other: Contender) -> bool:
    return one.bare and other.bare and one.passes == other.passes and one.steps != other.steps


def _describe(row: Row) -> str:
    """Name a row's contender and workload, with the number of steps that its edits really have."""
    name, load = shown_name(row.contender.name), row.workload
    if row.contender.steps is None:
        return f"{name}, {load.name}"
    return f"{name}, {load.name_without_steps}"


def _step_cost(row: Row, twin: Row) -> float:
    """Return the cost of a computed step relative to the twin's; 1 if the row only skips steps."""
    if not row.contender.cheaper_steps:
        return 1.0
    own, plain = (
        [seconds for edit in one.edits for seconds, kind in edit.steps if kind == "computed"]
        for one in (row, twin)
    )
    return median(own) / median(plain) if own and plain else 1.0


@dataclass(frozen=True)
class _Turn:
    """One turn: one applied list, with one contender or several that differ in their steps."""

    examples: Sequence[Example]
    warmups: int
    seed: int
    label: str
    on_edit: Callable[[str], None]

    def run(self, pipe: Pipeline, rows: Sequence[Row]) -> None:
        """Apply the rows' list and run their workloads.

        An error ends only its own contender's turn: the list is applied again for the others.
        """
        while rows:
            rows = self._run_turn(pipe, rows)

    def _run_turn(self, pipe: Pipeline, rows: Sequence[Row]) -> list[Row]:
        """Apply the list once; return rows that did not run because another contender failed."""
        left: list[Row] = []
        torch.compiler.reset()
        before = _memory()
        _reset_peak()
        began = time.perf_counter()
        done = 0
        names = dict.fromkeys(shown_name(row.contender.name) for row in rows)
        self.on_edit(f"{self.label}: {' and '.join(names)}")
        try:
            with rows[0].contender.applied(pipe) as own:
                applied = {
                    "apply_seconds": time.perf_counter() - began,
                    "apply_gib": _memory() - before,
                    "apply_peak_gib": _peak() - before,
                }
                for row in rows:
                    row.applied = row.applied or applied
                    self._run(own, row)
                    done += 1
        except Exception as error:  # noqa: BLE001 - third-party code; the other contenders continue
            kind = "" if isinstance(error, FluxfireError) else f"{type(error).__name__}: "
            failed = rows[
                min(done, len(rows) - 1)
            ]  # the last row, if leaving the `with` block failed
            failed.error = f"{kind}{error}"
            for later in rows[done + 1 :]:
                if later.contender.name == failed.contender.name:
                    later.error = f"not run, after {failed.workload.name} failed"
                else:
                    left.append(later)
        gc.collect()  # a baseline's pipeline is in reference cycles
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return left

    def _run(self, pipe: Pipeline, row: Row) -> None:
        """Warm up and edit every example; after an error the row stays unchanged."""
        load = row.workload
        calibrate = lambda: load.run(pipe, self.examples[0], seed=self.seed)  # noqa: E731
        first = []
        with row.contender.prepare(pipe, load, calibrate):
            for example in load.of_each_size(pipe, self.examples):
                for _ in range(self.warmups):
                    with warmup_run(pipe):
                        load.run(pipe, example, steps=2)
                    first.append(api.report(pipe).runs[-1])
        edits, pictures, right = [], {}, []
        with row.contender.prepare(
            pipe, load, calibrate
        ):  # again, because warm-up runs have two steps
            _reset_peak()
            with measure_energy() as energy:
                for number, example in enumerate(self.examples):
                    turn = f"{number + 1} of {len(self.examples)}"
                    self.on_edit(f"{self.label}: {_describe(row)}: {turn}")
                    edit, picture = self._edit(pipe, row, example, self.seed + number)
                    edits.append(edit)
                    if not row.edits:
                        pictures[number] = picture
                        right.append(example.right(picture))
        row.first += first[:1]
        row.edits += edits
        row.pictures, row.right = row.pictures or pictures, row.right or right
        row.energy += [energy] if energy is not None else []
        row.peak = max(row.peak, _peak())
        if row.contender.baseline is None:
            row.weights = sum(p.nbytes for p in pipe.transformer.parameters())

    def _edit(
        self, pipe: Pipeline, row: Row, example: Example, seed: int
    ) -> tuple[TimedEdit, Image.Image]:
        load, baseline = row.workload, row.contender.baseline
        counter = BlockCounter(pipe) if baseline and baseline.skips else nullcontext()
        with phases(pipe) as spans, counter:
            picture, seconds = time_call(
                lambda: load.run(pipe, example, seed=seed, steps=row.steps)
            )
        run = api.report(pipe).runs[-1]
        if isinstance(counter, BlockCounter):
            work = counter.work(row.steps)
        else:
            work = work_of_run(run, len(model_of(pipe).blocks(pipe.transformer)))
        spent = {**spans.seconds(), "denoising": sum(run.step_seconds)}
        spent["the rest"] = seconds - sum(spent.values())
        steps = tuple(zip(run.step_seconds, run.step_kinds, strict=True))
        edit = TimedEdit(seconds, steps, spent, run.hit_rate, run.compiles, run.graph_breaks, work)
        return edit, picture


def _memory() -> float:
    return torch.cuda.memory_allocated() / _GIB if torch.cuda.is_available() else 0.0


def _peak() -> float:
    return torch.cuda.max_memory_allocated() / _GIB if torch.cuda.is_available() else 0.0


def _reset_peak() -> None:
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
