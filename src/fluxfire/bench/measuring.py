"""The harness: every contender edits every example, in turn, on one pipeline and one device."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from statistics import mean, median
from typing import Any

import torch
from PIL import Image

from fluxfire import api
from fluxfire.bench.contenders import COMPILED, EAGER, Contender, check_plain, twin_of, with_twins
from fluxfire.bench.examples import Example
from fluxfire.bench.phases import phases
from fluxfire.bench.power import metered
from fluxfire.bench.quality import SAME, Quality, compare
from fluxfire.bench.rows import Edit, Row
from fluxfire.bench.timing import on_device, timed
from fluxfire.bench.work import BlockCounter, equal_steps, of_run
from fluxfire.bench.workload import Workload
from fluxfire.errors import BenchError, FluxfireError
from fluxfire.runtime.conductor import warmup_run
from fluxfire.supported import model_of

_GIB = 2**30


def measure(
    pipe: Any,
    contenders: Sequence[Contender],
    workloads: Sequence[Workload],
    examples: Sequence[Example],
    *,
    rounds: int = 2,
    warmups: int = 1,
    seed: int = 0,
    keep: int = 16,
    fewer_steps: bool = True,
    on_edit: Callable[[str], None] = lambda _: None,
    on_rows: Callable[[list[Row]], None] = lambda _: None,
) -> list[Row]:
    """Measure every contender on every workload, and lossy ones beside plain with fewer steps.

    Contenders take turns for some rounds, forwards and backwards, because a GPU slows down when
    it gets warm. In each round a contender is applied anew, makes short runs of two steps, the
    first of which compiles, and then edits every example once. Between turns torch's compiler is
    reset. Its cache on disk is not, so a first run is a cold start only where nothing before it
    compiled the same.

    A lossy contender gets two companions. Its *twin* is the same list without what is lossy; the
    twin's pictures are its reference. After the first round the twin also runs with fewer steps:
    as many as the contender computed, rounded up. A method that does not beat that is worth
    nothing, since `num_inference_steps` does the same.

    The first contender runs once more at the end. If its median moved by more than 5%, something
    else slowed the machine, and `Row.moved` says so.

    A contender that raises is left out from there on, and its row says why.

    Args:
        pipe: a plain pipeline; it is plain again at the end, also after an exception.
        contenders: what to compare, each with a name of its own. Pictures are compared with those
            of the contenders named `EAGER` and `COMPILED`, if these come first.
        workloads: what to run.
        examples: what to edit.
        rounds: whole edits of each example.
        warmups: short runs for each size before the edits that count; with 0 the first edits
            include the warm-up.
        seed: of the first example's noise; each example has its own.
        keep: with more examples than this, a contender keeps only its worst pictures; controls
            keep all.
        fewer_steps: run the companions; False measures exactly the given contenders.
        on_edit: called before each edit, with what comes next.
        on_rows: called after each turn with the rows so far, so that a crash loses little.

    Returns:
        A row for each contender and workload; a companion's rows follow the given ones.

    Raises:
        BenchError: nothing to compare, run or edit, or two of one name.
        PlanError: the pipeline is not plain.
    """
    for what, names in (
        ("contender", [c.name for c in contenders]),
        ("workload", [w.name for w in workloads]),
    ):
        if not names:
            raise BenchError(f"there is no {what} to measure")
        if twice := next((n for n in names if names.count(n) > 1), None):
            raise BenchError(f"two {what}s are called {twice!r}; give each a name of its own")
    if not examples:
        raise BenchError("there is no example to edit")
    check_plain(pipe)
    if fewer_steps:
        contenders = with_twins(contenders)
    bench = _Bench(pipe, examples, rounds, warmups, seed, keep, on_edit, on_rows)
    bench.rows = [Row(c, w) for c in contenders for w in workloads]
    bench.play(0, contenders)
    if fewer_steps:
        contenders = [*contenders, *bench.add_fewer_steps(contenders)]
    for number in range(1, rounds):
        bench.play(number, contenders)
    bench.repeat_first()
    bench.compare_with_fewer_steps()
    return bench.rows


@dataclass(eq=False)
class _Bench:
    """One call of `measure`."""

    pipe: Any
    examples: Sequence[Example]
    rounds: int
    warmups: int
    seed: int
    keep: int
    on_edit: Callable[[str], None]
    on_rows: Callable[[list[Row]], None]
    rows: list[Row] = field(default_factory=list)
    _latest: Contender | None = None

    def play(self, number: int, contenders: Sequence[Contender]) -> None:
        """Give every contender one turn, in odd rounds backwards."""
        turns = _turns(contenders)
        if number % 2 == 1:
            turns = [turn[::-1] for turn in reversed(turns)]
        for turn in turns:
            names = " and ".join(contender.name for contender in turn)
            self._play([row for c in turn for row in self._of(c)], number, names)

    def _play(self, rows: Sequence[Row], number: int, names: str) -> None:
        failed = {row.contender.name for row in rows if row.error}
        rows = [row for row in rows if row.contender.name not in failed]
        if rows:
            self._take(rows, f"round {number + 1} of {self.rounds}: {names}")
            for row in rows:
                self._judge(row)
            self._latest = rows[-1].contender
        self._tell()

    def _take(self, rows: Sequence[Row], said: str) -> None:
        turn = _Turn(self.examples, self.warmups, self.seed, said, self.on_edit)
        with on_device(self.pipe):
            turn.take(self.pipe, rows)

    def _tell(self) -> None:
        self.on_rows([row for row in self.rows if row.begun])

    def add_fewer_steps(self, contenders: Sequence[Contender]) -> list[Contender]:
        """Run the twins of lossy contenders with as many steps as those computed.

        Returns:
            The new contenders. They take part in all further rounds.
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
                continue  # it saves nothing
            fewer = self._companion(twin, min(equal_steps(work, cost), base.steps - 1))
            row.fewer = fewer.name
            if self._row(fewer.name, row.workload) is None:
                added[fewer.name] = fewer
                self.rows.append(Row(fewer, row.workload))
        self.play(0, list(added.values()))
        return list(added.values())

    def _companion(self, twin: Contender, steps: int) -> Contender:
        """Return a twin with fewer steps: one of those measured, or a new one with a new name."""
        wanted, known = twin.with_steps(steps), [row.contender for row in self.rows]
        for one in known:
            if one.bare and (one.passes, one.steps) == (wanted.passes, steps):
                return one
        taken = any(one.name == wanted.name for one in known)
        return replace(wanted, name=f"{wanted.name} of {twin.name}") if taken else wanted

    def repeat_first(self) -> None:
        """Run the first contender once more, unless it just ran: did the machine stay the same?"""
        first = self.rows[0].contender
        rows = [row for row in self._of(first) if row.edits and not row.error]
        again = rows
        if rows and (self._latest is not first or self.rounds == 1):
            again = [Row(first, row.workload) for row in rows]
            self._take(again, f"once more: {first.name}")
        for row, other in zip(rows, again, strict=True):
            row.again = [edit.seconds for edit in other.edits[-len(self.examples) :]]
        self._tell()

    def compare_with_fewer_steps(self) -> None:
        """Tell every lossy row which row it has to beat."""
        for row in self.rows:
            if row.fewer is not None:
                row.beside = self._row(row.fewer, row.workload)
        self._tell()

    def _judge(self, row: Row) -> None:
        """Compare a row's pictures with its references', once, and keep those that are needed."""
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
                except ValueError as error:  # pictures of other sizes
                    row.error = str(error)
        if len(numbers) > self.keep and not control:
            worst = {quality.worst for quality in row.quality.values()}
            row.pictures = {n: p for n, p in row.pictures.items() if n in worst}

    def _references(self, contender: Contender) -> list[str]:
        """Name the controls, and the twin of a lossy contender or of a list with fewer steps."""
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

    def _of(self, contender: Contender) -> list[Row]:
        return [row for row in self.rows if row.contender.name == contender.name]

    def _row(self, name: str, workload: Workload) -> Row | None:
        wanted = name, workload.name
        found = (r for r in self.rows if (r.contender.name, r.workload.name) == wanted)
        return next(found, None)


