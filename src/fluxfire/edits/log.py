"""Reversible edits, and the log that undoes them in place or on a copy.

Every edit keeps three rules.

*Record first, make second.* Ctrl-C can come between any two instructions. If the edit were made
first, an interrupt could leave an edit that no log knows. So `undo` must also work on an edit that
was not made, is half made, or is undone already.

*Keep what others did.* Somebody may replace what an edit put in place: an IP-Adapter replaces
processors, and offloading replaces a `forward`. Then `undo` keeps the replacement. The pipeline
ends in the same state as if fluxfire had never touched it.

*Copies are plain.* `Edit.for_copies` returns the same edit for copies of the edited objects, and
the log undoes it there.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field
from functools import partial
from types import CellType, FunctionType
from typing import Any, Protocol

from torch import nn

__all__ = [
    "AttributeEdit",
    "ClassEdit",
    "Edit",
    "EditLog",
    "EnteredManager",
    "InverseCall",
    "ListEdit",
    "Memo",
    "PartialMemo",
]

Memo = dict[Any, Any]
"""The memo of `copy.deepcopy`: maps the id of each object to the object's copy."""
_MISSING = object()
_CLASS: Any = vars(object)["__class__"]
_MODULE_DICTIONARIES = ("_parameters", "_buffers", "_modules")


class Edit(Protocol):
    """One reversible change.

    Attributes:
        label: what the edit does, for error messages.
    """

    label: str

    def undo(self) -> None:
        """Undo the edit. Must also work after a complete or an interrupted `undo`."""
        ...

    def for_copies(self, memo: Memo) -> Edit | None:
        """Return the same edit of the copies in `memo`; None if it concerns none of them."""
        ...


@dataclass(eq=False)
class AttributeEdit:
    """Sets an attribute.

    Attributes:
        obj: the object.
        name: the attribute's name.
        value: the new value.
        label: what the edit does, for error messages.
        made: whether `make` is finished.
        undoing: whether `undo` has begun.
        place: the dictionary of the object that held the attribute before; None if it is new.
        before: the value before.
        order: the names in that dictionary, in order.
    """

    obj: Any
    name: str
    value: Any
    label: str = ""
    made: bool = False
    undoing: bool = False
    place: str | None = None
    before: Any = _MISSING
    order: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        self.label = self.label or f"set {type(self.obj).__name__}.{self.name}"
        self.place = _find_place(self.obj, self.name)
        if self.place is not None:
            holder = _dictionary(self.obj, self.place)
            self.before, self.order = holder[self.name], tuple(holder)

    def make(self) -> None:
        """Set the attribute."""
        setattr(self.obj, self.name, self.value)
        self.made = True

    def undo(self) -> None:
        """Set the old value again, or delete the attribute if it was new."""
        if self.made and not self.undoing and not self._is_in_place():
            return
        # From here on, a missing attribute means that an interrupt cut `undo` short, not that
        # somebody deleted it.
        self.undoing = True
        for place in _places(self.obj):
            if place != self.place:
                _dictionary(self.obj, place).pop(self.name, None)
        if self.place is None:
            return
        holder = _dictionary(self.obj, self.place)
        if self.name in holder:
            if holder[self.name] is not self.before:
                # By setattr, because a pipeline's `__setattr__` registers the component's class.
                setattr(self.obj, self.name, self.before)
            return
        _replace_dictionary(self.obj, self.place, self._with_before(holder))

    def for_copies(self, memo: Memo) -> AttributeEdit | None:
        """Return the same edit of the object's copy."""
        return None if id(self.obj) not in memo else _copy_edit(self, memo)

    def for_object(self, obj: Any) -> AttributeEdit:
        """Return the same edit of another object with the same attributes."""
        twin = copy.copy(self)
        twin.obj = obj
        return twin

    def _is_in_place(self) -> bool:
        place = _find_place(self.obj, self.name)
        return place is not None and _dictionary(self.obj, place)[self.name] is self.value

    def _with_before(self, holder: dict[str, Any]) -> dict[str, Any]:
        """Return a dictionary with the old value in its old position.

        Example: the old order is a, x, b, and now there are a, b, c. The result is a, x, b, c.
        """
        known = {k: self.before if k == self.name else holder.get(k, _MISSING) for k in self.order}
        kept = {key: value for key, value in known.items() if value is not _MISSING}
        return {**kept, **{k: v for k, v in holder.items() if k not in kept}}


@dataclass(eq=False)
class ClassEdit:
    """Makes an object an instance of another class."""

    obj: Any
    cls: type
    label: str = ""

    def __post_init__(self) -> None:
        self.before, self._last_base = type(self.obj), self.cls.__bases__[-1]
        self.label = self.label or f"turn {self.before.__name__} into a subclass"

    def make(self) -> None:
        """Set the class."""
        self.obj.__class__ = self.cls

    def undo(self) -> None:
        """Set the old class again, or the class that somebody else gave the object since."""
        if type(self.obj) is self.cls:
            # If somebody assigns `obj.__class__`, `StandIn` may keep its own class and put the
            # other class in place of its last base. Then the other class is the one to go back to.
            last_base = self.cls.__bases__[-1]
            before = self.before if last_base is self._last_base else last_base
            _CLASS.__set__(self.obj, before)  # the class may define a setter, which must not run

    def for_copies(self, memo: Memo) -> ClassEdit | None:
        """Return the same edit of the object's copy."""
        return None if id(self.obj) not in memo else _copy_edit(self, memo)


