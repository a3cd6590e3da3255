"""Classes that an object takes on while a pass is applied."""

from __future__ import annotations

import copyreg
import functools
from collections.abc import Callable
from typing import Any

from torch._guards import TracingContext

__all__ = ["StandIn", "own_class"]

_CLASS: Any = vars(object)["__class__"]


def own_class(obj: object) -> type:
    """Return the class that an object has when nothing stands in for it."""
    return next(cls for cls in type(obj).__mro__ if not issubclass(cls, StandIn))


def _shown(obj: object) -> type:
    """Return the class that others see: the own one, but for torch's compiler.

    That looks methods up by `__class__`, and would trace the plain ones.
    """
    return type(obj) if TracingContext.try_get() is not None else own_class(obj)


def _turn(obj: object, cls: type) -> None:
    _CLASS.__set__(obj, cls)


class StandIn:
    """The first base of a class for `Transaction.set_class`; the plain class is the second.

    Others go on seeing the plain class. `type(obj)` is the stand-in, `obj.__class__` the plain one:
    by that diffusers finds blocks to cache, to compile and to offload, makes other processors of
    the same kind, and writes files. Copies are of the plain class.

    A `forward` does not outlive the stand-in. A hook keeps the bound `forward` that it finds, as
    those for offloading do, and still calls it when `restore` has given the object its own class
    back. Then the call goes to that class's `forward`.
    """

    # A bare `super()` in a method of this class would take the name `__class__` for itself.
    __class__ = property(_shown, _turn)

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super(StandIn, cls).__init_subclass__(**kwargs)  # noqa: UP008 - see above
        if "forward" in vars(cls):
            cls.forward = _while_of_class(cls, vars(cls)["forward"])  # type: ignore[attr-defined]

    def __reduce_ex__(self, protocol: Any) -> Any:
        reduced: Any = super(StandIn, self).__reduce_ex__(protocol)  # noqa: UP008 - see above
        _, _, *state = reduced
        return copyreg.__newobj__, (own_class(self),), *state  # type: ignore[attr-defined]


def _while_of_class(cls: type, forward: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(forward)
    def checked(self: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(self, cls):
            return forward(self, *args, **kwargs)
        return type(self).forward(self, *args, **kwargs)

    return checked
