"""What is measured against what: passes alone and stacked, and controls beside them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from fluxfire import api
from fluxfire.bench.workload import Workload
from fluxfire.passes import Compile
from fluxfire.protocol import Pass

Role = Literal["control", "alone", "stack", "rival"]
EAGER, COMPILED = "eager", "compile only"


class Rival(Protocol):
    """Somebody else's way to make a pipeline faster."""

    def applied(self, pipe: Any) -> AbstractContextManager[object]:
        """Apply it for the length of a `with` block."""

    @property
    def tells(self) -> bool:
        """Whether all steps are computed: what it leaves out, it does not tell us."""

    def begin(self, run: Callable[[], object], workload: Workload) -> None:
        """Hear that generations of a workload begin; `run` makes one to calibrate on."""


@dataclass(frozen=True)
class Contender:
    """One way to run a pipeline.

    Attributes:
        name: how results call it.
        passes: fluxfire's passes, in order; none is the plain pipeline.
        role: a control, a pass of the ladder alone, a stack of it, or a rival.
        settings: by workload, a cache's run-time settings for it (as `using` takes).
        rival: what else is applied.
    """

    name: str
    passes: tuple[Pass, ...] = ()
    role: Role = "stack"
    settings: Mapping[str, Pass] = field(default_factory=dict)
    rival: Rival | None = None

    @contextmanager
    def applied(self, pipe: Any) -> Iterator[Any]:
        """Apply it for the length of a `with` block; steps are counted also without passes.

        Yields:
            The pipeline to run: the given one, or for a rival, whose traces nobody can be
            sure to remove, one apart.
        """
        if self.rival is None:
            with api.optimized(pipe, list(self.passes)):
                yield pipe
            return
        own = apart(pipe)
        with api.optimized(own, list(self.passes)), self.rival.applied(own):
            yield own

    @property
    def scheduled(self) -> bool:
        """Whether the hits of its cache are a fixed schedule, not the cache's own choice."""
        caches = (*self.passes, *self.settings.values())
        return any(getattr(p, "schedule", None) is not None for p in caches)

    @property
    def tells(self) -> bool:
        """Whether it is known which steps are computed and which are left out."""
        return self.rival is None or self.rival.tells

    def beginning(
        self, pipe: Any, workload: Workload, run: Callable[[], object]
    ) -> AbstractContextManager[object]:
        """Prepare for generations of one workload."""
        if self.rival:
            self.rival.begin(run, workload)
        own = self.settings.get(workload.name)
        return api.using(pipe, own) if own else nullcontext()


def check_plain(pipe: Any) -> None:
    """Refuse a pipeline that carries passes, beside which nothing could be judged.

    Raises:
        PlanError: it does, or it is no Kontext pipeline.
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

    Compilation moves pixels by itself, so what a lossy pass does on top is seen only beside
    it. It is the list's own Compile, if there is one.
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
        partial: with the passes alone and the lists on the way; else the whole list only.
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
