"""Edits that can be undone, whatever happened since, and also on a copy.

Three rules hold for each of them.

*Recorded before made.* An interrupt can come between any two instructions. So `undo` must work
on an edit that was not made, made by half, or undone already.

*What others did since stays.* If somebody replaced what the edit had put in place (an IP-Adapter
its processors, offloading its hooks), `undo` leaves it: the pipeline ends as one that never met
fluxfire and had the same things done to it.

*Copies are plain.* `copied` gives the same edit on the copies of its objects, to be undone there.
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
"""What `copy.deepcopy` keeps: the copy of each object, by the object's id."""
_MISSING = object()
_OF_MODULES = ("_parameters", "_buffers", "_modules")


class Edit(Protocol):
    """One change to a pipeline.

    Attributes:
        label: what it does, for errors.
    """

    label: str

    def undo(self) -> None:
        """Take it back. Running it twice, or half and then whole, does the same."""
        ...

    def copied(self, memo: Memo) -> Edit | None:
        """Return the same edit on the copies in `memo`; None if it does not concern them."""
        ...


@dataclass(eq=False)
class AttributeEdit:
    """An attribute was set."""

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
        self.place = _place(self.obj, self.name)
        if self.place is not None:
            holder = _holder(self.obj, self.place)
            self.before, self.order = holder[self.name], tuple(holder)

    def make(self) -> None:
        """Set it."""
        setattr(self.obj, self.name, self.value)
        self.made = True

    def undo(self) -> None:
        """Set the old value again, or delete a new attribute."""
        if self.made and not self.undoing and not self._is_there():
            return
        self.undoing = True  # a half-way undone attribute may be missing, and must come back
        for place in _places(self.obj):
            if place != self.place:
                _holder(self.obj, place).pop(self.name, None)
        if self.place is None:
            return
        holder = _holder(self.obj, self.place)
        if self.name in holder:
            if holder[self.name] is not self.before:
                setattr(self.obj, self.name, self.before)  # a pipeline notes the new class
            return
        _replace_holder(self.obj, self.place, self._with_before(holder))

    def copied(self, memo: Memo) -> AttributeEdit | None:
        """Return the same edit of the copy."""
        return None if id(self.obj) not in memo else _on_copies(self, memo)

    def on(self, obj: Any) -> AttributeEdit:
        """Return the same edit of another object that has the same attributes."""
        twin = copy.copy(self)
        twin.obj = obj
        return twin

    def _is_there(self) -> bool:
        place = _place(self.obj, self.name)
        return place is not None and _holder(self.obj, place)[self.name] is self.value

    def _with_before(self, holder: dict[str, Any]) -> dict[str, Any]:
        """Put the old value where it was among its neighbours.

        Old order a, x, b; now a, b, c. Gives a, x, b, c.
        """
        known = {k: self.before if k == self.name else holder.get(k, _MISSING) for k in self.order}
        kept = {key: value for key, value in known.items() if value is not _MISSING}
        return {**kept, **{k: v for k, v in holder.items() if k not in kept}}


@dataclass(eq=False)
class ClassEdit:
    """An object became an instance of another class."""

    obj: Any
    cls: type
    label: str = ""

    def __post_init__(self) -> None:
        self.before = type(self.obj)
        self.label = self.label or f"turn {self.before.__name__} into a subclass"

    def make(self) -> None:
        """Turn it."""
        self.obj.__class__ = self.cls

    def undo(self) -> None:
        """Turn it back."""
        if type(self.obj) is self.cls:
            self.obj.__class__ = self.before

    def copied(self, memo: Memo) -> ClassEdit | None:
        """Return the same edit of the copy."""
        return None if id(self.obj) not in memo else _on_copies(self, memo)


@dataclass(eq=False)
class ListEdit:
    """An item was added to a list of fluxfire's own, which no copy has."""

    items: list[Any]
    item: Any
    label: str

    def make(self) -> None:
        """Add it."""
        self.items.append(self.item)

    def undo(self) -> None:
        """Remove it by identity: two equal listeners are two listeners."""
        for index in reversed(range(len(self.items))):
            if self.items[index] is self.item:
                del self.items[index]
                return

    def copied(self, memo: Memo) -> None:
        """Return nothing."""


