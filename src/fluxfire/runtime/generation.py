"""One run of a pipeline: it begins, goes step by step and branch by branch, and ends.

What passes hear of it, and tell it: a `Listener` is entered around each run and each call of the
transformer, and a cache leaves its decisions with the `Generation`.
"""

from __future__ import annotations

import threading
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from fluxfire.configured import Configured
from fluxfire.model import Call, Model, Tokens

__all__ = ["Decision", "Generation", "Listener", "Live", "Refresh", "may_change", "only_watches"]

C = TypeVar("C")
P = TypeVar("P")
_ONLY_WATCHES = "_fluxfire_only_watches"


@dataclass(frozen=True, slots=True)
class Decision:
    """What a cache decided for one call of the transformer.

    Attributes:
        step: denoising step, counted from 0.
        branch: `"cond"` or `"uncond"`.
        hits: for each sample of the batch, whether its blocks were left out.
        distances: what was compared with the threshold, for each sample; empty where
            nothing was measured.
    """

    step: int
    branch: str
    hits: tuple[bool, ...]
    distances: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class Refresh:
    """Whether the reference was computed in one call of the transformer, or reused.

    Attributes:
        step: denoising step, counted from 0.
        branch: `"cond"` or `"uncond"`.
        due: for each sample of the batch, whether its reference was to be computed and kept; in
            blocks that another cache left out in this step it was not.
        drifts: by how much it had changed, for each sample; empty where nothing was measured.
    """

    step: int
    branch: str
    due: tuple[bool, ...]
    drifts: tuple[float, ...] = ()


def only_watches(callback: C) -> C:
    """Mark a step callback as one that changes nothing, so that passes need not look after it."""
    setattr(callback, _ONLY_WATCHES, True)
    return callback


def may_change(callback: object) -> bool:
    """Whether a step callback may change the pipeline, as anybody's may."""
    return callback is not None and not getattr(callback, _ONLY_WATCHES, False)


@dataclass(eq=False)
class Generation:
    """One call of the pipeline.

    Attributes:
        number: counts this pipeline's generations, from 1.
        model: the architecture.
        passes: what is applied, as data; the same object until that changes.
        warmup: whether this one only makes ready what will be used: a cache then takes each
            of its ways at least once.
        calls_back: whether a callback may change the pipeline between its steps; True where that
            is not known.
        step: the current step, from 0; -1 before the first.
        calls: how often the transformer ran.
        decisions: what a cache decided, call by call; empty without one.
        refreshes: when the reference was computed, call by call; empty where always.
    """

    number: int
    model: Model
    passes: tuple[Configured, ...] = ()
    warmup: bool = False
    calls_back: bool = True
    thread: int = field(default_factory=threading.get_ident)
    step: int = -1
    calls: int = 0
    decisions: list[Decision] = field(default_factory=list)
    refreshes: list[Refresh] = field(default_factory=list)
    _branch: int = 0
    _timestep: object = None
    _identity: object = None
    _tokens: Tokens | None = None

    def owns(self, inputs: dict[str, Any]) -> bool:
        """Whether a call of the transformer is this generation's: all of them share an object.

        Another pipeline's may turn up in between, where a callback of this one runs a pipeline
        that shares the transformer.
        """
        identity = self.model.identity(inputs)
        return identity is not None and (self._identity is None or identity is self._identity)

    def advance(self, pipe: Any, inputs: dict[str, Any]) -> Call:
        """Take note of the next call of the transformer and say which it is.

        The pipeline makes a new timestep object for each step and shows it as
        `current_timestep`; comparing identities needs no wait for the device.
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
        return Call(
            self.step, pipe.num_timesteps, branch, timestep, self.model.sigma(pipe), self._tokens
        )


@dataclass(eq=False)
class Live(Generic[P]):
    """The settings by which an applied pass works now; `fluxfire.using` swaps them.

    Attributes:
        settings: the pass itself, or a copy of it with other run-time settings. To be read
            where a generation begins, so that none changes half-way.
    """

    settings: P


class Listener:
    """Hears of generations. Override any method; all default to nothing.

    `on_generation` and `on_step` return context managers, so that what begins also ends, whatever is
    raised.
    """

    def prepare(self) -> None:
        """Be called before each generation, and before each call of the transformer outside one."""

    def on_generation(self, generation: Generation) -> AbstractContextManager[object]:  # noqa: ARG002
        """Be entered around a whole call of the pipeline."""
        return nullcontext()

    def on_step(self, call: Call) -> AbstractContextManager[object]:  # noqa: ARG002
        """Be entered around one call of the transformer."""
        return nullcontext()
