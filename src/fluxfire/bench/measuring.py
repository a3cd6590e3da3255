"""The harness: every contender edits every example, in turn, on one pipeline and one device."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from PIL import Image

from fluxfire import api
from fluxfire.bench.contenders import COMPILED, EAGER, Contender, check_plain
from fluxfire.bench.examples import Example
from fluxfire.bench.phases import phases
from fluxfire.bench.power import Drawn, metered
from fluxfire.bench.quality import SAME, Quality, compare
from fluxfire.bench.timing import Sample, on_device, timed
from fluxfire.bench.workload import Workload
from fluxfire.conductor import rehearsal
from fluxfire.errors import BenchError, FluxfireError
from fluxfire.reporting.statistics import RunStatistics, StepKind

_GIB = 2**30
_CONTROLS = (EAGER, COMPILED)


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
    on_edit: Callable[[str], None] = lambda _: None,
    on_rows: Callable[[list[Row]], None] = lambda _: None,
) -> list[Row]:
    """Measure every contender on every workload.

    Contenders take turns for some rounds, forwards and backwards, since a GPU grows slower as
    it grows warm. In each round a contender is applied afresh, makes short runs of two steps,
    of which the first compiles what is needed, and then edits every example once. Between
    turns torch's compiler is reset; its cache on disk is not, so a first run is a cold start
    only where nothing before it compiled the same.

    A contender that raises is left out from there on, and its row says why.

    Args:
        pipe: a plain pipeline; it is plain again at the end, also after an exception.
        contenders: what to compare, each of another name. Quality is judged beside those
            named `EAGER` and `COMPILED`, if these come first.
        workloads: what to run.
        examples: what to edit.
        rounds: whole edits of each example.
        warmups: short runs for each size before the edits that count; with 0 the first edits
            tell what warming up costs.
        seed: of the first example's noise; each has its own.
        keep: of more examples than this, the controls' pictures and each contender's worst
            alone are kept.
        on_edit: is told what comes next, before each edit.
        on_rows: is handed the rows so far after each turn, so that a crash loses little.

    Returns:
        A row for each contender and workload.

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
    rows = [Row(c, w) for c in contenders for w in workloads]
    table = {(row.contender.name, row.workload.name): row for row in rows}
    for number in range(rounds):
        for contender in contenders if number % 2 == 0 else reversed(contenders):
            own = [table[contender.name, w.name] for w in workloads]
            if not any(row.error for row in own):
                said = f"round {number + 1} of {rounds}: {contender.name}"
                turn = _Turn(examples, warmups, seed, said, on_edit)
                with on_device(pipe):
                    turn.take(pipe, contender, own)
                for row in own:
                    _judge(row, table, keep)
            on_rows([row for row in rows if row.begun])
    return rows


@dataclass(frozen=True)
class Edit:
    """One edit that counts.

    Attributes:
        seconds: from the call to the picture.
        steps: seconds of each step, and what caches left out of it.
        phases: seconds by phase.
        hit_rate: share of the cache's decisions that were hits; None without one.
        compiles: how often torch.compile traced code; none are expected.
        graph_breaks: places where a graph was cut in two.
    """

    seconds: float
    steps: tuple[tuple[float, StepKind], ...]
    phases: dict[str, float]
    hit_rate: float | None
    compiles: int
    graph_breaks: int


@dataclass(eq=False)
class Row:
    """One contender on one workload, over the rounds.

    Attributes:
        contender: who.
        workload: what.
        applied: seconds and memory of applying the passes, the first time.
        first: the first short run of each round, which compiles.
        edits: in the order made.
        drawn: energy of each round's edits, where the device tells.
        pictures: what the first round made, by the example's position.
        right: for each example, whether that is right, where a program can tell.
        peak: GiB at most allocated in an edit.
        weights: bytes of the transformer's weights; 0 where nobody can be sure.
        quality: by the name of the control: how near the pictures are to its.
        error: what it raised, if it did.
    """

    contender: Contender
    workload: Workload
    applied: dict[str, float] = field(default_factory=dict)
    first: list[RunStatistics] = field(default_factory=list)
    edits: list[Edit] = field(default_factory=list)
    drawn: list[Drawn] = field(default_factory=list)
    pictures: dict[int, Image.Image] = field(default_factory=dict)
    right: list[bool | None] = field(default_factory=list)
    peak: float = 0.0
    weights: int = 0
    quality: dict[str, Quality] = field(default_factory=dict)
    error: str | None = None

    @property
    def begun(self) -> bool:
        """Whether there is anything to tell."""
        return bool(self.edits) or self.error is not None

    def to_dict(self) -> dict[str, Any]:
        """The row as plain data; `src/fluxfire/bench/schema.json` describes it."""
        settings = self.contender.settings.get(self.workload.name)
        row: dict[str, Any] = {
            "contender": self.contender.name,
            "role": self.contender.role,
            "passes": [repr(p) for p in self.contender.passes],
            "settings": repr(settings) if settings else None,
            "scheduled": self.contender.scheduled,
            "workload": asdict(self.workload),
            "error": self.error,
            **self.applied,
        }
        return {**row, **self._measured()} if self.edits else row

    def _measured(self) -> dict[str, Any]:
        names = dict.fromkeys(name for edit in self.edits for name in edit.phases)
        return {
            "first_seconds": [r.seconds for r in self.first],
            "first_compiles": self.first[0].compiles if self.first else None,
            "compiles": sum(e.compiles for e in self.edits),
            "graph_breaks": sum(r.graph_breaks for r in self.first)
            + sum(e.graph_breaks for e in self.edits),
            "edit": Sample.of(e.seconds for e in self.edits).to_dict(),
            **self._steps(),
            "phases": {
                n: Sample.of(e.phases.get(n, 0.0) for e in self.edits).to_dict() for n in names
            },
            "peak_gib": self.peak,
            "joules": sum(d.joules for d in self.drawn) / len(self.edits) if self.drawn else None,
            "utilisation": self._utilisation(),
            "quality": {name: quality.to_dict() for name, quality in self.quality.items()},
        }

    def _steps(self) -> dict[str, Any]:
        """Steps by kind; nothing of a rival that does not tell them apart."""
        if not self.contender.tells:
            unknown = (
                "step", "hit_step", "hits", "reuse_step", "reuses", "weights_gb_per_second",
            )  # fmt: skip
            return dict.fromkeys(unknown)
        steps = [step for edit in self.edits for step in edit.steps]
        computed, reused, hits = (
            [seconds for seconds, kind in steps if kind == wanted]
            for wanted in ("computed", "reused", "hit")
        )
        step = Sample.of(computed) if computed else None
        return {
            "step": step.to_dict() if step else None,
            "hit_step": Sample.of(hits).to_dict() if hits else None,
            "hits": len(hits) / len(self.edits),
            "reuse_step": Sample.of(reused).to_dict() if reused else None,
            "reuses": len(reused) / len(self.edits),
            "weights_gb_per_second": self.weights / step.median / 1e9
            if step and self.weights
            else None,
        }

    def _utilisation(self) -> float | None:
        known = [(d.utilisation, d.seconds) for d in self.drawn if d.utilisation is not None]
        seconds = sum(s for _, s in known)
        return sum(u * s for u, s in known) / seconds if seconds else None