@dataclass(eq=False)
class ListEdit:
    """Adds an item to one of fluxfire's own lists."""

    items: list[Any]
    item: Any
    label: str

    def make(self) -> None:
        """Add the item."""
        self.items.append(self.item)

    def undo(self) -> None:
        """Remove the item. Compares by identity, because two equal listeners are two listeners."""
        for index in reversed(range(len(self.items))):
            if self.items[index] is self.item:
                del self.items[index]
                return

    def for_copies(self, memo: Memo) -> None:
        """Return None: a copy of a pipeline has no such list."""


@dataclass(eq=False)
class EnteredManager:
    """Enters a context manager. `undo` exits it once, even if an interrupt cuts the exit short."""

    manager: AbstractContextManager[Any]
    label: str = ""
    stack: ExitStack = field(default_factory=ExitStack)

    def __post_init__(self) -> None:
        self.label = f"enter {type(self.manager).__name__}"

    def make(self) -> Any:
        """Enter the context manager."""
        return self.stack.enter_context(self.manager)

    def undo(self) -> None:
        """Exit the context manager if it was entered."""
        self.stack.close()

    def for_copies(self, memo: Memo) -> None:
        """Return None: the context manager belongs to the original."""


@dataclass(eq=False)
class InverseCall:
    """An edit that a pass makes itself. The log knows only the call that undoes it.

    On a copy, the call must act on the copy's objects. So `for_copies` copies the call together
    with everything that it is bound to. For example, one pass recorded three inverses:

        a = lambda: forget(transformer)
        b = lambda: forget(vae)
        c = lambda: (forget(transformer), forget(vae))

    `copy.deepcopy(pipe.vae)` makes `vae2`, and `memo` maps the id of `vae` to it. Then

    - a becomes None, because it does not reach the VAE. The transformer, 22 GiB, is not copied.
    - b becomes `lambda: forget(vae2)`.
    - c becomes `lambda: (forget(transformer2), forget(vae2))`. It must not change the original
      transformer, so it gets a copy, which nobody else uses (see `PartialMemo`).
    """

    inverse: Callable[[], object]
    label: str = "record an inverse"

    def undo(self) -> None:
        """Call the inverse."""
        self.inverse()

    def for_copies(self, memo: Memo) -> InverseCall | None:
        """Return the same call for the copies; None if the call reaches none of their originals."""
        if not _reaches_copied(self.inverse, memo):
            return None
        return InverseCall(_copy_call(self.inverse, memo), self.label)


class EditLog:
    """The edits of one transaction, in order.

    Attributes:
        irreversible: reasons why the edits cannot be undone any more; empty while they can.
    """

    def __init__(self) -> None:
        self.irreversible: list[str] = []
        self._edits: list[Edit] = []

    def __deepcopy__(self, memo: Memo) -> EditLog:
        """Return a log without edits.

        An inverse may be bound to its log, so a copy of the inverse needs a copy of the log. But
        the copied pipeline is plain, so its log has no edits.
        """
        twin = memo[id(self)] = copy.copy(self)
        twin.irreversible, twin._edits = [], []  # noqa: SLF001 - the same class
        if "pipe" in vars(self):
            vars(twin)["pipe"] = copy.deepcopy(vars(self)["pipe"], memo)
        return twin

    def record(self, edit: Any, make: Callable[[], object] | None = None) -> None:
        """Record an edit, then make it.

        Args:
            edit: the edit.
            make: makes the edit; by default `edit.make`, if the edit has it.
        """
        self._edits.append(edit)
        make = make or getattr(edit, "make", None)
        if make is not None:
            make()
        self.after_edit(edit.label)

    def after_edit(self, label: str) -> None:
        """Do nothing. `record` calls this after each edit; `fluxfire.testing` raises here."""

    def newest_first(self) -> Iterator[Edit]:
        """Iterate over the edits from the last to the first: the order in which to undo them."""
        return reversed(self._edits)

    def rollback(self) -> list[Exception]:
        """Undo every edit, the last one first.

        After an interrupt, the log still has the edit whose `undo` was cut short, and all edits
        before it. The next call continues from there.

        Returns:
            The exceptions that edits raised. They do not stop the rollback.
        """
        failures: list[Exception] = []
        while self._edits:
            edit = self._edits[-1]
            try:
                edit.undo()
            except Exception as error:  # noqa: BLE001 - the other edits must still be undone
                error.add_note(f"while undoing: {edit.label}")
                failures.append(error)
            self.after_undo(edit.label)
            self._edits.pop()
        return failures

    def after_undo(self, label: str) -> None:
        """Do nothing. `rollback` calls this after each undo; `fluxfire.testing` raises here."""

    def undo_on_copies(self, memo: Memo) -> None:
        """Undo the edits on the copies in `memo`."""
        for edit in self.newest_first():
            if (twin := edit.for_copies(memo)) is not None:
                twin.undo()


