"""A parameter's numbers, wherever offloading keeps them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from fluxfire import modules

__all__ = ["change_storage"]


def change_storage(module: nn.Module, name: str, change: Callable[[Tensor], Tensor]) -> None:
    """Store a parameter's numbers in another way: the same numbers, by what `change` returns.

    Offloading layer by layer leaves a parameter without numbers, and keeps these by itself. One
    that was quantized since has other numbers, and is left alone.

    Args:
        module: which has the parameter itself.
        name: the parameter's name there.
        change: is given a tensor, and returns that one or another with the same numbers.
    """
    weight = module._parameters.get(name)  # noqa: SLF001 - a replaced layer may have none
    if weight is None or modules.is_quantized(weight):
        return
    with torch.no_grad(), modules.as_made(weight):
        old = weight.data
        if (changed := change(old)) is not old:
            weight.data = changed
        for holder, key in _kept(module, name):
            holder[key] = change(holder[key])


def _kept(module: nn.Module, name: str) -> Iterator[tuple[Any, str]]:
    """Iterate over where accelerate keeps a parameter's numbers: mapping, and the name in it."""
    hook = vars(module).get("_hf_hook")
    for one in getattr(hook, "hooks", (hook,)):  # it may be a sequence of hooks
        holder, key = getattr(one, "weights_map", None), name
        while (inner := getattr(holder, "dataset", None)) is not None:
            holder, key = inner, getattr(holder, "prefix", "") + key
        held = getattr(holder, "state_dict", holder)  # what is on disk stays as it is
        if isinstance(held, dict) and key in held:
            yield held, key
