"""Contenders: lists of passes, single passes, baselines and controls that are measured."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Literal, Protocol

from fluxfire import api
from fluxfire.bench.workload import Workload
from fluxfire.diffusers_types import DiffusersPipeline, Pipeline
from fluxfire.passes import Compile
from fluxfire.protocol import Pass
from fluxfire.text import count_of

Role = Literal["control", "alone", "stack", "baseline", "fewer steps"]
EAGER, COMPILED = "eager", "compile only"
_SHOWN = {EAGER: "plain"}


class Baseline(Protocol):
    """Another library's method to make a pipeline faster."""

    @property
    def skips(self) -> bool:
        """Whether it may skip steps or blocks. Then the benchmark counts the blocks that run."""

    @property
    def compiles(self) -> bool:
        """Whether it compiles the blocks itself. Then compilation alone is its exact twin."""

    def applied(self, pipe: Pipeline) -> AbstractContextManager[object]:
        """Apply it for the length of a `with` block."""

    def begin(self, run: Callable[[], object], workload: Workload) -> None:
        """Prepare for generations of a workload; `run` makes one for calibration."""


@dataclass(frozen=True)
class Contender:
    """One configuration of a pipeline to measure.

    Attributes:
        name: its name in the results.
        passes: fluxfire's passes, in order; an empty tuple is the plain pipeline.
        role: `"control"`, `"alone"` (a single pass), `"stack"` (a list of passes), `"baseline"`
            (another library), or `"fewer steps"` (an exact list with fewer steps).
        settings: a cache's run-time settings (for `using`) by workload name.
        baseline: another library's method on top of the passes.
        steps: number of denoising steps; None for the workload's.
    """

    name: str
    passes: tuple[Pass, ...] = ()
    role: Role = "stack"
    settings: Mapping[str, Pass] = field(default_factory=dict)
    baseline: Baseline | None = None
    steps: int | None = None

    @contextmanager
    def applied(self, pipe: DiffusersPipeline) -> Iterator[DiffusersPipeline]:
        """Apply it for the length of a `with` block. Without passes, steps are still counted.

        Yields:
            The pipeline to run: the given pipeline; or a separate copy for a baseline, because
            another library may leave traces that nobody can remove.
        """
        if self.baseline is None:
            with api.optimized(pipe, list(self.passes)):
                yield pipe
            return
        own = separate_copy(pipe)
        with api.optimized(own, list(self.passes)), self.baseline.applied(own):
            yield own

    @property
    def scheduled(self) -> bool:
        """Whether a fixed schedule sets its cache's hits, not the cache itself."""
        caches = (*self.passes, *self.settings.values())
        return any(getattr(p, "schedule", None) is not None for p in caches)

    @property
    def lossy(self) -> bool:
        """Whether it may change the picture by more than rounding."""
        own = (*self.passes, *self.settings.values())
        return self.baseline is not None or any(p.exactness == "lossy" for p in own)

    @property
    def bare(self) -> bool:
        """Whether it has only passes and a number of steps: no baseline and no settings."""
        return self.baseline is None and not self.settings

    @property
    def may_skip(self) -> bool:
        """Whether it may skip steps, or blocks in a step."""
        if self.baseline is not None:
            return self.baseline.skips
        own = (*self.passes, *self.settings.values())
        return any(p.exactness == "lossy" and p.stage == "caching" for p in own)

    @property
    def cheaper_steps(self) -> bool:
        """Whether it is lossy because each step is cheaper, not because it skips steps."""
        if self.baseline is not None:
            return not self.baseline.skips
        return any(p.exactness == "lossy" and p.stage != "caching" for p in self.passes)

    @property
    def twin(self) -> Contender:
        """The same list without lossy passes: the reference for its pictures."""
        retuned = {p.name for p in self.settings.values()}
        exact = tuple(p for p in self.passes if p.exactness != "lossy" and p.name not in retuned)
        if self.baseline is not None and self.baseline.compiles:
            exact = (*exact, Compile())
        return Contender(_name(exact), exact, "control")

    def with_steps(self, steps: int) -> Contender:
        """Return this contender, which must be exact, with another number of steps."""
        passes = f" ({self.name})" if self.passes else ""
        name = f"plain, {count_of(steps, 'step')}{passes}"
        return replace(self, name=name, role="fewer steps", steps=steps)

    def prepare(
        self, pipe: DiffusersPipeline, workload: Workload, run: Callable[[], object]
    ) -> AbstractContextManager[object]:
        """Prepare for generations of one workload."""
        if self.baseline:
            self.baseline.begin(run, workload)
        own = self.settings.get(workload.name)
        return api.using(pipe, own) if own else nullcontext()


