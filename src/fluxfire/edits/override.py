"""Overrides a method of one object. The override can be removed again."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

from fluxfire.edits.log import InverseCall, Memo

__all__ = ["CALL_SLOT", "Override"]

CALL_SLOT = "_compiled_call_impl"
"""The attribute that `torch.nn.Module.__call__` looks at first; `Module.compile` sets it."""


class Override:
    """An `Edit`: an attribute of one object that hides a method of the object's class.

    Overrides of the same method form a chain: each calls the next through `inner`. Any of them can
    be removed, in any order. Somebody else may keep a reference to one, as a hook keeps the
    `forward` that it found. A removed override only passes calls on to `inner`.

    Attributes:
        label: what the edit does, for error messages.
        inner: the attribute that was there before; None if there was only the class's method.
        undone: whether the override was removed.
    """

    def __init__(self, owner: Any, name: str, call: Callable[..., Any]) -> None:
        self.label = f"override {type(owner).__name__}.{name}"
        self._owner, self._name, self._call = weakref.ref(owner), name, call
        self.inner: Callable[..., Any] | None = vars(owner).get(name)
        self.undone = False

    @property
    def obj(self) -> Any:
        """The owner; None once it is deleted, because an override does not keep it alive."""
        return self._owner()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the new function, with the plain method as first argument."""
        if self.undone:
            return self.plain(*args, **kwargs)
        return self._call(self.plain, *args, **kwargs)

    @property
    def plain(self) -> Callable[..., Any]:
        """The method as it would be called without this override."""
        return self.inner or _method_of_class(self.obj, self._name)

    def make(self) -> None:
        """Set the attribute."""
        setattr(self.obj, self._name, self)

    def undo(self) -> None:
        """Remove the override from the chain. Attributes of others stay in place."""
        self.undone = True
        if (owner := self.obj) is None:
            return
        outer: Any = vars(owner).get(self._name)
        if outer is self:
            _set_or_delete(owner, self._name, self.inner)
        while isinstance(outer, Override):
            if outer.inner is self:
                outer.inner = self.inner
            outer = outer.inner

    def for_copies(self, memo: Memo) -> InverseCall | None:
        """Return the edit of the owner's deep copy; None if `memo` has no copy of the owner."""
        if self.obj is None or id(self.obj) not in memo:
            return None
        owner, inner = (copy.deepcopy(value, memo) for value in (self.obj, self.inner))
        return InverseCall(partial(_replace_if_set, owner, self._name, inner))

    def for_object(self, obj: Any) -> InverseCall:
        """Return the edit of the owner's shallow copy."""
        return InverseCall(partial(_replace_if_set, obj, self._name, self.inner))

    def __deepcopy__(self, memo: Memo) -> Any:
        return _method_of_class(copy.deepcopy(self.obj, memo), self._name)

    def __reduce__(self) -> tuple[Any, ...]:
        return _method_of_class, (self.obj, self._name)


def _deepcopy_by_state(owner: Any, memo: Memo) -> Any:
    """Copy a module as `copy.deepcopy` copies a module without `__deepcopy__`."""
    cls: Any = type(owner)
    twin = memo[id(owner)] = cls.__new__(cls)
    twin.__setstate__(copy.deepcopy(owner.__getstate__(), memo))
    return twin


def _method_of_class(owner: Any, name: str) -> Callable[..., Any]:
    """Return the method of an object's class that an attribute hides.

    Two names need more than a look-up: torch keeps the method for `CALL_SLOT` under another name,
    and a class need not define `__deepcopy__`.
    """
    method = getattr(type(owner), "_call_impl" if name == CALL_SLOT else name, None)
    if method is None and name == "__deepcopy__":
        method = _deepcopy_by_state
    assert method is not None, name  # noqa: S101 - only methods are overridden
    bound: Callable[..., Any] = method.__get__(owner)
    return bound


def _set_or_delete(owner: Any, name: str, inner: Callable[..., Any] | None) -> None:
    if inner is None:
        vars(owner).pop(name, None)
    else:
        setattr(owner, name, inner)


def _replace_if_set(owner: Any, name: str, inner: Callable[..., Any] | None) -> None:
    if name in vars(owner):  # a copied torch module has no attribute CALL_SLOT
        _set_or_delete(owner, name, inner)