@dataclass(frozen=True)
class _Turn:
    """One contender's turn of one round."""

    examples: Sequence[Example]
    warmups: int
    seed: int
    said: str
    on_edit: Callable[[str], None]

    def take(self, pipe: Any, contender: Contender, rows: Sequence[Row]) -> None:
        """Apply the contender and run its workloads; an error ends the turn."""
        torch.compiler.reset()
        before = _memory()
        _forget_peak()
        began = time.perf_counter()
        done = 0
        self.on_edit(self.said)
        try:
            with contender.applied(pipe) as own:
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
            rows[done].error = f"{kind}{error}"
            for later in rows[done + 1 :]:
                later.error = f"not run, after {rows[done].workload.name} failed"
        gc.collect()  # a rival's pipeline lies in cycles
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _run(self, pipe: Any, row: Row) -> None:
        """Warm up, and edit every example; the row gets all of it, or nothing."""
        load = row.workload
        calibrate = lambda: load.run(pipe, self.examples[0], seed=self.seed)  # noqa: E731
        first = []
        with row.contender.beginning(pipe, load, calibrate):
            for example in load.of_each_size(pipe, self.examples):
                for _ in range(self.warmups):
                    with rehearsal(pipe):
                        load.run(pipe, example, steps=2)
                    first.append(api.report(pipe).runs[-1])
        edits, pictures, right = [], {}, []
        with row.contender.beginning(pipe, load, calibrate):  # anew, after runs of two steps
            _forget_peak()
            with metered() as drawn:
                for number, example in enumerate(self.examples):
                    self.on_edit(f"{self.said}, {load.name}: {number + 1} of {len(self.examples)}")
                    edit, picture = self._edit(pipe, load, example, self.seed + number)
                    edits.append(edit)
                    if not row.edits:
                        pictures[number] = picture
                        right.append(example.right(picture))
        row.first += first[:1]
        row.edits += edits
        row.pictures, row.right = row.pictures or pictures, row.right or right
        row.drawn += [drawn] if drawn is not None else []
        row.peak = max(row.peak, _peak())
        if row.contender.rival is None:
            row.weights = sum(p.nbytes for p in pipe.transformer.parameters())

    def _edit(
        self, pipe: Any, load: Workload, example: Example, seed: int
    ) -> tuple[Edit, Image.Image]:
        with phases(pipe) as watched:
            picture, seconds = timed(lambda: load.run(pipe, example, seed=seed))
        run = api.report(pipe).runs[-1]
        spent = {**watched.seconds(), "denoising": sum(run.step_seconds)}
        spent["the rest"] = seconds - sum(spent.values())
        steps = tuple(zip(run.step_seconds, run.step_kinds, strict=True))
        return Edit(seconds, steps, spent, run.hit_rate, run.compiles, run.graph_breaks), picture


def _judge(row: Row, table: dict[tuple[str, str], Row], keep: int) -> None:
    """Compare a row's pictures with the controls', once, and keep those that are needed."""
    if row.quality or not row.pictures:
        return
    numbers = sorted(row.pictures)
    for name in _CONTROLS:
        control = table.get((name, row.workload.name))
        if control is row:
            row.quality[name] = Quality((SAME,) * len(numbers), tuple(row.right))
        elif control and sorted(control.pictures) == numbers:
            made, wanted = ([r.pictures[n] for n in numbers] for r in (row, control))
            try:
                row.quality[name] = compare(made, wanted, row.right)
            except ValueError as error:  # pictures of other sizes
                row.error = str(error)
    if len(numbers) > keep and row.contender.name not in _CONTROLS:
        worst = {quality.worst for quality in row.quality.values()}
        row.pictures = {n: p for n, p in row.pictures.items() if n in worst}


def _memory() -> float:
    return torch.cuda.memory_allocated() / _GIB if torch.cuda.is_available() else 0.0


def _peak() -> float:
    return torch.cuda.max_memory_allocated() / _GIB if torch.cuda.is_available() else 0.0


def _forget_peak() -> None:
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