def _name(passes: Sequence[Pass]) -> str:
    """Name an exact list. The controls have fixed names."""
    if len(passes) == 1 and isinstance(passes[0], Compile):
        return COMPILED
    return " + ".join(p.name for p in passes) or EAGER


def shown_name(name: str) -> str:
    """Return how texts call a contender; in the data the plain pipeline is called `EAGER`."""
    return _SHOWN.get(name, name)


def check_plain(pipe: object) -> None:
    """Check that a pipeline is plain, so that it can be the reference.

    Raises:
        PlanError: the pipeline has passes, or is not a Kontext pipeline.
    """
    with api.optimized(pipe, []):
        pass


def separate_copy(pipe: Pipeline) -> DiffusersPipeline:
    """Return a pipeline with its own modules that share this pipeline's weights."""
    transformer = pipe.transformer
    shared = {id(t): t for t in (*transformer.parameters(), *transformer.buffers())}
    components = {**pipe.components, "transformer": copy.deepcopy(transformer, shared)}
    other = type(pipe)(**components)
    other.set_progress_bar_config(disable=True)
    return other


def controls(passes: Sequence[Pass] = ()) -> list[Contender]:
    """Return the controls: eager, and compilation alone.

    Compilation itself changes pixels, so a lossy pass must be compared with compilation alone. The
    second control uses the Compile of the list, if the list has one.
    """
    compile_ = next((p for p in passes if isinstance(p, Compile)), Compile())
    return [
        Contender(EAGER, (), "control"),
        Contender(COMPILED, (compile_,), "control"),
    ]


def ladder(passes: Sequence[Pass], *, partial: bool = True) -> list[Contender]:
    """Return an ablation: the controls, each single pass, and the list built up pass by pass.

    Args:
        passes: the list, in order.
        partial: whether to include single passes and partial lists; else only the whole list.
    """
    listed = controls(passes)
    if partial:
        listed += [Contender(f"{p.name} alone", (p,), "alone") for p in passes]
    for count in range(1, len(passes) + 1):
        some = tuple(passes[:count])
        if partial or count == len(passes):
            listed.append(Contender(" + ".join(p.name for p in some), some))
    seen: dict[tuple[Pass, ...], Contender] = {}
    for one in listed:
        seen.setdefault(one.passes, one)
    return list(seen.values())


def with_twins(contenders: Sequence[Contender]) -> list[Contender]:
    """Insert the exact twin before each lossy contender, unless the list has it already.

    A twin takes its turn together with the same list at fewer steps, and the lossy contender must
    beat that.
    """
    found = list(contenders)
    for contender in contenders:
        if not contender.lossy:
            continue
        if (twin := _twin_among(contender, found)) is not None:
            if found.index(twin) > found.index(contender):  # the twin's pictures must exist first
                found.remove(twin)
                found.insert(found.index(contender), twin)
        else:
            twin, taken = contender.twin, {one.name for one in found}
            if twin.name in taken:  # a list of the same passes with other settings
                twin = replace(twin, name=f"{twin.name} (of {contender.name})")
            found.insert(found.index(contender), twin)
    return found


def _twin_among(contender: Contender, others: Sequence[Contender]) -> Contender | None:
    """Return the contender with the twin's passes and all steps, or None."""
    exact = contender.twin.passes
    for other in others:
        if other.bare and other.steps is None and other.passes == exact:
            return other
    return None


def twin_of(contender: Contender, others: Sequence[Contender]) -> Contender | None:
    """Return a lossy contender's twin among others; None for an exact contender."""
    return _twin_among(contender, others) if contender.lossy else None