def _turns(contenders: Sequence[Contender]) -> list[list[Contender]]:
    """Group contenders that differ in their steps alone: their passes are applied once."""
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


def _step_cost(row: Row, twin: Row) -> float:
    """Return what a computed step costs beside the twin's; 1 for what only skips steps."""
    if not row.contender.cheaper_steps:
        return 1.0
    own, plain = (
        [seconds for edit in one.edits for seconds, kind in edit.steps if kind == "computed"]
        for one in (row, twin)
    )
    return median(own) / median(plain) if own and plain else 1.0


@dataclass(frozen=True)
class _Turn:
    """The turn of one applied list: of one contender, or of several that differ in steps."""

    examples: Sequence[Example]
    warmups: int
    seed: int
    said: str
    on_edit: Callable[[str], None]

    def take(self, pipe: Any, rows: Sequence[Row]) -> None:
        """Apply the rows' list and run their workloads.

        An error ends the turn of its contender alone: the list is applied anew for the others.
        """
        while rows:
            rows = self._take(pipe, rows)

    def _take(self, pipe: Any, rows: Sequence[Row]) -> list[Row]:
        """Apply the list once; return the rows that an error of another contender left out."""
        left: list[Row] = []
        torch.compiler.reset()
        before = _memory()
        _forget_peak()
        began = time.perf_counter()
        done = 0
        self.on_edit(self.said)
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
        except Exception as error:  # noqa: BLE001 - anyone's code; the other contenders go on
            kind = "" if isinstance(error, FluxfireError) else f"{type(error).__name__}: "
            failed = rows[min(done, len(rows) - 1)]  # or leaving it failed, after the last
            failed.error = f"{kind}{error}"
            for later in rows[done + 1 :]:
                if later.contender.name == failed.contender.name:
                    later.error = f"not run, after {failed.workload.name} failed"
                else:
                    left.append(later)
        gc.collect()  # a baseline's pipeline lies in cycles
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return left

    def _run(self, pipe: Any, row: Row) -> None:
        """Warm up, and edit every example; the row gets all of it, or nothing."""
        load = row.workload
        calibrate = lambda: load.run(pipe, self.examples[0], seed=self.seed)  # noqa: E731
        first = []
        with row.contender.beginning(pipe, load, calibrate):
            for example in load.of_each_size(pipe, self.examples):
                for _ in range(self.warmups):
                    with warmup_run(pipe):
                        load.run(pipe, example, steps=2)
                    first.append(api.report(pipe).runs[-1])
        edits, pictures, right = [], {}, []
        with row.contender.beginning(pipe, load, calibrate):  # anew, after runs of two steps
            _forget_peak()
            with metered() as drawn:
                for number, example in enumerate(self.examples):
                    self.on_edit(f"{self.said}, {load.name}: {number + 1} of {len(self.examples)}")
                    edit, picture = self._edit(pipe, row, example, self.seed + number)
                    edits.append(edit)
                    if not row.edits:
                        pictures[number] = picture
                        right.append(example.right(picture))
        row.first += first[:1]
        row.edits += edits
        row.pictures, row.right = row.pictures or pictures, row.right or right
        row.drawn += [drawn] if drawn is not None else []
        row.peak = max(row.peak, _peak())
        if row.contender.baseline is None:
            row.weights = sum(p.nbytes for p in pipe.transformer.parameters())

    def _edit(self, pipe: Any, row: Row, example: Example, seed: int) -> tuple[Edit, Image.Image]:
        load, baseline = row.workload, row.contender.baseline
        counted = BlockCounter(pipe) if baseline and baseline.skips else nullcontext()
        with phases(pipe) as watched, counted:
            picture, seconds = timed(lambda: load.run(pipe, example, seed=seed, steps=row.steps))
        run = api.report(pipe).runs[-1]
        if isinstance(counted, BlockCounter):
            work = counted.work(row.steps)
        else:
            work = of_run(run, len(model_of(pipe).blocks(pipe.transformer)))
        spent = {**watched.seconds(), "denoising": sum(run.step_seconds)}
        spent["the rest"] = seconds - sum(spent.values())
        steps = tuple(zip(run.step_seconds, run.step_kinds, strict=True))
        edit = Edit(seconds, steps, spent, run.hit_rate, run.compiles, run.graph_breaks, work)
        return edit, picture


def _memory() -> float:
    return torch.cuda.memory_allocated() / _GIB if torch.cuda.is_available() else 0.0


def _peak() -> float:
    return torch.cuda.max_memory_allocated() / _GIB if torch.cuda.is_available() else 0.0


def _forget_peak() -> None:
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