@dataclass(eq=False)
class EnteredManager:
    """A context manager was entered. It is left once, also where leaving it is interrupted."""

    manager: AbstractContextManager[Any]
    label: str = ""
    stack: ExitStack = field(default_factory=ExitStack)

    def __post_init__(self) -> None:
        self.label = f"enter {type(self.manager).__name__}"

    def make(self) -> Any:
        """Enter it."""
        return self.stack.enter_context(self.manager)

    def undo(self) -> None:
        """Leave it, if it was entered."""
        self.stack.close()

    def copied(self, memo: Memo) -> None:
        """Return nothing."""


@dataclass(eq=False)
class InverseCall:
    """An edit made in another way, known by the call that undoes it."""

    inverse: Callable[[], object]
    label: str = "record an inverse"

    def undo(self) -> None:
        """Call it."""
        self.inverse()

    def copied(self, memo: Memo) -> InverseCall | None:
        """Return the same call on the copies; None if it comes across none of their originals.

        It may undo something of another model, or of the whole process.
        """
        trial = _Trial(memo)
        twin = _copied_call(self.inverse, trial)
        if not trial.met_copied:
            return None
        if trial.met_others:  # it undoes something of several models, and not all were copied
            twin = _copied_call(self.inverse, memo)
        else:
            trial.keep()
        return InverseCall(twin, self.label)


class EditLog:
    """Edits in the order in which they were made.

    Attributes:
        irreversible: why they cannot be taken back any more; empty while they can.
    """

    def __init__(self) -> None:
        self.irreversible: list[str] = []
        self._edits: list[Edit] = []

    def __deepcopy__(self, memo: Memo) -> EditLog:
        """Return one without edits: an inverse may refer to it, and a copy's are not on record."""
        twin = memo[id(self)] = copy.copy(self)
        twin.irreversible, twin._edits = [], []  # noqa: SLF001 - its own
        if "pipe" in vars(self):
            vars(twin)["pipe"] = copy.deepcopy(vars(self)["pipe"], memo)
        return twin

    def record(self, edit: Any, make: Callable[[], object] | None = None) -> None:
        """Record an edit, then make it: by `make`, or by its own method of that name."""
        self._edits.append(edit)
        make = make or getattr(edit, "make", None)
        if make is not None:
            make()
        self.recorded(edit.label)

    def recorded(self, label: str) -> None:
        """Be called after each edit, for `fluxfire.testing` to inject failures."""

    def newest_first(self) -> Iterator[Edit]:
        """Iterate over the edits in the order in which they are to be undone."""
        return reversed(self._edits)

    def rollback(self) -> list[Exception]:
        """Undo every edit, last in, first out; collect what that raises.

        An interrupt leaves the edits that are not undone yet, and the one that was being undone,
        for the next call.
        """
        failures: list[Exception] = []
        while self._edits:
            edit = self._edits[-1]
            try:
                edit.undo()
            except Exception as error:  # noqa: BLE001 - the other edits must still be undone
                error.add_note(f"while undoing: {edit.label}")
                failures.append(error)
            self.undone(edit.label)
            self._edits.pop()
        return failures

    def undone(self, label: str) -> None:
        """Be called before an undone edit leaves the log, likewise."""

    def undo_on_copies(self, memo: Memo) -> None:
        """Undo on the copies in `memo` what was done to their originals."""
        for edit in self.newest_first():
            if (twin := edit.copied(memo)) is not None:
                twin.undo()


class PartialMemo(dict[Any, Any]):
    """The copies of one model's objects, for edits of a whole pipeline to be undone on.

    What is copied besides stays here, so that other copies of it are made in their own right.

    Attributes:
        others: what belongs to other models, by id.
        whole: the pipeline, through which all of them can be reached; None once it is gone.
    """

    def __init__(self, memo: Memo, others: Memo, whole: object) -> None:
        super().__init__(memo, torch=dict(memo.get("torch", {})))  # torch's copies of storages
        self.others, self.whole = others, whole


