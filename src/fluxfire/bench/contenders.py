"""What is measured against what: passes alone and stacked, and the controls beside them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol

from fluxfire import api
from fluxfire.bench.workload import Workload
from fluxfire.passes import Compile
from fluxfire.protocol import Pass
from fluxfire.text import count_of

Role = Literal["control", "alone", "stack", "baseline", "fewer steps"]
EAGER, COMPILED = "eager", "compile only"


class Baseline(Protocol):
    """Another library's way to make a pipeline faster."""

    @property
    def skips(self) -> bool:
        """Whether it may skip steps or blocks; then the harness counts the blocks that run."""

    @property
    def compiles(self) -> bool:
        """Whether it compiles the blocks itself; then compilation alone is its exact twin."""

    def applied(self, pipe: Any) -> AbstractContextManager[object]:
        """Apply it for the length of a `with` block."""

    def begin(self, run: Callable[[], object], workload: Workload) -> None:
        """Prepare for generations of a workload; `run` makes one to calibrate on."""


@dataclass(frozen=True)
class Contender:
    """One way to run a pipeline.

    Attributes:
        name: its name in the results.
        passes: fluxfire's passes, in order; none is the plain pipeline.
        role: a control, one pass of the list alone, a stack of passes, another library's
            baseline, or a plain list with fewer steps.
        settings: by workload, a cache's run-time settings for it (as `using` takes).
        baseline: another library's method on top of the passes.
        steps: number of denoising steps, in place of the workload's.
    """

    name: str
    passes: tuple[Pass, ...] = ()
    role: Role = "stack"
    settings: Mapping[str, Pass] = field(default_factory=dict)
    baseline: Baseline | None = None
    steps: int | None = None

    @contextmanager
    def applied(self, pipe: Any) -> Iterator[Any]:
        """Apply it for the length of a `with` block; steps are counted also without passes.

        Yields:
            The pipeline to run: the given one, or for a baseline a copy of its own, because
            nobody can be sure to remove another library's traces.
        """
        if self.baseline is None:
            with api.optimized(pipe, list(self.passes)):
                yield pipe
            return
        own = apart(pipe)
        with api.optimized(own, list(self.passes)), self.baseline.applied(own):
            yield own

    @property
    def scheduled(self) -> bool:
        """Whether the hits of its cache are a fixed schedule, not the cache's own choice."""
        caches = (*self.passes, *self.settings.values())
        return any(getattr(p, "schedule", None) is not None for p in caches)

    @property
    def lossy(self) -> bool:
        """Whether it may change the picture by more than rounding."""
        own = (*self.passes, *self.settings.values())
        return self.baseline is not None or any(p.exactness == "lossy" for p in own)

    @property
    def bare(self) -> bool:
        """Whether its passes are all that it is, but for the number of steps."""
        return self.baseline is None and not self.settings

    @property
    def may_skip(self) -> bool:
        """Whether it may skip steps, or blocks of a step."""
        if self.baseline is not None:
            return self.baseline.skips
        own = (*self.passes, *self.settings.values())
        return any(p.exactness == "lossy" and p.stage == "caching" for p in own)

    @property
    def cheaper_steps(self) -> bool:
        """Whether it makes each step cheaper at a loss, where a cache skips steps."""
        if self.baseline is not None:
            return not self.baseline.skips
        return any(p.exactness == "lossy" and p.stage != "caching" for p in self.passes)

    @property
    def twin(self) -> Contender:
        """The same without what is lossy: the reference for its pictures."""
        retuned = {p.name for p in self.settings.values()}
        exact = tuple(p for p in self.passes if p.exactness != "lossy" and p.name not in retuned)
        if self.baseline is not None and self.baseline.compiles:
            exact = (*exact, Compile())
        return Contender(_name(exact), exact, "control")

    def with_steps(self, steps: int) -> Contender:
        """Return the same list, which must be exact, with another number of steps."""
        passes = f" ({self.name})" if self.passes else ""
        name = f"plain, {count_of(steps, 'step')}{passes}"
        return replace(self, name=name, role="fewer steps", steps=steps)

    def beginning(
        self, pipe: Any, workload: Workload, run: Callable[[], object]
    ) -> AbstractContextManager[object]:
        """Prepare for generations of one workload."""
        if self.baseline:
            self.baseline.begin(run, workload)
        own = self.settings.get(workload.name)
        return api.using(pipe, own) if own else nullcontext()


