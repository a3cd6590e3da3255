"""The owner of one pipeline's generations, hooked into that object alone.

Python looks `__call__` up on the class, so an instance attribute would be ignored, and a
patch of the class would reach every other pipeline. The conductor therefore turns this one
pipeline into an instance of a private subclass of its own class, which carries the same name
and pickles as the plain class. The transformer keeps its class (diffusers compares it when
components are shared): torch's own slot for how a module instance is called serves there.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from fluxfire.blocks import BlockStack
from fluxfire.errors import BusyError, FluxfireError
from fluxfire.generation import Generation, Listener, Live
from fluxfire.kontext import CALL_SLOT
from fluxfire.protocol import Configured

_CONDUCTOR = "_fluxfire_conductor"


class Conductor:
    """Owns one pipeline's generations, and the record of what was applied to it.

    Attributes:
        listeners: who hears of generations, in the order of the passes.
        stack: the run through the blocks.
        run_transformer: what a call of the transformer comes down to; compiling the whole
            model replaces it.
        live: the run-time settings of the passes that have some.
        passes: what is applied, as data.
        rehearsing: whether generations are rehearsals.
        record: what `fluxfire.applying` keeps here.
    """

    def __init__(self) -> None:
        self.listeners: list[Listener] = []
        self.live: list[Live[Any]] = []
        self.passes: tuple[Configured, ...] = ()
        self.rehearsing = False
        self.stack = BlockStack()
        self.run_transformer: Callable[..., Any] | None = None
        self.record: Any = None
        self._lock = threading.Lock()
        self._generation: Generation | None = None
        self._count = 0
        self._transformer: Any = None

    def pipeline_class(self, pipe: Any) -> type:
        """Make the class that this one pipeline becomes an instance of."""

        def call_pipeline(plain: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            with self._run(pipe):
                return plain(*args, **kwargs)

        return _subclass(type(pipe), call_pipeline, self)

    def transformer_call(self, pipe: Any) -> TransformerCall:
        """Make what goes into the transformer's call slot."""
        transformer = self._transformer = pipe.transformer
        plain = transformer._call_impl  # noqa: SLF001 - what __call__ runs
        self.run_transformer = vars(transformer).get(CALL_SLOT) or plain
        return TransformerCall(self, pipe)

    @contextmanager
    def idle(self, wish: str) -> Iterator[None]:
        """Hold generations off while the pipeline is being changed.

        Raises:
            BusyError: if a generation is running.
        """
        if not self._lock.acquire(blocking=False):
            doing = "generating" if self._generation else "being changed by another thread"
            raise BusyError(f"cannot {wish}: the pipeline is {doing}; wait for it to finish")
        try:
            yield
        finally:
            self._lock.release()

    def prepare(self) -> None:
        """Have every listener put its affairs in order before the models are used."""
        for listener in self.listeners:
            listener.prepare()

    def disturbed(self, pipe: Any) -> str | None:
        """Say what was done to the pipeline that fluxfire cannot live with, or None."""
        if pipe.transformer is not self._transformer:
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

    def _why_busy(self) -> str:
        running = self._generation
        if running is None:
            return "this pipeline is being optimized or restored; generate when that is done"
        here = running.thread == threading.get_ident()
        where = "in this call's own thread" if here else "in another thread"
        return (
            f"this pipeline is already generating {where}; a diffusers pipeline runs one "
            f"generation at a time: queue the calls, or give each thread a pipeline of its own"
        )

    @contextmanager
    def _run(self, pipe: Any) -> Iterator[None]:
        if not self._lock.acquire(blocking=False):
            raise BusyError(self._why_busy())
        try:
            if (why := self.disturbed(pipe)) is not None:
                raise FluxfireError(why)
            self.prepare()
            self._count += 1
            generation = self._generation = Generation(self._count, self.passes, self.rehearsing)
            with ExitStack() as entered:
                for listener in self.listeners:
                    entered.enter_context(listener.during(generation))
                yield
        finally:
            self._generation = None
            self._lock.release()

    @contextmanager
    def _step(self, pipe: Any, inputs: dict[str, Any]) -> Iterator[dict[str, Any]]:
        generation = self._generation
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
        call = generation.advance(pipe, inputs)
        with ExitStack() as entered:
            for listener in self.listeners:
                entered.enter_context(listener.around(call))
            yield entered.enter_context(self.stack.mounted(self._transformer, call, inputs))


@dataclass(frozen=True, eq=False)
class TransformerCall:
    """Stands in an optimized transformer's call slot."""

    conductor: Conductor
    pipe: Any

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the transformer as the step of a generation that it is."""
        run = self.conductor.run_transformer
        assert run is not None  # noqa: S101 - set before this was put into the slot
        with self.conductor._step(self.pipe, kwargs) as inputs:  # noqa: SLF001
            return run(*args, **inputs)


def conductor_of(pipe: object) -> Conductor | None:
    """Return the conductor of an optimized pipeline, or None."""
    found: Conductor | None = vars(type(pipe)).get(_CONDUCTOR)
    return found


@contextmanager
def rehearsal(pipe: object) -> Iterator[None]:
    """Make a pipeline's generations within a `with` block rehearsals."""
    conductor = conductor_of(pipe) or Conductor()
    before, conductor.rehearsing = conductor.rehearsing, True
    try:
        yield
    finally:
        conductor.rehearsing = before


def shared_conductor(transformer: object) -> Conductor | None:
    """Return the conductor of whichever pipeline a transformer was optimized for, or None."""
    call = vars(transformer).get(CALL_SLOT)
    return call.conductor if isinstance(call, TransformerCall) else None


def _subclass(plain: type, call: Callable[..., Any], conductor: Conductor) -> type:
    """Make a subclass that differs from `plain` only in how it is called."""

    @functools.wraps(plain.__call__)
    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N807
        return call(functools.partial(plain.__call__, self), *args, **kwargs)

    def __reduce_ex__(self: Any, protocol: Any) -> Any:  # noqa: N807
        # Pickles and copies are of the plain class: the conductor stays with this object.
        _, _, *state = plain.__reduce_ex__(self, protocol)  # type: ignore[call-arg, str-unpack]
        return (object.__new__, (plain,), *state)

    namespace = {
        "__module__": plain.__module__,
        "__qualname__": plain.__qualname__,
        "__doc__": plain.__doc__,
        "__call__": __call__,
        "__reduce_ex__": __reduce_ex__,
        _CONDUCTOR: conductor,
    }
    return type(plain.__name__, (plain,), namespace)
