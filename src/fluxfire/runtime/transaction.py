"""What a pass changes a pipeline through: every change is recorded before it is made."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any, TypeVar

from torch import nn

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
    """What a pass changes the pipeline through.

    There is no undo method for a pass to forget: the edits recorded here are undone, last
    in, first out, when a pass fails half-way and when the user restores the pipeline. What
    somebody else put in an edit's place since then stays.

    Attributes:
        pipe: the pipeline.
        facts: what the pass being applied tells the report, or None.
    """

    def __init__(self, pipe: Any, conductor: Conductor) -> None:
        super().__init__()
        self.pipe = pipe
        self.facts: Callable[[], Mapping[str, object]] | None = None
        self._conductor = conductor

    def setattr(self, obj: object, name: str, value: object) -> None:
        """Set an attribute; undone, it has its old value again, or is gone if it was new."""
        self.record(AttributeEdit(obj, name, value))

    def set_class(self, obj: object, cls: type) -> None:
        """Turn an object into an instance of another class, normally a subclass of its own.

        The class should be a `fluxfire.edits.stand_in.StandIn`, so that others go on
        seeing the object's own, and no hook keeps its `forward` beyond `restore`.
        """
        self.record(ClassEdit(obj, cls))

    def override(self, obj: Any, name: str, call: Callable[..., object]) -> Override:
        """Put a call in the place of one object's method, or around it.

        Args:
            obj: whose method.
            name: the method's name.
            call: is given what it stands in the place of, then the caller's arguments.
        """
        made = Override(obj, name, call)
        self.place(made)
        return made

    def place(self, override: Override) -> None:
        """Put an override of one's own making there."""
        self.record(override)

    def set_call(self, module: nn.Module, call: Callable[..., object]) -> None:
        """Replace what calling a module runs; what listens to the transformer stays around it.

        `call` gets the caller's arguments. Undone, the module calls what it called before, also
        where a hook or another call came to stand around this one.
        """
        if module is self.pipe.transformer:
            self.record(ListEdit(self._conductor.calls, call, "replace the transformer's call"))
        else:

            def run(_: Callable[..., object], *args: Any, **kwargs: Any) -> object:
                return call(*args, **kwargs)

            self.override(module, CALL_SLOT, run)

    def enter(self, manager: AbstractContextManager[T]) -> T:
        """Enter a context manager that stays entered until the pipeline is restored.

        For what must be live only while this pipeline runs, `listen` is the right verb.
        """
        edit = EnteredManager(manager)
        entered: list[T] = []
        self.record(edit, lambda: entered.append(edit.make()))
        return entered[0]

    def on_undo(self, inverse: Callable[[], object]) -> None:
        """Record the inverse of an edit that is about to be made in another way.

        Args:
            inverse: a function, a bound method or a `functools.partial`. It must work also if the
                edit was not made or was made by half, and running it twice must do the same as
                once. A copy of the pipeline undoes the edit on itself, by a copy of this one and
                of what it is bound to.
        """
        self.record(InverseCall(inverse))

    def wrap_blocks(self, wrapper: BlockWrapper) -> None:
        """Put a wrapper around the run through the blocks, inside those already there."""
        self.record(ListEdit(self._conductor.stack.wrappers, wrapper, "wrap the blocks"))

    def listen(self, listener: Listener) -> None:
        """Have a listener hear of this pipeline's generations."""
        self.record(ListEdit(self._conductor.listeners, listener, "listen"))

    def listening(self, kind: type[L]) -> list[L]:
        """Return the pipeline's listeners of one kind: what a pass's `apply` put there."""
        return [one for one in self._conductor.listeners if isinstance(one, kind)]

    def report_facts(self, facts: Callable[[], Mapping[str, object]]) -> None:
        """Have the report ask for these facts about the pass being applied, each time anew."""
        self.facts = facts

    def mark_irreversible(self, why: str) -> None:
        """Have `restore` refuse from now on, since something is gone that it would need."""
        self.irreversible.append(why)

    def live(self, pass_: P) -> Live[P]:
        """Make a pass's settings ones that `fluxfire.using` can swap while it is applied.

        Of its fields those can be swapped that its class names in `tunable`.
        """
        live = Live(pass_)
        self.record(ListEdit(self._conductor.live, live, "hold live settings"))
        return live
