"""The owner of one pipeline's generations, hooked into that object alone.

Python looks `__call__` up on the class, so an instance attribute would be ignored, and a
patch of the class would reach every other pipeline. The conductor therefore turns this one
pipeline into an instance of a private subclass of its own class, which carries the same name,
and which others do not see (`StandIn`). Instances made by it are of the plain class, and so are
copies. The transformer keeps its class (diffusers compares it when components are
shared): torch's own slot for how a module instance is called serves there.
"""

from __future__ import annotations

import copy
import functools
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from fluxfire.configured import Configured
from fluxfire.edits.override import CALL_SLOT, Override
from fluxfire.edits.stand_in import StandIn
from fluxfire.errors import BusyError, FluxfireError
from fluxfire.model import Model
from fluxfire.runtime import copies
from fluxfire.runtime.blocks import BlockStack
from fluxfire.runtime.generation import Generation, Listener, Live, may_change
from fluxfire.runtime.record import Record
from fluxfire.runtime.turns import Turns

_CONDUCTOR = "_fluxfire_conductor"


class Conductor:
    """Owns one pipeline's generations, and the record of what was applied to it.

    Attributes:
        listeners: who hears of generations, in the order of the passes.
        model: the architecture.
        stack: the run through the blocks.
        calls: what a call of the transformer comes down to, the last counts; with none it is the
            transformer's own. Compiling the whole model adds one.
        live: the run-time settings of the passes that have some.
        passes: what is applied, as data.
        warming_up: whether generations are warm-up runs.
        changing: whether the pipeline is being changed, or an interrupt left it half changed.
        record: what was changed, so that it can be undone.
    """

    def __init__(self, pipe: Any, model: Model, record: Record) -> None:
        self.listeners: list[Listener] = []
        self.live: list[Live[Any]] = []
        self.passes: tuple[Configured, ...] = ()
        self.warming_up = False
        self.changing = False
        self.model = model
        self.stack = BlockStack(model)
        self.calls: list[Callable[..., Any]] = []
        self.record = record
        self._pipe = weakref.ref(pipe)
        self._transformer = weakref.ref(pipe.transformer)
        self._turns = Turns()
        self._count = 0

    def owns(self, pipe: object) -> bool:
        """Whether this is the pipeline that it conducts."""
        return self._pipe() is pipe

    @contextmanager
    def idle(self, wish: str) -> Iterator[None]:
        """Hold generations off while the pipeline is being changed.

        Raises:
            BusyError: if a generation is running.
        """
        change = _Change()
        try:
            holder = self._turns.take(change)
            if holder is not change:
                generating = isinstance(holder, Generation)
                doing = "generating" if generating else "being changed by another thread"
                raise BusyError(f"cannot {wish}: the pipeline is {doing}; wait for it to finish")
            yield
        finally:
            self._turns.leave(change)

    def prepare(self) -> None:
        """Have every listener put its affairs in order before the models are used."""
        for listener in self.listeners:
            listener.prepare()

    def disturbed(self, pipe: Any) -> str | None:
        """Say what was done to the pipeline that fluxfire cannot live with, or None."""
        if self.changing:
            return (
                "optimize() or restore() was interrupted and left the pipeline half changed; "
                "call restore(pipe), which finishes what is left to do"
            )
        if pipe.transformer is not self._transformer():
            return (
                "pipe.transformer was replaced after optimize(); "
                "put it back, or call restore(pipe) and optimize(pipe) again"
            )
        if shared_conductor(pipe.transformer) is not self:
            return (
                "pipe.transformer was compiled after optimize(), which cut fluxfire off; "
                "call restore(pipe), and optimize(pipe) with Compile() instead"
            )
        return None

    @contextmanager
    def run(self, pipe: Any, *, calls_back: bool) -> Iterator[None]:
        """Be entered around a whole call of the pipeline.

        Args:
            pipe: the pipeline.
            calls_back: whether it calls the user between steps.
        """
        generation = Generation(
            self._count + 1, self.model, self.passes, self.warming_up, calls_back
        )
        try:
            holder = self._turns.take(generation)
            if holder is not generation:
                raise BusyError(_why_busy(holder))
            if (why := self.disturbed(pipe)) is not None:
                raise FluxfireError(why)
            self.model.unmount(pipe.transformer)
            self.prepare()
            self._count += 1
            with ExitStack() as entered:
                for listener in self.listeners:
                    entered.enter_context(listener.on_generation(generation))
                yield
        finally:
            self._turns.leave(generation)

    @contextmanager
    def step(self, inputs: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """Be entered around a call of the transformer; give the arguments to call it with."""
        holder = self._turns.holder
        generation = holder if isinstance(holder, Generation) else None
        if generation is not None and generation.thread != threading.get_ident():
            raise BusyError(
                "this transformer is generating in another thread, for the pipeline that "
                "fluxfire optimized; two threads cannot share it"
            )
        if generation is None or not generation.owns(inputs):
            # Called directly, or by another pipeline that shares the model: run it plain.
            self.prepare()
            yield inputs
            return
        if generation.calls_back:
            self.prepare()  # a callback may have done anything since the last step
        call = generation.advance(self._pipe(), inputs)
        with ExitStack() as entered:
            for listener in self.listeners:
                entered.enter_context(listener.on_step(call))
            yield entered.enter_context(self.stack.mounted(self._transformer(), call, inputs))


class _Change:
    """Has the pipeline while it is being changed."""


def _why_busy(holder: Generation | _Change) -> str:
    if isinstance(holder, _Change):
        return "this pipeline is being optimized or restored; generate when that is done"
    here = holder.thread == threading.get_ident()
    where = "in this call's own thread" if here else "in another thread"
    return (
        f"this pipeline is already generating {where}; a diffusers pipeline runs one "
        f"generation at a time: queue the calls, or give each thread a pipeline of its own"
    )


class TransformerCall(Override):
    """Stands in an optimized transformer's call slot."""

    def __init__(self, conductor: Conductor, pipe: Any) -> None:
        self.conductor = conductor
        super().__init__(pipe.transformer, CALL_SLOT, self._call_as_step)

    def __bool__(self) -> bool:
        """Whether the transformer is compiled: PEFT takes the slot's truth for that."""
        return bool(self.conductor.calls or self.inner)

    def _call_as_step(self, plain: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call the transformer as the step of a generation that it is."""
        run = self.conductor.calls[-1] if self.conductor.calls else plain
        with self.conductor.step(kwargs) as inputs:
            return run(*args, **inputs)


def conductor_of(pipe: object) -> Conductor | None:
    """Return the conductor of an optimized pipeline, or None."""
    found: Conductor | None = vars(type(pipe)).get(_CONDUCTOR)
    return found if found is not None and found.owns(pipe) else None


@contextmanager
def warmup_run(pipe: object) -> Iterator[None]:
    """Make a pipeline's generations within a `with` block warm-up runs."""
    conductor = conductor_of(pipe)
    if conductor is None:  # a plain pipeline has nothing to warm up
        yield
        return
    before, conductor.warming_up = conductor.warming_up, True
    try:
        yield
    finally:
        conductor.warming_up = before


def shared_conductor(transformer: object) -> Conductor | None:
    """Return the conductor of whichever pipeline a transformer was optimized for, or None."""
    call = vars(transformer).get(CALL_SLOT)
    return call.conductor if isinstance(call, TransformerCall) else None


def private_class(pipe: Any, conductor: Conductor) -> type:
    """Make the class that this one pipeline becomes an instance of.

    It differs from the plain class only in how an instance is called and copied.
    """
    plain: Any = type(pipe)

    def __new__(cls: type, *args: Any, **kwargs: Any) -> Any:  # noqa: N807
        if cls is made:  # somebody builds another pipeline by this one's class
            return plain(*args, **kwargs)
        return plain.__new__(cls)

    @functools.wraps(plain.__call__)
    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N807
        with conductor.run(self, calls_back=may_change(kwargs.get("callback_on_step_end"))):
            return plain.__call__(self, *args, **kwargs)

    def __copy__(self: Any) -> Any:  # noqa: N807
        return copies.shallow_copy(self, plain, conductor.record)

    def __deepcopy__(self: Any, memo: dict[int, Any]) -> Any:  # noqa: N807
        return copies.deep_copy(self, plain, conductor.record, memo)

    def __reduce_ex__(self: Any, protocol: Any) -> Any:  # noqa: N807
        twin = copy.deepcopy(self)
        return plain.__reduce_ex__(twin, protocol)

    namespace: dict[str, Any] = {
        "__module__": plain.__module__,
        "__qualname__": plain.__qualname__,
        "__doc__": plain.__doc__,
        "__new__": __new__,
        "__call__": __call__,
        "__copy__": __copy__,
        "__deepcopy__": __deepcopy__,
        "__reduce_ex__": __reduce_ex__,
        _CONDUCTOR: conductor,
    }
    made = type(plain.__name__, (StandIn, plain), namespace)
    return made
