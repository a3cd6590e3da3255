"""Subclasses that an object becomes an instance of while a pass is applied."""

from __future__ import annotations

import copyreg
import functools
from collections.abc import Callable
from typing import Any

from torch._guards import TracingContext

__all__ = ["StandIn", "own_class"]

_CLASS: Any = vars(object)["__class__"]


def own_class(obj: object) -> type:
    """Return an object's plain class: the first class of its MRO that is no stand-in."""
    return next(cls for cls in type(obj).__mro__ if not issubclass(cls, StandIn))


def _visible_class(obj: object) -> type:
    """Return the value of `obj.__class__`: the plain class, except while torch compiles.

    torch's compiler looks methods up by `__class__`, and must find the stand-in's methods.
    """
    return type(obj) if TracingContext.try_get() is not None else own_class(obj)


def _set_class(obj: object, cls: type) -> None:
    _CLASS.__set__(obj, cls)


class StandIn:
    """The first base of a class for `Transaction.set_class`. The plain class is the second base.

    Code outside fluxfire still sees the plain class: `type(obj)` is the stand-in, but
    `obj.__class__` is the plain class. By `__class__`, diffusers finds the blocks to cache, compile
    and offload, creates more processors of the same class, and writes class names into files.
    Copies have the plain class.

    A `forward` of a stand-in works only while the object has the stand-in's class. An offloading
    hook keeps the bound `forward` that it finds, and calls it even after `restore`. Such a call
    then goes to the plain class's `forward`.
    """

    # Methods of this class write super(StandIn, self). With a bare super(), Python would take the
    # name `__class__` of the class body for itself, and the class could not have this property.
    __class__ = property(_visible_class, _set_class)

    of_ours: tuple[str, ...] = ()
    """Attributes and submodules that belong to the stand-in, so that copies lack them."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super(StandIn, cls).__init_subclass__(**kwargs)  # noqa: UP008 - see above
        if "forward" in vars(cls):
            cls.forward = _only_for_instances(cls, vars(cls)["forward"])  # type: ignore[attr-defined]

    def __reduce_ex__(self, protocol: Any) -> Any:
        reduced: Any = super(StandIn, self).__reduce_ex__(protocol)  # noqa: UP008 - see above
        _, _, *state = reduced
        if state and isinstance(state[0], dict) and self.of_ours:
            state[0] = _without(state[0], self.of_ours)
        return copyreg.__newobj__, (own_class(self),), *state  # type: ignore[attr-defined]


def _without(state: dict[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    """Leave attributes out of an object's state, and submodules out of a module's."""
    left = {name: value for name, value in state.items() if name not in names}
    if "_modules" in left:
        left["_modules"] = {n: m for n, m in left["_modules"].items() if n not in names}
    return left


def _only_for_instances(cls: type, forward: Callable[..., Any]) -> Callable[..., Any]:
    """Call `forward` for instances of a class; for any other object call the object's `forward`."""

    @functools.wraps(forward)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(self, cls):
            return forward(self, *args, **kwargs)
        return type(self).forward(self, *args, **kwargs)

    return call
