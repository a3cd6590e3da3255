"""One generation: its steps, the callbacks of its listeners, and the records of caches.

`conductor.py` raises the error "already generating" when a second generation would begin.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from fluxfire.configured import Configured
from fluxfire.diffusers_types import Pipeline
from fluxfire.model import Call, Model, Tokens

if TYPE_CHECKING:
    import torch

__all__ = [
    "Decision",
    "Generation",
    "Listener",
    "Live",
    "Refresh",
    "callback_may_change",
    "only_watches",
]

C = TypeVar("C")
P = TypeVar("P")
_ONLY_WATCHES = "_fluxfire_only_watches"


@dataclass(frozen=True, slots=True)
class Decision:
    """What a block cache decided for one transformer call.

    Attributes:
        step: denoising step, counted from 0.
        branch: `"cond"` or `"uncond"`.
        hits: for each sample of the batch, whether the cache skipped the blocks.
        distances: for each sample, the distance that the cache compared with its threshold; empty
            if the cache measured none.
    """

    step: int
    branch: str
    hits: tuple[bool, ...]
    distances: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class Refresh:
    """Whether one transformer call computed the reference, or reused it from the KV cache.

    Attributes:
        step: denoising step, counted from 0.
        branch: `"cond"` or `"uncond"`.
        due: for each sample of the batch, whether a refresh was due. Blocks that another cache
            skipped in this step did not refresh.
        drifts: for each sample, how much the reference had changed; empty if the cache did not
            measure it.
    """

    step: int
    branch: str
    due: tuple[bool, ...]
    drifts: tuple[float, ...] = ()


def only_watches(callback: C) -> C:
    """Mark a step callback, or a function in a method's place, that changes nothing.

    Passes then skip their checks after it.
    """
    setattr(callback, _ONLY_WATCHES, True)
    return callback


def callback_may_change(callback: object) -> bool:
    """Whether a step callback may change the pipeline: any may that `only_watches` did not mark."""
    return callback is not None and not getattr(callback, _ONLY_WATCHES, False)


@dataclass(eq=False)
class Generation:
    """One generation: a call of the pipeline.

    Attributes:
        number: number of the generation, counted for each pipeline from 1.
        model: the architecture.
        passes: the applied passes as data. The tuple is the same object until they change.
        warmup: whether this is a warm-up run. In a warm-up run a cache takes each of its code paths
            at least once, so that torch compiles all graphs.
        may_change: whether somebody's code runs between the steps, and so may change the pipeline.
        thread: the id of the thread that generates.
        step: the current step, from 0; -1 before the first step.
        calls: how often the transformer ran.
        decisions: a block cache's decision for each transformer call; empty without such a cache.
        refreshes: for each transformer call, whether a reference cache computed the reference;
            empty without such a cache.
        agree: a pass sets it if several processes compute this generation (see `Call.agree`).
    """

    number: int
    model: Model
    passes: tuple[Configured, ...] = ()
    warmup: bool = False
    may_change: bool = True
    thread: int = field(default_factory=threading.get_ident)
    step: int = -1
    calls: int = 0
    decisions: list[Decision] = field(default_factory=list)
    refreshes: list[Refresh] = field(default_factory=list)
    agree: Callable[[torch.Tensor], torch.Tensor] | None = None
    _branch: int = 0
    _timestep: object = None
    _identity: object = None
    _tokens: Tokens | None = None

    def owns(self, inputs: dict[str, Any]) -> bool:
        """Whether a transformer call belongs to this generation.

        All transformer calls of a generation share one object (`Model.identity`). A call of another
        generation can come in between: a step callback may run another pipeline that shares the
        transformer.
        """
        identity = self.model.identity(inputs)
        return identity is not None and (self._identity is None or identity is self._identity)

    def advance(self, pipe: Pipeline, inputs: dict[str, Any]) -> Call:
        """Count the next transformer call, and find out its step and branch.

        The pipeline creates a new object `current_timestep` for each step. Comparing the identity
        of the objects, not their values, needs no wait for the device.
        """
        if pipe.current_timestep is not self._timestep:
            self._timestep = pipe.current_timestep
            self.step += 1
            self._branch = 0
        else:
            self._branch += 1
        self.calls += 1
        if self._tokens is None:
            self._identity = self.model.identity(inputs)
            self._tokens = self.model.tokens(inputs)
        branch = ("cond", "uncond")[self._branch] if self._branch < 2 else f"#{self._branch}"  # noqa: PLR2004
        timestep = inputs["timestep"]
        call = Call(
            self.step, pipe.num_timesteps, branch, timestep, self.model.sigma(pipe), self._tokens
        )
        return call if self.agree is None else replace(call, agree=self.agree)


@dataclass(eq=False)
class Live(Generic[P]):
    """The current settings of an applied pass, which `fluxfire.using` changes.

    Attributes:
        applied: the pass as the user applied it.
    """

    applied: P
    _uses: list[weakref.ref[_Use[P]]] = field(default_factory=list)

    @property
    def settings(self) -> P:
        """The pass with the settings to use now.

        Read it once when a generation begins, so that no setting changes in the middle.

        The latest open `using` block of this thread wins. If this thread has none, the latest block
        of any thread wins, because a user may open the block in one thread and generate in
        another. Without any block, this is the applied pass.
        """
        uses = [use for ref in tuple(self._uses) if (use := ref()) is not None]
        own = [use for use in uses if use.thread == threading.get_ident()]
        return (own or uses)[-1].settings if uses else self.applied

    @contextmanager
    def using(self, settings: P) -> Iterator[None]:
        """Use other settings inside the block.

        Blocks of two threads may overlap, and end in any order.
        """
        use = _Use(settings, threading.get_ident())
        # If an interrupt skips the end of this block, Python deletes `use` with the frame.
        ref = weakref.ref(use)
        self._uses.append(ref)
        try:
            yield
        finally:
            if ref in self._uses:
                self._uses.remove(ref)


@dataclass(eq=False)
class _Use(Generic[P]):
    settings: P
    thread: int


class Listener:
    """The callbacks of a pass. Override any of the methods; by default they do nothing.

    `on_generation` and `on_step` return context managers, so a listener can clean up after an
    exception, too.
    """

    def prepare(self) -> None:
        """Called before every generation, and before a direct transformer call outside of one."""

    def before_call(self, inputs: dict[str, Any]) -> None:
        """Called before every transformer call, also before one that belongs to no generation.

        If `prepare` is called for the same call, it comes first.

        Args:
            inputs: keyword arguments of the call. Do not change them.
        """

    def on_generation(self, generation: Generation) -> AbstractContextManager[object]:  # noqa: ARG002
        """Called for every generation; the result is entered around the whole pipeline call."""
        return nullcontext()

    def on_step(self, call: Call) -> AbstractContextManager[object]:  # noqa: ARG002
        """Called for every transformer call; the result is entered around the call."""
        return nullcontext()
