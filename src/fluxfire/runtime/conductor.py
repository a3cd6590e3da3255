"""The conductor: runs the callbacks around the generations and steps of one pipeline.

The conductor must see every call of this one pipeline. Python looks `__call__` up on the class, so
it would ignore an attribute of the instance. A patch of the class would change every other
pipeline. So the pipeline becomes an instance of a private subclass of its class, with the same
name. Other code does not see the subclass (`StandIn`). Copies, and new pipelines created through
the subclass, have the plain class.

The transformer keeps its class, because diffusers compares the classes of shared components. Its
calls go through the attribute that torch provides for compiled modules (`CALL_SLOT`).
"""

from __future__ import annotations

import copy
import functools
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, cast

import torch

from fluxfire.configured import Configured
from fluxfire.diffusers_types import Pipeline, Transformer
from fluxfire.edits.override import CALL_SLOT, Override
from fluxfire.edits.stand_in import StandIn
from fluxfire.errors import BusyError, FluxfireError
from fluxfire.model import Model
from fluxfire.runtime import copies
from fluxfire.runtime.blocks import BlockStack
from fluxfire.runtime.freshness import has_foreign_hooks, is_patched
from fluxfire.runtime.generation import Generation, Listener, Live, callback_may_change
from fluxfire.runtime.record import Record
from fluxfire.runtime.turns import Turns

_CONDUCTOR = "_fluxfire_conductor"
_TO_FIT = (
    'fluxfire: a pipeline in host memory (without .to("cuda")) needs less GPU memory with '
    'optimize(pipe, memory="auto"); smaller pictures or fewer at once need less, too'
)
_KNOWN = ("diffusers.", "fluxfire.")
_NAMES = ("__module__", "__name__", "__qualname__", "__doc__")


