"""Callables that stand in the place of one object's method, and can be taken out again."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

from fluxfire.edits.log import InverseCall, Memo

__all__ = ["Override", "copied_by_state"]

CALL_SLOT = "_compiled_call_impl"
"""Where torch.nn.Module looks first when an instance is called; Module.compile fills it."""


class Override:
    """An instance attribute in the place of a method of its owner's class; an `Edit`.

    It is taken out in any order, whoever came after it. Overrides of one place form a chain, and a
    link leaves it wherever it is. Somebody else may keep one for good, as a hook keeps the
    `forward` that it found: once undone it does nothing but call what it stood in the place of.

    Attributes:
        inner: what it stands in the place of: another attribute of the instance, or None for the
            class's method.
        undone: whether it was taken out.
    """

    def __init__(self, owner: Any, name: str, call: Callable[..., Any]) -> None:
        self.label = f"override {type(owner).__name__}.{name}"
        self._owner, self._name, self._call = weakref.ref(owner), name, call
        self.inner: Callable[..., Any] | None = vars(owner).get(name)
        self.undone = False

    @property
    def obj(self) -> Any:
        """Its owner; None once that is gone, which an override does not prevent."""
        return self._owner()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Do what the method's place is taken for."""
        if self.undone:
            return self.plain(*args, **kwargs)
        return self._call(self.plain, *args, **kwargs)

    @property
    def plain(self) -> Callable[..., Any]:
        """What is called without it."""
        return self.inner or _of_class(self.obj, self._name)

    def make(self) -> None:
        """Put it there."""
        setattr(self.obj, self._name, self)

    def undo(self) -> None:
        """Take it out; leave what others put in its place since."""
        self.undone = True
        if (owner := self.obj) is None:
            return
        outer: Any = vars(owner).get(self._name)
        if outer is self:
            _put(owner, self._name, self.inner)
        while isinstance(outer, Override):
            if outer.inner is self:
                outer.inner = self.inner
            outer = outer.inner

    def copied(self, memo: Memo) -> InverseCall | None:
        """Return what takes it out of its owner's deep copy."""
        if self.obj is None or id(self.obj) not in memo:
            return None
        owner, inner = (copy.deepcopy(of, memo) for of in (self.obj, self.inner))
        return InverseCall(partial(_put_if_there, owner, self._name, inner))

    def on(self, twin: Any) -> InverseCall:
        """Return what takes it out of its owner's shallow copy."""
        return InverseCall(partial(_put_if_there, twin, self._name, self.inner))

    def __deepcopy__(self, memo: Memo) -> Any:
        return _of_class(copy.deepcopy(self.obj, memo), self._name)

    def __reduce__(self) -> tuple[Any, ...]:
        return _of_class, (self.obj, self._name)


def copied_by_state(owner: Any, memo: Memo) -> Any:
    """Copy a module as `copy.deepcopy` does where the module has no say in it."""
    cls: Any = type(owner)
    twin = memo[id(owner)] = cls.__new__(cls)
    twin.__setstate__(copy.deepcopy(owner.__getstate__(), memo))
    return twin


def _of_class(owner: Any, name: str) -> Callable[..., Any]:
    """Return an object's method by its class, or what stands for it in Python and torch."""
    method = getattr(type(owner), "_call_impl" if name == CALL_SLOT else name, None)
    if method is None and name == "__deepcopy__":
        method = copied_by_state
    assert method is not None, name  # noqa: S101 - overrides are of methods
    bound: Callable[..., Any] = method.__get__(owner)
    return bound


def _put(owner: Any, name: str, inner: Callable[..., Any] | None) -> None:
    if inner is None:
        vars(owner).pop(name, None)
    else:
        setattr(owner, name, inner)


def _put_if_there(owner: Any, name: str, inner: Callable[..., Any] | None) -> None:
    if name in vars(owner):  # torch leaves the slot for calls out of copies
        _put(owner, name, inner)