def _name(passes: Sequence[Pass]) -> str:
    """Name an exact list: the controls have names of their own."""
    if len(passes) == 1 and isinstance(passes[0], Compile):
        return COMPILED
    return " + ".join(p.name for p in passes) or EAGER


def check_plain(pipe: Any) -> None:
    """Refuse a pipeline that carries passes: nothing could be judged beside it.

    Raises:
        PlanError: it carries passes, or it is no Kontext pipeline.
    """
    with api.optimized(pipe, []):
        pass


def apart(pipe: Any) -> Any:
    """Return a pipeline that shares the weights of this one, and whose structure is its own."""
    transformer = pipe.transformer
    shared = {id(t): t for t in (*transformer.parameters(), *transformer.buffers())}
    components = {**pipe.components, "transformer": copy.deepcopy(transformer, shared)}
    other = type(pipe)(**components)
    other.set_progress_bar_config(disable=True)
    return other


def controls(passes: Sequence[Pass] = ()) -> list[Contender]:
    """Return what everything is compared with: eager, and compilation alone.

    Compilation moves pixels by itself, so the effect of a lossy pass shows only beside it. The
    list's own Compile is used, if there is one.
    """
    compile_ = next((p for p in passes if isinstance(p, Compile)), Compile())
    return [
        Contender(EAGER, (), "control"),
        Contender(COMPILED, (compile_,), "control"),
    ]


def ladder(passes: Sequence[Pass], *, partial: bool = True) -> list[Contender]:
    """Return the controls, each pass alone, and the list built up pass by pass.

    Args:
        passes: the list, in order.
        partial: include the passes alone and the partial lists; else only the whole list.
    """
    rungs = controls(passes)
    if partial:
        rungs += [Contender(f"{p.name} alone", (p,), "alone") for p in passes]
    for count in range(1, len(passes) + 1):
        some = tuple(passes[:count])
        if partial or count == len(passes):
            rungs.append(Contender(" + ".join(p.name for p in some), some))
    seen: dict[tuple[Pass, ...], Contender] = {}
    for rung in rungs:
        seen.setdefault(rung.passes, rung)
    return list(seen.values())


def with_twins(contenders: Sequence[Contender]) -> list[Contender]:
    """Put the exact twin of each lossy contender before it, unless it is there already.

    Twins share their list's turn with the same list at fewer steps, which each lossy contender
    must beat.
    """
    found = list(contenders)
    for contender in contenders:
        if not contender.lossy:
            continue
        if (twin := _twin_among(contender, found)) is not None:
            if found.index(twin) > found.index(contender):  # its pictures are needed first
                found.remove(twin)
                found.insert(found.index(contender), twin)
        else:
            twin, taken = contender.twin, {one.name for one in found}
            if twin.name in taken:  # a list of the same names with other settings
                twin = replace(twin, name=f"{twin.name} (of {contender.name})")
            found.insert(found.index(contender), twin)
    return found


def _twin_among(contender: Contender, others: Sequence[Contender]) -> Contender | None:
    """Return the exact contender with the same passes and all steps, or None."""
    exact = contender.twin.passes
    for other in others:
        if other.bare and other.steps is None and other.passes == exact:
            return other
    return None


def twin_of(contender: Contender, others: Sequence[Contender]) -> Contender | None:
    """Return the twin of a lossy contender among others; None for one that is exact."""
    return _twin_among(contender, others) if contender.lossy else None