class PartialMemo(dict[Any, Any]):
    """The memo of a copy of one model, to undo the edits of a whole pipeline on that copy.

    It begins with the entries of a memo, but is a separate dictionary. So the copies of other
    models that an inverse needs stay in here. If the user copies another model in the same
    `deepcopy`, that model gets a copy of its own.

    Attributes:
        others: the objects of all models of the pipeline, by id.
        whole: the pipeline, from which every model can be reached; None once it is deleted.
    """

    def __init__(self, memo: Memo, others: Memo, whole: object) -> None:
        # torch keeps the copies of storages in memo["torch"], which must be a separate one, too.
        super().__init__(memo, torch=dict(memo.get("torch", {})))
        self.others, self.whole = others, whole


class _Probe(dict[Any, Any]):
    """A memo for a copy that is thrown away: it finds out whether the copy reaches `memo`.

    `copy.deepcopy` asks its memo for every object that it reaches. The probe answers with the
    copies in `memo`, and notes that they were reached. It answers with the objects of other models
    themselves, so that no other model is copied.

    Attributes:
        reached_copied: whether the copy reached an object with a copy in `memo`.
    """

    def __init__(self, memo: Memo) -> None:
        super().__init__(torch=dict(memo.get("torch", {})))
        self._memo = memo
        self._others: Memo = memo.others if isinstance(memo, PartialMemo) else {}
        self._whole = memo.whole if isinstance(memo, PartialMemo) else None
        self.reached_copied = False

    def get(self, key: Any, default: Any = None) -> Any:
        """Return the copy of an object, or the object itself if it belongs to another model."""
        if key in self._memo:
            self.reached_copied = True
            return self._memo[key]
        if self._whole is not None and key == id(self._whole):
            self.reached_copied = True  # every model can be reached from the pipeline
            return self._whole
        return self[key] if key in self else self._others.get(key, default)


def _reaches_copied(call: Any, memo: Memo) -> bool:
    """Whether a call is bound, directly or through others, to an object with a copy in `memo`."""
    probe = _Probe(memo)
    _copy_call(call, probe)
    return probe.reached_copied


def _copy_call(call: Any, memo: Memo) -> Any:
    """Copy a call with everything that it is bound to.

    `copy.deepcopy` copies a bound method with its object. But it does not copy a function, so the
    function's closure and defaults would still refer to the originals. This copies them.
    """
    if isinstance(call, partial):
        args = (_copy_call(arg, memo) for arg in call.args)
        keywords = {name: _copy_call(arg, memo) for name, arg in call.keywords.items()}
        return partial(_copy_call(call.func, memo), *args, **keywords)
    if not isinstance(call, FunctionType):
        return copy.deepcopy(call, memo)
    if not (call.__closure__ or call.__defaults__ or call.__kwdefaults__):
        return call
    if (known_twin := memo.get(id(call))) is not None:
        return known_twin
    cells = tuple(CellType() for _ in call.__closure__ or ())
    twin: Any = FunctionType(call.__code__, call.__globals__, call.__name__, None, cells)
    memo[id(call)] = twin  # before the cells are filled, because a function may refer to itself
    for cell, old in zip(cells, call.__closure__ or (), strict=True):
        if not _is_empty(old):
            cell.cell_contents = _copy_call(old.cell_contents, memo)
    if call.__defaults__:
        twin.__defaults__ = tuple(_copy_call(value, memo) for value in call.__defaults__)
    if (by_name := call.__kwdefaults__) is not None:
        twin.__kwdefaults__ = {name: _copy_call(value, memo) for name, value in by_name.items()}
    return twin


def _is_empty(cell: CellType) -> bool:
    try:
        _ = cell.cell_contents
    except ValueError:
        return True
    return False


def _copy_edit(edit: Any, memo: Memo) -> Any:
    twin = copy.copy(edit)
    vars(twin).update({name: copy.deepcopy(value, memo) for name, value in vars(edit).items()})
    return twin


def _places(obj: object) -> tuple[str, ...]:
    """Return the names of the dictionaries with an object's own attributes.

    A torch module has separate dictionaries for parameters, buffers and submodules. It moves an
    attribute from one dictionary to another when the type of the value changes.
    """
    return ("__dict__", *(_MODULE_DICTIONARIES if isinstance(obj, nn.Module) else ()))


def _dictionary(obj: Any, place: str) -> dict[str, Any]:
    own: dict[str, Any] = vars(obj)
    return own if place == "__dict__" else own[place]


def _find_place(obj: object, name: str) -> str | None:
    """Return the name of the dictionary with an attribute; None if no dictionary has it."""
    return next((place for place in _places(obj) if name in _dictionary(obj, place)), None)


def _replace_dictionary(obj: Any, place: str, new: dict[str, Any]) -> None:
    """Replace a whole dictionary in one step, so that no interrupt can leave it half changed."""
    if place == "__dict__":
        object.__setattr__(obj, "__dict__", new)
    else:
        vars(obj)[place] = new
