"""Measures the cost of each generation: steps, seconds, compilations."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from statistics import median
from typing import Any, Literal

import torch
from typing_extensions import override

from fluxfire.model import Call, Tokens
from fluxfire.reporting.compile_counts import CompileCounts, count_compilations
from fluxfire.reporting.device_events import DeviceClock
from fluxfire.runtime.generation import Decision, Generation, Listener, Refresh

StepKind = Literal["computed", "reused", "hit"]
_MAX_RUNS = 100


@dataclass(eq=False)
class RunStatistics:
    """Statistics of one generation.

    Attributes:
        number: number of the generation, counted for each pipeline from 1.
        seconds: wall time of the whole pipeline call.
        tokens: token counts of the first transformer call, which depend on the picture sizes.
        calls: how often the transformer ran; twice in each step under true CFG.
        compiled: what torch.compile did during the pipeline call.
        error: the exception that the pipeline call raised, or None.
        decisions: a block cache's decision for each transformer call; empty without such a cache.
        refreshes: for each transformer call, whether a reference cache computed the reference;
            empty without such a cache.
    """

    number: int
    seconds: float = 0.0
    tokens: Tokens | None = None
    calls: int = 0
    compiled: CompileCounts = field(default_factory=CompileCounts)
    error: str | None = None
    decisions: list[Decision] = field(default_factory=list, repr=False)
    refreshes: list[Refresh] = field(default_factory=list, repr=False)
    _marks: list[Callable[[], float]] = field(default_factory=list, repr=False)

    @property
    def compiles(self) -> int:
        """Number of compilations during the pipeline call."""
        return self.compiled.compiles

    @property
    def recompiles(self) -> int:
        """Number of compilations of code that torch had compiled before."""
        return self.compiled.recompiles

    @property
    def graph_breaks(self) -> int:
        """Number of places where torch split a graph in two."""
        return self.compiled.graph_breaks

    @property
    def step_seconds(self) -> list[float]:
        """Seconds of each step, from its first transformer call to that of the next step.

        The last step ends with its last transformer call. On CUDA this reads the device's own
        clock, which waits for the device the first time.
        """
        times = [mark() for mark in self._marks]
        return [after - before for before, after in pairwise(times)]

    @property
    def step_kinds(self) -> list[StepKind]:
        """For each step, what caches skipped for all samples of the batch.

        A step is a `"hit"` if most blocks were skipped, `"reused"` if only the reference was, and
        `"computed"` otherwise. Under true CFG both transformer calls must have skipped it.
        """
        return self._kinds(all)

    def kinds_of(self, sample: int) -> list[StepKind]:
        """For each step, what caches skipped for one sample of the batch; as `step_kinds`."""
        return self._kinds(lambda skipped: skipped[sample])

    def _kinds(self, combine: Callable[[Sequence[bool]], bool]) -> list[StepKind]:
        """Find the kind of each step.

        Args:
            combine: takes, for each sample of one transformer call, whether something was skipped;
                returns whether it counts as skipped in this call.
        """
        kinds: list[StepKind] = ["computed"] * (len(self._marks) - 1)
        reused = [(r.step, combine([not due for due in r.due])) for r in self.refreshes]
        hits = [(d.step, combine(d.hits)) for d in self.decisions]
        calls_by_kind: tuple[tuple[StepKind, list[tuple[int, bool]]], ...] = (
            ("reused", reused),
            ("hit", hits),
        )
        for kind, calls in calls_by_kind:
            computed = {step for step, skipped in calls if not skipped}
            for step in {step for step, _ in calls} - computed:
                kinds[step] = kind
        return kinds

    @property
    def hit_rate(self) -> float | None:
        """Share of hits among the decisions for all calls and samples; None without a cache."""
        hits = [hit for decision in self.decisions for hit in decision.hits]
        return sum(hits) / len(hits) if hits else None

    def to_dict(self) -> dict[str, Any]:
        """Return the statistics as plain data; `seconds_a_step` is the median over the steps."""
        steps = self.step_seconds
        return {
            "number": self.number,
            "seconds": self.seconds,
            "tokens": asdict(self.tokens) if self.tokens else None,
            "steps": len(steps),
            "seconds_a_step": median(steps) if steps else None,
            "step_seconds": steps,
            "transformer_calls": self.calls,
            **asdict(self.compiled),
            "error": self.error,
            "hit_rate": self.hit_rate,
            "decisions": [asdict(d) for d in self.decisions],
            "refreshes": [asdict(r) for r in self.refreshes],
        }


class Statistics(Listener):
    """Collects statistics of generations.

    Attributes:
        runs: statistics of the latest 100 generations, the oldest first.
    """

    def __init__(self) -> None:
        self.runs: deque[RunStatistics] = deque(maxlen=_MAX_RUNS)
        self._run: RunStatistics | None = None
        self._step = -1
        self._clock: _StepClock | None = None
        self._tokens: Tokens | None = None

    @override
    @contextmanager
    def on_generation(self, generation: Generation) -> Iterator[None]:
        """Time the whole pipeline call, and count its compilations."""
        run = RunStatistics(generation.number)
        self._run, self._step, self._clock, self._tokens = run, -1, None, None
        began = time.perf_counter()
        try:
            with count_compilations() as run.compiled:
                yield
        except BaseException as error:
            run.error = f"{type(error).__name__}: {error}"
            raise
        finally:
            run.seconds = time.perf_counter() - began
            run.calls = generation.calls
            run.decisions, run.refreshes = generation.decisions, generation.refreshes
            # After an interrupt this block may end late, during another generation.
            if self._run is run:
                run.tokens = self._tokens
                if self._clock is not None:
                    run._marks = self._clock.marks  # noqa: SLF001 - a class of this file
                self._clock = None
            self.runs.append(run)

    @override
    @contextmanager
    def on_step(self, call: Call) -> Iterator[None]:
        """Mark the start of each step, and the end of the latest transformer call."""
        if self._clock is None:
            self._clock = _StepClock(call.timestep.device)
            self._tokens = call.tokens
        # After an interrupt, `on_generation` may clear self._clock before this block ends.
        clock = self._clock
        if call.step != self._step:
            self._step = call.step
            clock.begin_step()
        try:
            yield
        finally:  # a step that raises ends, too
            clock.end_call()


class _StepClock:
    """Marks the start of each step, and the end of the latest transformer call."""

    def __init__(self, device: torch.device) -> None:
        self._clock = DeviceClock(device)
        self._starts: list[Callable[[], float]] = []
        self._end: Callable[[], float] | None = None

    @property
    def marks(self) -> list[Callable[[], float]]:
        """The start of every step, and the end of the latest call."""
        return [*self._starts, self._end] if self._end else self._starts

    def begin_step(self) -> None:
        self._starts.append(self._clock.mark())

    def end_call(self) -> None:
        self._end = self._clock.mark()
