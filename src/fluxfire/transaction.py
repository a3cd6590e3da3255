"""Reversible edits: every change records its inverse in the moment it is made."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any, TypeVar

from torch import nn

from fluxfire.blocks import BlockWrapper
from fluxfire.conductor import Conductor
from fluxfire.generation import Listener, Live
from fluxfire.kontext import CALL_SLOT

L = TypeVar("L")
P = TypeVar("P")
T = TypeVar("T")


class Transaction:
    """What a pass changes the pipeline through.

    There is no undo method for a pass to forget: the inverses recorded here are run, last
    in, first out, when a pass fails half-way and when the user restores the pipeline.

    Attributes:
        pipe: the pipeline.
        facts: what the pass being applied tells the report, or None.
        irreversible: why this cannot be taken back any more; empty while it can.
    """

    def __init__(self, pipe: Any, conductor: Conductor) -> None:
        self.pipe = pipe
        self.facts: Callable[[], Mapping[str, object]] | None = None
        self.irreversible: list[str] = []
        self._conductor = conductor
        self._inverses: list[tuple[str, Callable[[], None]]] = []

    def setattr(self, obj: object, name: str, value: object) -> None:
        """Set an attribute; its inverse sets the old value, or deletes a new attribute."""
        holder = _holder(obj, name)
        before = None if holder is None else dict(holder)

        def inverse() -> None:
            now = _holder(obj, name)
            if before is not None and now is holder:
                setattr(obj, name, before[name])  # a pipeline notes its components' classes
                return
            if now is not None:
                delattr(obj, name)
            if holder is not None and before is not None:
                _put_back(holder, name, before)

        with self._edit(f"set {type(obj).__name__}.{name}", inverse):
            setattr(obj, name, value)

    def set_class(self, obj: object, cls: type) -> None:
        """Turn an object into an instance of another class, normally a subclass of its own."""
        old = type(obj)

        def inverse() -> None:
            obj.__class__ = old

        with self._edit(f"turn {old.__name__} into a subclass", inverse):
            obj.__class__ = cls

    def set_call(self, module: nn.Module, call: Callable[..., object]) -> None:
        """Replace what calling a module runs; what listens to the transformer stays around it."""
        if module is self.pipe.transformer:
            self.setattr(self._conductor, "run_transformer", call)
        else:
            self.setattr(module, CALL_SLOT, call)

    def enter(self, manager: AbstractContextManager[T]) -> T:
        """Enter a context manager that stays entered until the pipeline is restored.

        For what must be live only while this pipeline runs, `listen` is the right verb.
        """

        def inverse() -> None:
            manager.__exit__(None, None, None)

        with self._edit(f"enter {type(manager).__name__}", inverse):
            value = manager.__enter__()
        return value

    def on_undo(self, inverse: Callable[[], object]) -> None:
        """Record the inverse of an edit that was just made in another way.

        To stay safe if the very next line fails, record before a change that can be
        undone even when it has not happened yet, or change one thing at a time.
        """

        def run() -> None:
            inverse()

        with self._edit("record an inverse", run):
            pass

    def wrap_blocks(self, wrapper: BlockWrapper) -> None:
        """Put a wrapper around the run through the blocks, inside those already there."""
        self._append(self._conductor.stack.wrappers, wrapper, "wrap the blocks")

    def listen(self, listener: Listener) -> None:
        """Have a listener hear of this pipeline's generations."""
        self._append(self._conductor.listeners, listener, "listen")

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
        self._append(self._conductor.live, live, "hold live settings")
        return live

    def rollback(self) -> list[Exception]:
        """Undo every edit, last in, first out; collect what the inverses raise."""
        failures: list[Exception] = []
        while self._inverses:
            label, inverse = self._inverses.pop()
            try:
                inverse()
            except Exception as error:  # noqa: BLE001 - the other inverses must still run
                error.add_note(f"while undoing: {label}")
                failures.append(error)
        return failures

    def _append(self, items: list[Any], item: object, label: str) -> None:
        with self._edit(label, lambda: _remove_last(items, item)):
            items.append(item)

    @contextmanager
    def _edit(self, label: str, inverse: Callable[[], None]) -> Iterator[None]:
        """Make one edit; only an edit that happened is recorded."""
        yield
        self._inverses.append((label, inverse))
        self._recorded(label)

    def _recorded(self, label: str) -> None:
        """Called after each recorded edit, for `fluxfire.testing` to inject failures."""


def _holder(obj: object, name: str) -> dict[str, Any] | None:
    """Return the dictionary in which an object keeps an attribute of its own, or None.

    A torch module keeps parameters, buffers and submodules in dictionaries apart, and moves
    an attribute from one to another when its type changes.
    """
    own = vars(obj)
    places = (own, *(own.get(r, {}) for r in ("_parameters", "_buffers", "_modules")))
    return next((place for place in places if name in place), None)


def _put_back(holder: dict[str, Any], name: str, before: dict[str, Any]) -> None:
    """Put an old value back where it was, also in the order of its neighbours."""
    now = dict(holder)
    holder.clear()
    for key, old in before.items():
        if key == name:
            holder[key] = old
        elif key in now:
            holder[key] = now.pop(key)
    holder.update(now)


def _remove_last(items: list[Any], item: object) -> None:
    """Remove by identity: two equal listeners are two listeners."""
    for index in reversed(range(len(items))):
        if items[index] is item:
            del items[index]
            return