class Conductor:
    """Runs the callbacks of one pipeline, and holds the record of the edits made to it.

    Attributes:
        listeners: the listeners that hear of generations, in the order of the passes.
        model: the architecture.
        stack: the transformer's blocks and the wrappers around them.
        calls: functions that replace the transformer's own call; the last one counts. Compiling the
            whole transformer adds one.
        live: the live settings of passes that `fluxfire.using` can change.
        passes: the applied passes as data.
        changing: whether a change of the pipeline has begun and not finished. It stays True after
            an interrupt that left the pipeline half changed.
        record: the edits made to the pipeline.
        warmups: the open blocks of `warmup_run`.
    """

    def __init__(self, pipe: Pipeline, model: Model, record: Record) -> None:
        self.listeners: list[Listener] = []
        self.live: list[Live[Any]] = []
        self.passes: tuple[Configured, ...] = ()
        self.warmups: weakref.WeakSet[_WarmupRun] = weakref.WeakSet()
        self.changing = False
        self.model = model
        self.stack = BlockStack(model)
        self.calls: list[Callable[..., Any]] = []
        self.record = record
        self._pipe = weakref.ref(pipe)
        self._transformer = weakref.ref(pipe.transformer)
        self._turns = Turns()
        self._count = 0

    @property
    def warming_up(self) -> bool:
        """Whether generations are warm-up runs."""
        return bool(self.warmups)

    def owns(self, pipe: object) -> bool:
        """Whether an object is the pipeline of this conductor."""
        return self._pipe() is pipe

    @contextmanager
    def while_idle(self, action: str) -> Iterator[None]:
        """Let no generation start inside the block, which changes the pipeline.

        Args:
            action: what the block does, for the error message.

        Raises:
            BusyError: a generation is running, or another thread changes the pipeline.
        """
        change = _Change()
        try:
            holder = self._turns.take(change, sys._getframe(2))  # noqa: SLF001 - of the `with` statement
            if holder is not change:
                generating = isinstance(holder, Generation)
                doing = "generating" if generating else "being changed by another thread"
                raise BusyError(f"cannot {action}: the pipeline is {doing}; wait for it to finish")
            yield
        finally:
            self._turns.leave(change)

    def prepare(self) -> None:
        """Call `prepare` of every listener, before the pipeline uses its models.

        A caller may differentiate or vectorize the call with `torch.func`. The listeners read the
        weights and may rebuild values from them. That work is no part of the caller's function.
        """
        with torch._C._DisableFuncTorch():  # noqa: SLF001 - it has no public name
            for listener in self.listeners:
                listener.prepare()

    def _before_call(self, inputs: dict[str, Any]) -> None:
        with torch._C._DisableFuncTorch():  # noqa: SLF001 - as in `prepare`
            for listener in self.listeners:
                listener.before_call(inputs)

    def why_unusable(self, pipe: Pipeline) -> str | None:
        """Return the reason why the pipeline cannot generate any more; None if it can.

        Somebody may have replaced or compiled the transformer since `optimize`.
        """
        if self.changing:
            return (
                "optimize() or restore() was interrupted and left the pipeline half changed; "
                "call restore(pipe), which finishes the undoing"
            )
        if pipe.transformer is not self._transformer():
            return (
                "pipe.transformer was replaced after optimize(); "
                "put it back, or call restore(pipe) and optimize(pipe) again"
            )
        if conductor_of_transformer(pipe.transformer) is not self:
            return (
                "pipe.transformer was compiled after optimize(), which cut fluxfire off from it; "
                "call restore(pipe), and optimize(pipe) with Compile() instead"
            )
        return None

    @contextmanager
    def conduct_generation(self, pipe: Pipeline, *, may_change: bool) -> Iterator[None]:
        """Run the callbacks around a generation. The block is the whole pipeline call.

        Args:
            pipe: the pipeline.
            may_change: whether somebody's code runs between the steps.

        Raises:
            BusyError: the pipeline is generating already, or is being changed.
            FluxfireError: the pipeline cannot generate any more (see `why_unusable`).
        """
        generation = Generation(
            self._count + 1, self.model, self.passes, self.warming_up, may_change
        )
        try:
            holder = self._turns.take(generation, sys._getframe(2))  # noqa: SLF001 - as above
            if holder is not generation:
                raise BusyError(_why_busy(holder))
            if (why := self.why_unusable(pipe)) is not None:
                raise FluxfireError(why)
            self.model.unmount(pipe.transformer)  # an interrupt may have left the stack mounted
            self.prepare()
            self._count += 1
            with ExitStack() as entered:
                for listener in self.listeners:
                    entered.enter_context(listener.on_generation(generation))
                yield
        except torch.OutOfMemoryError as error:
            error.add_note(_TO_FIT)
            raise
        finally:
            self._turns.leave(generation)

    @contextmanager
    def conduct_step(self, inputs: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """Run the callbacks around a transformer call. The block is the call.

        Args:
            inputs: keyword arguments of the call.

        Yields:
            The keyword arguments with which to call the transformer.

        Raises:
            BusyError: a generation is running in another thread.
        """
        holder = self._turns.holder
        generation = holder if isinstance(holder, Generation) else None
        if generation is not None and generation.thread != threading.get_ident():
            raise BusyError(
                "this transformer is generating in another thread, for the pipeline that "
                "fluxfire optimized; two threads cannot share it"
            )
        if generation is None or not generation.owns(inputs):
            # A direct call, or a call by another pipeline that shares the transformer: no callbacks
            # but `prepare`, and no block wrappers.
            self.prepare()
            self._before_call(inputs)
            yield inputs
            return
        if generation.may_change:
            self.prepare()
        self._before_call(inputs)
        call = generation.advance(cast("Pipeline", self._pipe()), inputs)
        with ExitStack() as entered:
            for listener in self.listeners:
                entered.enter_context(listener.on_step(call))
            transformer = cast("Transformer", self._transformer())
            yield entered.enter_context(self.stack.mount(transformer, call, inputs))


class _WarmupRun:
    """One open block of `warmup_run`."""


class _Change:
    """The holder of the turn while the pipeline is being changed."""


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
    """Overrides the call of an optimized pipeline's transformer."""

    def __init__(self, conductor: Conductor, pipe: Pipeline) -> None:
        self.conductor = conductor
        super().__init__(pipe.transformer, CALL_SLOT, self._call_as_step)

    def __bool__(self) -> bool:
        """Whether the transformer is compiled. PEFT tests the truth of this attribute."""
        return bool(self.conductor.calls or self.inner)

    def _call_as_step(self, plain: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call the transformer, with the callbacks around the call."""
        run = self.conductor.calls[-1] if self.conductor.calls else plain
        with self.conductor.conduct_step(kwargs) as inputs:
            return run(*args, **inputs)


def conductor_of(pipe: object) -> Conductor | None:
    """Return the conductor of an optimized pipeline; None for any other object."""
    found: Conductor | None = vars(type(pipe)).get(_CONDUCTOR)
    return found if found is not None and found.owns(pipe) else None


@contextmanager
def warmup_run(pipe: object) -> Iterator[None]:
    """Mark a pipeline's generations inside the block as warm-up runs."""
    conductor = conductor_of(pipe)
    if conductor is None:  # a plain pipeline has no passes that could use the mark
        yield
        return
    run = _WarmupRun()  # if an interrupt skips the end of this block, Python deletes the object
    try:
        conductor.warmups.add(run)
        yield
    finally:
        conductor.warmups.discard(run)


def conductor_of_transformer(transformer: object) -> Conductor | None:
    """Return the conductor of the pipeline that a transformer was optimized through, or None."""
    call = vars(transformer).get(CALL_SLOT)
    return call.conductor if isinstance(call, TransformerCall) else None


def _look_after_last_step(conductor: Conductor, callback: Any) -> dict[str, Any]:
    """Return the arguments of a pipeline call with a step callback, for which the VAE is prepared.

    The last callback comes after the last transformer call, and may change the VAE.
    """

    def call_and_look(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> Any:
        made = callback(pipe, step, timestep, tensors)
        if step == pipe.num_timesteps - 1:
            conductor.prepare()
        return made

    arguments: dict[str, Any] = {"callback_on_step_end": call_and_look}
    # diffusers' own callback classes name the tensors that they want.
    if (wanted := getattr(callback, "tensor_inputs", None)) is not None:
        arguments["callback_on_step_end_tensor_inputs"] = wanted
    return arguments


def runs_foreign_code(pipe: Any, plain: type) -> bool:
    """Whether code that is neither diffusers' nor fluxfire's runs between the steps.

    Args:
        pipe: the pipeline.
        plain: its plain class.
    """
    scheduler = pipe.scheduler
    if not all(cls.__module__.startswith(_KNOWN) for cls in (plain, type(scheduler))):
        return True
    if has_foreign_hooks(pipe.transformer, submodules=False):
        return True
    return any(
        is_patched(owner, name) and callback_may_change(value)
        for owner in (pipe, scheduler)
        for name, value in vars(owner).items()
    )


def make_private_class(pipe: Pipeline, conductor: Conductor) -> type:
    """Create the class that this one pipeline becomes an instance of.

    The class differs from the plain class in four things: how to call an instance, how to copy it,
    how to create another instance, and what an assignment to `__class__` does. If somebody assigns
    another class, the pipeline stays an instance of the private class, whose plain base becomes the
    other class.
    """
    first: Any = type(pipe)

    def plain() -> Any:
        return made.__bases__[-1]

    def __new__(cls: type, *args: Any, **kwargs: Any) -> Any:  # noqa: N807
        if cls is made:  # such as `type(pipe)(**pipe.components)`
            return plain()(*args, **kwargs)
        return plain().__new__(cls)

    @functools.wraps(first.__call__)
    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N807
        callback = kwargs.get("callback_on_step_end")
        calls_back = callback_may_change(callback)
        if calls_back:
            kwargs |= _look_after_last_step(conductor, callback)
        may_change = calls_back or runs_foreign_code(self, plain())
        with conductor.conduct_generation(self, may_change=may_change):
            return plain().__call__(self, *args, **kwargs)

    def __copy__(self: Any) -> Any:  # noqa: N807
        return copies.shallow_copy(self, plain(), conductor.record)

    def __deepcopy__(self: Any, memo: dict[int, Any]) -> Any:  # noqa: N807
        return copies.deep_copy(self, plain(), conductor.record, memo)

    def __reduce_ex__(self: Any, protocol: Any) -> Any:  # noqa: N807
        twin = copy.deepcopy(self)
        return plain().__reduce_ex__(twin, protocol)

    def replace_plain(_: Any, cls: Any) -> None:
        if cls is made:
            return
        made.__bases__ = (StandIn, cls)
        for name in _NAMES:
            setattr(made, name, getattr(cls, name))

    namespace: dict[str, Any] = {
        **{name: getattr(first, name) for name in _NAMES},
        "__new__": __new__,
        "__call__": __call__,
        "__copy__": __copy__,
        "__deepcopy__": __deepcopy__,
        "__reduce_ex__": __reduce_ex__,
        "__class__": vars(StandIn)["__class__"].setter(replace_plain),
        _CONDUCTOR: conductor,
    }
    made: Any = type(first.__name__, (StandIn, first), namespace)
    return made  # type: ignore[no-any-return]