class _Trial(dict[Any, Any]):
    """A memo of one copying, which says what it came across.

    Other models than those that were copied are not copied here.

    Attributes:
        met_copied: whether it came across something that had been copied before.
        met_others: whether it came across other models.
    """

    def __init__(self, memo: Memo) -> None:
        super().__init__(torch=dict(memo.get("torch", {})))
        self._memo = memo
        self._others: Memo = memo.others if isinstance(memo, PartialMemo) else {}
        self._whole = memo.whole if isinstance(memo, PartialMemo) else None
        self.met_copied = self.met_others = False

    def get(self, key: Any, default: Any = None) -> Any:
        """Answer as `copy.deepcopy` asks."""
        self.met_copied |= (copied := key in self._memo)
        if copied or key in self:
            return self._memo[key] if copied else self[key]
        if self._whole is not None and key == id(self._whole):
            self.met_copied = self.met_others = True
            return self._whole
        self.met_others |= key in self._others
        return self._others.get(key, default)

    def keep(self) -> None:
        """Put what was copied into the memo."""
        alive = self.pop(id(self), [])  # what `copy.deepcopy` keeps alive, so that ids stay true
        self._memo.setdefault(id(self._memo), []).extend(alive)
        self._memo.update(self)


def _copied_call(call: Any, memo: Memo) -> Any:
    """Copy a call with what it is bound to.

    `copy.deepcopy` follows a bound method to its object, but takes a function as it is, with what
    it holds: so it would do on the original what it is to do on the copy.
    """
    if isinstance(call, partial):
        args = (_copied_call(arg, memo) for arg in call.args)
        known = {name: _copied_call(arg, memo) for name, arg in call.keywords.items()}
        return partial(_copied_call(call.func, memo), *args, **known)
    if not isinstance(call, FunctionType):
        return copy.deepcopy(call, memo)
    if not (call.__closure__ or call.__defaults__ or call.__kwdefaults__):
        return call
    if (known_twin := memo.get(id(call))) is not None:
        return known_twin
    cells = tuple(CellType() for _ in call.__closure__ or ())
    twin: Any = FunctionType(call.__code__, call.__globals__, call.__name__, None, cells)
    memo[id(call)] = twin  # before its contents: a function may hold itself
    for cell, old in zip(cells, call.__closure__ or (), strict=True):
        if not _is_empty(old):
            cell.cell_contents = _copied_call(old.cell_contents, memo)
    if call.__defaults__:
        twin.__defaults__ = tuple(_copied_call(of, memo) for of in call.__defaults__)
    if (by_name := call.__kwdefaults__) is not None:
        twin.__kwdefaults__ = {name: _copied_call(of, memo) for name, of in by_name.items()}
    return twin


def _is_empty(cell: CellType) -> bool:
    try:
        _ = cell.cell_contents
    except ValueError:
        return True
    return False


def _on_copies(edit: Any, memo: Memo) -> Any:
    twin = copy.copy(edit)
    vars(twin).update({name: copy.deepcopy(of, memo) for name, of in vars(edit).items()})
    return twin


def _places(obj: object) -> tuple[str, ...]:
    """Return where an object keeps attributes of its own.

    A torch module keeps parameters, buffers and submodules in dictionaries apart, and moves
    an attribute from one to another when its type changes.
    """
    return ("__dict__", *(_OF_MODULES if isinstance(obj, nn.Module) else ()))


def _holder(obj: Any, place: str) -> dict[str, Any]:
    own: dict[str, Any] = vars(obj)
    return own if place == "__dict__" else own[place]


def _place(obj: object, name: str) -> str | None:
    """Return where an object keeps an attribute, or None if it has none of its own."""
    return next((place for place in _places(obj) if name in _holder(obj, place)), None)


def _replace_holder(obj: Any, place: str, made: dict[str, Any]) -> None:
    """Put another dictionary there in one step, which no interrupt can cut in two."""
    if place == "__dict__":
        object.__setattr__(obj, "__dict__", made)
    else:
        vars(obj)[place] = made
