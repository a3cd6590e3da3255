"""What is measured against what: passes alone and stacked, and controls beside them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from fluxfire import api
from fluxfire.passes import Compile
from fluxfire.protocol import Pass

Role = Literal["control", "alone", "stack", "rival"]
EAGER, COMPILED = "eager", "compile only"


class Rival(Protocol):
    """Somebody else's way to make a pipeline faster."""

    def applied(self, pipe: Any) -> AbstractContextManager[object]:
        """Apply it for the length of a `with` block."""

    def begin(self, run: Callable[[], object], steps: int) -> None:
        """Hear that generations of so many steps begin; `run` makes one to calibrate on."""


@dataclass(frozen=True)
class Contender:
    """One way to run a pipeline.

    Attributes:
        name: how results call it.
        passes: fluxfire's passes, in order; none is the plain pipeline.
        role: a control, a pass of the ladder alone, a stack of it, or a rival.
        settings: by workload, a cache's run-time settings for it (as `using` takes).
        rival: what else is applied.
        scheduled: the hits of its cache are a fixed schedule, not the cache's own choice.
    """

    name: str
    passes: tuple[Pass, ...] = ()
    role: Role = "stack"
    settings: Mapping[str, Pass] = field(default_factory=dict)
    rival: Rival | None = None
    scheduled: bool = False

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

    def beginning(
        self, pipe: Any, workload: str, steps: int, run: Callable[[], object]
    ) -> AbstractContextManager[object]:
        """Prepare for generations of one workload."""
        if self.rival:
            self.rival.begin(run, steps)
        own = self.settings.get(workload)
        return api.using(pipe, own) if own else nullcontext()


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


def ladder(passes: Sequence[Pass]) -> list[Contender]:
    """Return the controls, each pass alone, and the list built up pass by pass."""
    rungs = controls(passes)
    rungs += [Contender(f"{p.name} alone", (p,), "alone") for p in passes]
    for count in range(2, len(passes) + 1):
        some = tuple(passes[:count])
        rungs.append(Contender(" + ".join(p.name for p in some), some))
    seen: dict[tuple[Pass, ...], Contender] = {}
    for rung in rungs:
        seen.setdefault(rung.passes, rung)
    return list(seen.values())
