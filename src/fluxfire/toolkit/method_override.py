"""Callables that stand in the place of one object's method, and stay behind when it is copied."""

from __future__ import annotations

import copy
from collections.abc import Callable
from types import MethodType
from typing import Any


class Shadow:
    """What an instance attribute holds, to shadow a method of its owner's class.

    A copy of the owner, by `copy.deepcopy` or pickle, gets its own method in this place: what the
    shadow knows belongs to one pipeline.
    """

    def __init__(self, owner: Any, name: str, call: Callable[..., Any]) -> None:
        self._owner, self._name, self._call = owner, name, call

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Do what the method's place is taken for."""
        return self._call(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return MethodType(getattr(type(self._owner), self._name), copy.deepcopy(self._owner, memo))

    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, (self._owner, self._name)
