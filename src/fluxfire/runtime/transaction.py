"""The transaction: passes change a pipeline through it, and it records every change."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any, TypeVar

from torch import nn

from fluxfire.diffusers_types import Pipeline
from fluxfire.edits.log import (
    AttributeEdit,
    ClassEdit,
    EditLog,
    EnteredManager,
    InverseCall,
    ListEdit,
)
from fluxfire.edits.override import CALL_SLOT, Override
from fluxfire.runtime.blocks import BlockWrapper
from fluxfire.runtime.conductor import Conductor
from fluxfire.runtime.generation import Listener, Live

L = TypeVar("L")
P = TypeVar("P")
T = TypeVar("T")


class Transaction(EditLog):
    """Records the changes that passes make to a pipeline, and undoes them.

    A pass writes no undo. fluxfire undoes the recorded edits, the last one first, when a pass fails
    and when the user restores the pipeline. If somebody else replaced what an edit had put in
    place, the replacement stays.

    Attributes:
        pipe: the pipeline.
        facts: returns the facts that the pass reports; None if it reports none.
    """

    def __init__(self, pipe: Pipeline, conductor: Conductor) -> None:
        super().__init__()
        self.pipe = pipe
        self.facts: Callable[[], Mapping[str, object]] | None = None
        self._conductor = conductor

    def setattr(self, obj: object, name: str, value: object) -> None:
        """Set an attribute. Undo sets its old value again, or deletes it if it was new."""
        self.record(AttributeEdit(obj, name, value))

    def set_class(self, obj: object, cls: type) -> None:
        """Make an object an instance of another class, normally of a subclass of its class.

        Derive the class from `fluxfire.extend.StandIn`. Then code outside fluxfire still sees
        the plain class, and a hook that kept the class's `forward` does not call it after
        `restore`.
        """
        self.record(ClassEdit(obj, cls))

    def override(self, obj: object, name: str, call: Callable[..., object]) -> Override:
        """Replace a method of one object, or wrap it.

        Args:
            obj: the object.
            name: the method's name.
            call: the new function. Its first argument is the method as it was; the caller's
                arguments follow.
        """
        made = Override(obj, name, call)
        self.place(made)
        return made

    def place(self, override: Override) -> None:
        """Put an override in place, such as an instance of a subclass of `Override`."""
        self.record(override)

    def set_call(self, module: nn.Module, call: Callable[..., object]) -> None:
        """Replace what a call of a module runs. `call` gets the caller's arguments.

        If the module is the transformer, listeners still hear of its calls. Undo also works if
        somebody put a hook or another call around this one later.
        """
        transformer: object = self.pipe.transformer
        if module is transformer:
            self.record(ListEdit(self._conductor.calls, call, "replace the transformer's call"))
        else:

            def run(_: Callable[..., object], *args: Any, **kwargs: Any) -> object:
                return call(*args, **kwargs)

            self.override(module, CALL_SLOT, run)

    def enter(self, manager: AbstractContextManager[T]) -> T:
        """Enter a context manager, which stays entered until the pipeline is restored.

        To enter one only while the pipeline runs, use `listen`.
        """
        edit = EnteredManager(manager)
        entered: list[T] = []
        self.record(edit, lambda: entered.append(edit.make()))
        return entered[0]

    def on_undo(self, inverse: Callable[[], object]) -> None:
        """Record how to undo an edit. The pass makes this edit itself, right after this call.

        Args:
            inverse: a function, a bound method or a `functools.partial`. It must also work if the
                edit was not made, or was half made. Two calls must do the same as one. To undo
                the edit on a copy of the pipeline, fluxfire copies the inverse with everything that
                it is bound to.
        """
        self.record(InverseCall(inverse))

    def wrap_blocks(self, wrapper: BlockWrapper, *, innermost: bool = False) -> None:
        """Wrap the run through the blocks, inside the wrappers of earlier passes.

        Args:
            wrapper: the wrapper.
            innermost: also stay inside the wrappers of later passes. A wrapper that changes how
                the blocks compute, and not which of them run, belongs there.
        """
        stack = self._conductor.stack
        wrappers = stack.innermost if innermost else stack.wrappers
        self.record(ListEdit(wrappers, wrapper, "wrap the blocks"))

    def listen(self, listener: Listener) -> None:
        """Add a listener, which hears of this pipeline's generations."""
        self.record(ListEdit(self._conductor.listeners, listener, "listen"))

    def find_listeners(self, kind: type[L]) -> list[L]:
        """Return the pipeline's listeners of a class, such as the listener that `apply` added."""
        return [one for one in self._conductor.listeners if isinstance(one, kind)]

    def report_facts(self, facts: Callable[[], Mapping[str, object]]) -> None:
        """Set a function that returns facts about this pass. Each report calls it anew."""
        self.facts = facts

    def mark_irreversible(self, why: str) -> None:
        """Make `restore` refuse from now on, because something that it needs is gone."""
        self.irreversible.append(why)

    def live(self, pass_: P) -> Live[P]:
        """Allow `fluxfire.using` to change settings of this pass.

        Only the fields named in the pass's `tunable` can change.

        Returns:
            An object whose `settings` is the pass with the settings to use now.
        """
        live = Live(pass_)
        self.record(ListEdit(self._conductor.live, live, "hold live settings"))
        return live
