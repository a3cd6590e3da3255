"""The harness: every contender edits every example, in turn, on one pipeline and one device."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from PIL import Image

from fluxfire import api
from fluxfire.bench.contenders import COMPILED, EAGER, Contender
from fluxfire.bench.examples import Example
from fluxfire.bench.phases import phases
from fluxfire.bench.power import Drawn, metered
from fluxfire.bench.quality import Quality, compare
from fluxfire.bench.timing import Sample, timed
from fluxfire.bench.workload import Workload
from fluxfire.errors import FluxfireError
from fluxfire.statistics import RunStatistics

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
    on_edit: Callable[[str], None] = lambda _: None,
    on_rows: Callable[[list[Row]], None] = lambda _: None,
) -> list[Row]:
    """Measure every contender on every workload.

    Contenders take turns for some rounds, since a GPU grows slower as it grows warm. In each
    round a contender is applied afresh, makes short runs of two steps, of which the first
    compiles what is needed, and then edits every example once. Between turns torch's
    compiler is reset, as in a fresh process, though its cache on disk makes every round's
    compilation after the first a short one.

    A contender that raises is left out from there on, and its row says why.

    Args:
        pipe: a plain pipeline; it is plain again at the end, also after an exception.
        contenders: what to compare. Quality is judged beside those named `EAGER` and
            `COMPILED`, if these come first.
        workloads: what to run.
        examples: what to edit.
        rounds: whole edits of each example.
        warmups: short runs before those that count; with 0 the first edits tell what
            warming up costs.
        seed: of the first example's noise; each has its own.
        on_edit: is told what comes next, before each edit.
        on_rows: is handed the rows so far after each turn, so that a crash loses little.

    Returns:
        A row for each contender and workload.
    """
    rows = [Row(c, w) for c in contenders for w in workloads]
    table = {(row.contender.name, row.workload.name): row for row in rows}
    for number in range(rounds):
        for contender in contenders:
            own = [table[contender.name, w.name] for w in workloads]
            if own[0].error is None:
                said = f"round {number + 1} of {rounds}: {contender.name}"
                turn = _Turn(examples, warmups, seed, said, on_edit)
                turn.take(pipe, contender, own)
            _judge(own, table)
            on_rows([row for row in rows if row.begun])
    return rows


@dataclass(eq=False)
class Row:
    """One contender on one workload, over the rounds.

    Attributes:
        contender: who.
        workload: what.
        applied: seconds and memory of applying the passes, the first time.
        first: the first short run of each round, which compiles.
        runs: the edits.
        edits: their seconds, in the order made.
        phases: seconds of each phase, edit by edit.
        drawn: energy of each round's edits, where the device tells.
        pictures: what the first round made of each example.
        right: for each of these, whether it is right, where a program can tell.
        peak: GiB at most allocated in an edit.
        weights: bytes of the transformer's weights.
        quality: by the name of the control: how near the pictures are to its.
        error: what it raised, if it did.
    """

    contender: Contender
    workload: Workload
    applied: dict[str, float] = field(default_factory=dict)
    first: list[RunStatistics] = field(default_factory=list)
    runs: list[RunStatistics] = field(default_factory=list)
    edits: list[float] = field(default_factory=list)
    phases: list[dict[str, float]] = field(default_factory=list)
    drawn: list[Drawn] = field(default_factory=list)
    pictures: list[Image.Image] = field(default_factory=list)
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
        return {**row, **self._measured()} if self.runs else row

    def _measured(self) -> dict[str, Any]:
        hits = [s for r in self.runs for s in _steps(r, hit=True)]
        computed = [s for r in self.runs for s in _steps(r, hit=False)]
        step = Sample.of(computed) if computed else None
        names = dict.fromkeys(name for edit in self.phases for name in edit)
        return {
            "first_seconds": [r.seconds for r in self.first],
            "first_compiles": self.first[0].compiles if self.first else None,
            "compiles": sum(r.compiles for r in self.runs),
            "graph_breaks": sum(r.graph_breaks for r in (*self.first, *self.runs)),
            "edit": Sample.of(self.edits).to_dict(),
            "step": step.to_dict() if step else None,
            "hit_step": Sample.of(hits).to_dict() if hits else None,
            "hits": len(hits) / len(self.runs),
            "phases": {n: Sample.of(e.get(n, 0.0) for e in self.phases).to_dict() for n in names},
            "peak_gib": self.peak,
            "weights_gb_per_second": self.weights / step.median / 1e9 if step else None,
            "joules": sum(d.joules for d in self.drawn) / len(self.edits) if self.drawn else None,
            "utilisation": self._utilisation(),
            "quality": {name: quality.to_dict() for name, quality in self.quality.items()},
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

    def say(self, what: str) -> None:
        """Tell what comes next."""
        self.on_edit(self.said + what)

    def take(self, pipe: Any, contender: Contender, rows: Sequence[Row]) -> None:
        """Apply the contender and run its workloads; an error ends the turn."""
        torch.compiler.reset()
        before = _memory()
        _forget_peak()
        began = time.perf_counter()
        row = rows[0]
        self.say("")
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
        except Exception as error:  # noqa: BLE001 - anyone's code; the other contenders go on
            kind = "" if isinstance(error, FluxfireError) else f"{type(error).__name__}: "
            row.error = f"{kind}{error}"
            for other in rows:
                other.error = other.error or f"not run, after {row.workload.name} failed"
        finally:
            if torch.cuda.is_available():
                torch.cuda.empty_cache()

    def _run(self, pipe: Any, row: Row) -> None:
        load, first_round = row.workload, not row.pictures
        once = lambda: load.run(pipe, self.examples[0], seed=self.seed)  # noqa: E731
        with row.contender.beginning(pipe, load.name, load.steps, once):
            for number in range(self.warmups):
                load.run(pipe, self.examples[0], steps=2)
                if number == 0:
                    row.first.append(api.report(pipe).runs[-1])
        with row.contender.beginning(pipe, load.name, load.steps, once):  # two steps are over
            row.weights = sum(p.nbytes for p in pipe.transformer.parameters())
            _forget_peak()
            with metered() as drawn:
                for number, example in enumerate(self.examples):
                    self.say(f", {load.name}: {number + 1} of {len(self.examples)}")
                    picture = self._edit(pipe, row, example, self.seed + number)
                    if first_round:
                        row.pictures.append(picture)
                        row.right.append(example.check(picture) if example.check else None)
            if drawn is not None:
                row.drawn.append(drawn)
            row.peak = max(row.peak, _peak())

    def _edit(self, pipe: Any, row: Row, example: Example, seed: int) -> Image.Image:
        with phases(pipe) as watched:
            picture, seconds = timed(lambda: row.workload.run(pipe, example, seed=seed))
        run = api.report(pipe).runs[-1]
        spent = {**watched.seconds(), "denoising": sum(run.step_seconds)}
        spent["the rest"] = seconds - sum(spent.values())
        row.edits.append(seconds)
        row.runs.append(run)
        row.phases.append(spent)
        made: Image.Image = picture
        return made


def _judge(rows: Sequence[Row], table: dict[tuple[str, str], Row]) -> None:
    """Compare the pictures of finished rows with the controls'."""
    for row in rows:
        for name in (EAGER, COMPILED):
            control = table.get((name, row.workload.name))
            if control and row.pictures and len(control.pictures) == len(row.pictures):
                row.quality[name] = compare(row.pictures, control.pictures, row.right)


def _steps(run: RunStatistics, *, hit: bool) -> Iterator[float]:
    """Seconds of the steps that were hits of a cache, or of those that were computed."""
    hits = {d.step for d in run.decisions if all(d.hits)}
    hits -= {d.step for d in run.decisions if not all(d.hits)}
    yield from (s for i, s in enumerate(run.step_seconds) if (i in hits) == hit)


def _memory() -> float:
    return torch.cuda.memory_allocated() / _GIB if torch.cuda.is_available() else 0.0


def _peak() -> float:
    return torch.cuda.max_memory_allocated() / _GIB if torch.cuda.is_available() else 0.0


def _forget_peak() -> None:
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
