"""What each generation cost: steps, seconds, compilations."""

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
from fluxfire.reporting.compile_counts import Compilations, compilations
from fluxfire.reporting.device_events import Marks
from fluxfire.runtime.generation import Decision, Generation, Listener, Refresh

StepKind = Literal["computed", "reused", "hit"]
_KEPT = 100


@dataclass(eq=False)
class RunStatistics:
    """One generation.

    Attributes:
        number: which generation of the pipeline, from 1.
        seconds: wall time of the whole call.
        tokens: what the first call of the transformer carried; tells sizes apart.
        calls: how often the transformer ran; twice a step under true CFG.
        compiled: what torch.compile did during the call.
        error: what the call raised, or None.
        decisions: what a cache decided, call by call; empty without one.
        refreshes: when the reference was computed, call by call; empty where always.
    """

    number: int
    seconds: float = 0.0
    tokens: Tokens | None = None
    calls: int = 0
    compiled: Compilations = field(default_factory=Compilations)
    error: str | None = None
    decisions: list[Decision] = field(default_factory=list, repr=False)
    refreshes: list[Refresh] = field(default_factory=list, repr=False)
    _marks: list[Callable[[], float]] = field(default_factory=list, repr=False)

    @property
    def compiles(self) -> int:
        """How often torch.compile traced code during the call."""
        return self.compiled.compiles

    @property
    def recompiles(self) -> int:
        """How many of the compilations were for code that had been compiled before."""
        return self.compiled.recompiles

    @property
    def graph_breaks(self) -> int:
        """Places where a graph was cut in two."""
        return self.compiled.graph_breaks

    @property
    def step_seconds(self) -> list[float]:
        """Seconds of each step, from one step's first transformer call to the next one's.

        The last step ends with its last transformer call. On CUDA the device's own clock
        is read, which waits for the device the first time.
        """
        times = [mark() for mark in self._marks]
        return [after - before for before, after in pairwise(times)]

    @property
    def step_kinds(self) -> list[StepKind]:
        """Of each step, whether it was computed, or what its caches left out of all samples."""
        return self._kinds(all)

    def kinds_of(self, sample: int) -> list[StepKind]:
        """Of each step, what its caches left out of one sample of the batch."""
        return self._kinds(lambda left: left[sample])

    def _kinds(self, left_out: Callable[[Sequence[bool]], bool]) -> list[StepKind]:
        """Say of each step what was left out of every call, by what was of its samples."""
        kinds: list[StepKind] = ["computed"] * (len(self._marks) - 1)
        reused = [(r.step, left_out([not due for due in r.due])) for r in self.refreshes]
        hit = [(d.step, left_out(d.hits)) for d in self.decisions]
        told: tuple[tuple[StepKind, list[tuple[int, bool]]], ...] = (
            ("reused", reused),
            ("hit", hit),
        )
        for kind, calls in told:
            for step in {step for step, _ in calls} - {step for step, left in calls if not left}:
                kinds[step] = kind
        return kinds

    @property
    def hit_rate(self) -> float | None:
        """Share of the decisions that were hits, over calls and samples; None without a cache."""
        hits = [hit for decision in self.decisions for hit in decision.hits]
        return sum(hits) / len(hits) if hits else None

    def to_dict(self) -> dict[str, Any]:
        """The same as plain data; `seconds_a_step` is the median over the steps."""
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
    """Keeps the statistics of the latest generations.

    Attributes:
        runs: the latest hundred, oldest first.
    """

    def __init__(self) -> None:
        self.runs: deque[RunStatistics] = deque(maxlen=_KEPT)
        self._step = -1
        self._clock: _Clock | None = None
        self._tokens: Tokens | None = None

    @override
    @contextmanager
    def on_generation(self, generation: Generation) -> Iterator[None]:
        """Time the whole call and count what is compiled in it."""
        run = RunStatistics(generation.number)
        self._step, self._clock, self._tokens = -1, None, None
        began = time.perf_counter()
        try:
            with compilations() as run.compiled:
                yield
        except BaseException as error:
            run.error = f"{type(error).__name__}: {error}"
            raise
        finally:
            run.seconds = time.perf_counter() - began
            run.calls = generation.calls
            run.decisions, run.refreshes = generation.decisions, generation.refreshes
            run.tokens = self._tokens
            if self._clock is not None:
                run._marks = self._clock.marks  # noqa: SLF001 - ours
            self._clock = None
            self.runs.append(run)

    @override
    @contextmanager
    def on_step(self, call: Call) -> Iterator[None]:
        """Mark where each step begins, and where the latest call ends."""
        if self._clock is None:
            self._clock = _Clock(call.timestep.device)
            self._tokens = call.tokens
        clock = self._clock  # an interrupt may end the generation before the step
        if call.step != self._step:
            self._step = call.step
            clock.begin_step()
        try:
            yield
        finally:  # a step that fails ends, too
            clock.end_call()


class _Clock:
    """Marks where steps begin, and where the last call ends."""

    def __init__(self, device: torch.device) -> None:
        self._marks = Marks(device)
        self._starts: list[Callable[[], float]] = []
        self._end: Callable[[], float] | None = None

    @property
    def marks(self) -> list[Callable[[], float]]:
        """The beginning of every step, and the end of the last call."""
        return [*self._starts, self._end] if self._end else self._starts

    def begin_step(self) -> None:
        self._starts.append(self._marks.now())

    def end_call(self) -> None:
        self._end = self._marks.now()
